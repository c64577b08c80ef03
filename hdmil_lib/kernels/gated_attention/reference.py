"""Gated attention in plain PyTorch."""

from torch import Tensor
from torch.nn.functional import linear

from hdmil_lib.kernels.random import Seed, bits, shift


def gated_attention(
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    dropout: float = 0.0,
    seed: Seed = 0,
) -> Tensor:
    """Return the logits (N, C) that `kernels.gated_attention` describes."""
    hidden = linear(embeddings, tanh_weight, tanh_bias).tanh()
    hidden = hidden * linear(embeddings, gate_weight, gate_bias).sigmoid()
    if dropout > 0:
        hidden = hidden * kept_pairs(hidden, dropout, seed) / (1 - dropout) ** 2
    return linear(hidden, score_weight, score_bias)


def kept_pairs(like: Tensor, dropout: float, seed: Seed) -> Tensor:
    """Return where neither factor is dropped: each one uses half of the 32 random bits of a position."""
    words, level = bits(seed, like.shape, like.device), drop_level(dropout)
    return ((words & 0xFFFF) >= level) & (shift(words, 16) >= level)


def drop_level(dropout: float) -> int:
    """Return how many of 2^16 equally likely numbers mean "dropped"."""
    return round(dropout * 2**16)
