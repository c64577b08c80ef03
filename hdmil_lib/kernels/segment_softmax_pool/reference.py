"""Masked softmax pooling, each branch over its own tiles (paper: teacher and student pooling)."""

import torch
from torch import Tensor


def segment_softmax_pool(
    embeddings: Tensor, logits: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Bag embeddings, as `kernels.segment_softmax_pool` describes them: bag after bag."""
    if cu_seqlens is None:
        return pool(embeddings, logits, mask)
    lengths = cu_seqlens.diff().tolist()
    masks = [None] * len(lengths) if mask is None else mask.split(lengths)
    bags = zip(embeddings.split(lengths), logits.split(lengths), masks, strict=True)
    return torch.stack([pool(*bag) for bag in bags])


def pool(embeddings: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    """One bag: (C, E). The largest kept logit is subtracted first, so that no logit overflows."""
    if mask is None or len(logits) == 0:
        return logits.softmax(0).T @ embeddings
    best = torch.zeros_like(mask).scatter_(0, logits.argmax(0, keepdim=True), 1.0)
    mask = mask + best * ~(mask > 0.5).any(0)
    largest = logits.detach().masked_fill(mask <= 0.5, -torch.inf).amax(0)
    shifted = logits - largest
    shifted = shifted.masked_fill(shifted > 0, 0)  # not clamp, which has no gradient at 0, the largest itself
    weights = shifted.exp() * mask
    return (weights / weights.sum(0)).T @ embeddings
