"""Gated attention scores of the tiles of a bag (paper: DMIN, attention)."""

from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear


def gated_attention(
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Attention logits A = [tanh(F V) * sigmoid(F U)] W, one column for each branch.

    Args:
        embeddings: F, (N, E).
        tanh_weight, tanh_bias: V, (H, E) and (H,).
        gate_weight, gate_bias: U, (H, E) and (H,).
        score_weight, score_bias: W, (C, H) and (C,).
        dropout: Share of hidden units dropped from each of the two factors; 0 in evaluation.

    Returns:
        Logits before the softmax over tiles, (N, C).
    """
    hidden = linear(embeddings, tanh_weight, tanh_bias).tanh()
    gate = linear(embeddings, gate_weight, gate_bias).sigmoid()
    if dropout > 0:
        hidden, gate = drop(hidden, dropout), drop(gate, dropout)
    return linear(hidden * gate, score_weight, score_bias)
