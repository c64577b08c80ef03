"""Masked softmax pooling, each branch over its own tiles (paper: teacher and student pooling)."""

import torch
from torch import Tensor

from hdmil_lib.kernels.segments import Segments


def segment_softmax_pool(
    embeddings: Tensor, logits: Tensor, mask: Tensor | None, segments: Segments | None
) -> Tensor:
    """Bag embeddings, as `kernels.segment_softmax_pool` describes them: bag after bag."""
    if segments is None:
        return pool(embeddings, logits, mask)
    lengths = segments.read_lengths()
    if not segments.exact:
        n = sum(lengths)
        embeddings, logits, mask = embeddings[:n], logits[:n], None if mask is None else mask[:n]
    masks = [None] * len(lengths) if mask is None else mask.split(lengths)
    bags = zip(embeddings.split(lengths), logits.split(lengths), masks, strict=True)
    return torch.stack([pool(*bag) for bag in bags])


def pool(embeddings: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    """One bag: (C, E). The largest kept logit is subtracted first, so that no logit overflows."""
    logits = logits.T
    if mask is None or logits.numel() == 0:
        return logits.softmax(1) @ embeddings
    mask, fixed = mask.T, logits.detach()
    largest = fixed.masked_fill(mask <= 0.5, -torch.inf).amax(1, keepdim=True)
    top, best = fixed.max(1, keepdim=True)
    empty = largest == -torch.inf
    mask = mask.scatter_add(1, best, empty.to(mask.dtype))
    shifted = logits - torch.where(empty, top, largest)
    shifted = shifted.masked_fill(shifted > 0, 0)  # not clamp, which has no gradient at 0, the largest itself
    weights = shifted.exp() * mask
    return (weights / weights.sum(1, keepdim=True)) @ embeddings
