"""Masked softmax pooling of one bag, each branch over its own tiles (paper: teacher and student pooling)."""

import torch
from torch import Tensor


def segment_softmax_pool(embeddings: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Bag embedding of each branch: E_c = sum_j exp(A_c^j) M_c^j F^j / sum_s exp(A_c^s) M_c^s.

    The largest kept logit of a branch is subtracted first, so that no logit overflows. A branch that
    keeps nothing pools its single highest-attention tile. Gradients reach a straight-through mask as
    the equation says, also at dropped tiles; there, a logit above the largest kept one counts as equal
    to it, which bounds the gradient.

    Args:
        embeddings: F, (N, E), N >= 1.
        logits: A, (N, C).
        mask: M, (N, C), 1 for a kept and 0 for a dropped tile; `None` keeps all (the teacher).

    Returns:
        (C, E).
    """
    if mask is None:
        return logits.softmax(0).T @ embeddings
    mask = mask.to(logits.dtype)
    best = torch.zeros_like(mask).scatter_(0, logits.argmax(0, keepdim=True), 1.0)
    mask = mask + best * ~(mask > 0.5).any(0)
    largest = logits.detach().masked_fill(mask <= 0.5, -torch.inf).amax(0)
    shifted = logits - largest
    shifted = shifted.masked_fill(shifted > 0, 0)  # not clamp, which has no gradient at 0, the largest itself
    weights = shifted.exp() * mask
    return (weights / weights.sum(0)).T @ embeddings
