"""Layers that several models share."""

from collections.abc import Callable

from torch import Tensor, nn

from hdmil_lib.kernels import gated_attention, gated_attention_pool, self_distillation_pool
from hdmil_lib.kernels.random import Seed, draw_seed
from hdmil_lib.kernels.segments import Segments


def projection(in_dim: int, embed_dim: int, dropout: float) -> nn.Sequential:
    """Linear layer, ReLU and dropout that turn features (N, in_dim) into embeddings (N, embed_dim)."""
    return nn.Sequential(nn.Linear(in_dim, embed_dim), nn.ReLU(), nn.Dropout(dropout))


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
