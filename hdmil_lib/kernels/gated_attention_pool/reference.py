"""Gated attention and the pooling that it weighs, one by one (paper: DMIN, attention and pooling)."""

from collections.abc import Sequence

from torch import Tensor

from hdmil_lib.kernels.gated_attention.reference import gated_attention
from hdmil_lib.kernels.random import Seed
from hdmil_lib.kernels.segment_softmax_pool.reference import segment_softmax_pool
from hdmil_lib.kernels.segments import Segments


def gated_attention_pool(
    embeddings: Tensor,
    weights: Sequence[Tensor],
    mask: Tensor | None,
    segments: Segments | None,
    dropout: float,
    seed: Seed,
) -> tuple[Tensor, Tensor]:
    """Bag embeddings and logits, as `kernels.gated_attention_pool` describes them."""
    tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias = weights
    logits = gated_attention(
        embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias, dropout, seed
    )
    return segment_softmax_pool(embeddings, logits, mask, segments), logits
