"""Layers that several models share."""

from torch import Tensor, nn

from hdmil_lib.kernels import gated_attention, gated_attention_pool
from hdmil_lib.kernels.random import draw_seed
from hdmil_lib.kernels.segments import Segments


def projection(in_dim: int, embed_dim: int, dropout: float) -> nn.Sequential:
    """Features I (N, in_dim) to embeddings F (N, embed_dim): linear, ReLU, dropout."""
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
        return gated_attention(embeddings, *self._weights, **self._drops())

    def pool(self, embeddings: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Bag embeddings (B, n_branches, embed_dim) and logits; see `kernels.gated_attention_pool`."""
        return gated_attention_pool(embeddings, *self._weights, None, segments, **self._drops())

    @property
    def _weights(self) -> list[Tensor]:
        return [p for layer in (self.tanh, self.gate, self.score) for p in (layer.weight, layer.bias)]

    def _drops(self) -> dict[str, float | int]:
        if not self.training or self.dropout == 0:
            return {}
        return {"dropout": self.dropout, "seed": draw_seed()}
