"""Layers that several models share."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from hdmil_lib.kernels import gated_attention, gated_attention_pool, self_distillation_pool, tile_projection
from hdmil_lib.kernels.dispatch import use_triton
from hdmil_lib.kernels.random import Seed, draw_seed
from hdmil_lib.kernels.segments import Segments


class Projection(nn.Sequential):
    """Linear layer, ReLU and dropout that turn features (N, in_dim) into embeddings (N, embed_dim).

    On a CPU the dropout draws from PyTorch's generator, on a GPU it is a function of a seed; see
    `kernels.tile_projection`.
    """

    def __init__(self, in_dim: int, embed_dim: int, dropout: float = 0.0, bias: bool = True):
        super().__init__(nn.Linear(in_dim, embed_dim, bias=bias), nn.ReLU(), nn.Dropout(dropout))

    def forward(self, features: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """Embeddings of features, standardized if there are their mean and standard deviation, (in_dim,)."""
        layer = cast(nn.Linear, self[0])
        dropout = cast(nn.Dropout, self[2]).p if self.training else 0.0
        seed = draw_seed() if dropout > 0 and use_triton("auto", features) else None
        return tile_projection(features, layer.weight, layer.bias, mean, std, dropout=dropout, seed=seed)


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
