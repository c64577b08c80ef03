"""Gated attention and the pooling that it weighs, one by one (paper: DMIN, attention and pooling)."""

from torch import Tensor

from hdmil_lib.kernels.gated_attention.reference import gated_attention
from hdmil_lib.kernels.segment_softmax_pool.reference import segment_softmax_pool
from hdmil_lib.kernels.segments import Segments


def gated_attention_pool(
    embeddings: Tensor,
    weights: list[Tensor],
    mask: Tensor | None,
    segments: Segments | None,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Bag embeddings and logits, as `kernels.gated_attention_pool` describes them."""
    logits = gated_attention(embeddings, *weights, dropout, seed)
    return segment_softmax_pool(embeddings, logits, mask, segments), logits
