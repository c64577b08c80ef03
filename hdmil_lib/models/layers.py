"""Layers that several models share."""

from torch import Tensor, nn

from hdmil_lib.kernels import gated_attention


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
        return gated_attention(
            embeddings,
            self.tanh.weight,
            self.tanh.bias,
            self.gate.weight,
            self.gate.bias,
            self.score.weight,
            self.score.bias,
            dropout=self.dropout if self.training else 0.0,
        )
