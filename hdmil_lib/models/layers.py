"""Layers that several models share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from hdmil_lib.kernels import gated_attention, gated_attention_pool, self_distillation_pool, tile_projection
from hdmil_lib.kernels.dispatch import use_triton
from hdmil_lib.kernels.random import Seed, draw_seed
from hdmil_lib.kernels.segments import Segments


@dataclass(frozen=True)
class Projected:
    """Embeddings of the tiles of a batch, and what they were computed from.

    Attributes:
        embeddings: F, (N, E).
        features: I, (M, D).
        scale: Mean and standard deviation by which features were standardized, (D,), or two `None`.
        rows: Rows of the features, (N,); `None` for all.
        dropout: Dropout rate.
        seed: Seed of the dropout.
        repeatable: Whether the embedding of a tile can be computed again.
    """

    embeddings: Tensor
    features: Tensor
    scale: tuple[Tensor | None, Tensor | None]
    rows: Tensor | None
    dropout: float
    seed: Seed | None
    repeatable: bool


class Projection(nn.Sequential):
    """Linear layer, ReLU and dropout that turn features (N, in_dim) into embeddings (N, embed_dim).

    On a CPU the dropout draws from PyTorch's generator, on a GPU it is a function of a seed; see
    `kernels.tile_projection`.
    """

    def __init__(self, in_dim: int, embed_dim: int, dropout: float = 0.0, bias: bool = True):
        super().__init__(nn.Linear(in_dim, embed_dim, bias=bias), nn.ReLU(), nn.Dropout(dropout))

    def forward(
        self,
        features: Tensor,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Embeddings of features, standardized if there are their mean and standard deviation, (in_dim,).

        With `rows` (N,) those of these rows of the features only.
        """
        return self.project(features, mean, std, rows=rows).embeddings

    def project(
        self,
        features: Tensor,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Projected:
        """As `forward`, with all that `pick` needs."""
        dropout = cast(nn.Dropout, self[2]).p if self.training else 0.0
        repeatable = use_triton("auto", features)
        seed = draw_seed() if dropout > 0 and repeatable else None
        embeddings = self._embed(features, (mean, std), rows, dropout, seed)
        return Projected(embeddings, features, (mean, std), rows, dropout, seed, repeatable)

    def pick(self, projected: Projected, tiles: Tensor) -> Tensor:
        """Embeddings (n, embed_dim) of some of the tiles, given their numbers in the batch, int64 (n,).

        On a GPU they are computed again: the gradient of an index is as large as all embeddings.
        """
        p = projected
        if not p.repeatable:
            return p.embeddings[tiles]
        rows = tiles if p.rows is None else p.rows[tiles]
        return self._embed(p.features, p.scale, rows, p.dropout, p.seed, tiles)

    def _embed(
        self,
        features: Tensor,
        scale: tuple[Tensor | None, Tensor | None],
        rows: Tensor | None,
        dropout: float,
        seed: Seed | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        layer = cast(nn.Linear, self[0])
        return tile_projection(
            features,
            layer.weight,
            layer.bias,
            *scale,
            rows=rows,
            dropout=dropout,
            seed=seed,
            positions=positions,
        )


class GatedAttention(nn.Module):
    """Attention logits (N, n_branches) of embeddings (N, embed_dim); see `kernels.gated_attention`."""

    def __init__(self, embed_dim: int, attention_dim: int, n_branches: int, dropout: float = 0.0):
        super().__init__()
        self.tanh = nn.Linear(embed_dim, attention_dim)
        self.gate = nn.Linear(embed_dim, attention_dim)
        self.score = nn.Linear(attention_dim, n_branches)
        self.dropout = dropout

    def forward(self, embeddings: Tensor) -> Tensor:
        dropout, seed = self._dropout()
        return gated_attention(embeddings, *self._weights(), dropout=dropout, seed=seed)

    def pool(self, embeddings: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Bag embeddings (B, n_branches, embed_dim) and logits; see `kernels.gated_attention_pool`."""
        dropout, seed = self._dropout()
        return gated_attention_pool(
            embeddings, *self._weights(), segments=segments, dropout=dropout, seed=seed
        )

    def distill(
        self,
        embeddings: Tensor,
        segments: Segments,
        *,
        noise_seed: Callable[[], Seed | None],
        temperature: float,
        threshold: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student, teacher, logits and mask; see `kernels.self_distillation_pool`.

        The seed of the noise is a function, since it is drawn after that of the dropout.
        """
        dropout, seed = self._dropout()
        return self_distillation_pool(
            embeddings,
            *self._weights(),
            segments=segments,
            dropout=dropout,
            seed=seed,
            noise_seed=noise_seed(),
            temperature=temperature,
            threshold=threshold,
        )

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        tanh, gate, score = self.tanh, self.gate, self.score
        return tanh.weight, tanh.bias, gate.weight, gate.bias, score.weight, score.bias

    def _dropout(self) -> tuple[float, Seed | None]:
        """Dropout rate and seed of this call."""
        if not self.training or self.dropout == 0:
            return 0.0, None
        return self.dropout, draw_seed()
