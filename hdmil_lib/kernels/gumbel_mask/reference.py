"""Straight-through selection of tiles in plain PyTorch."""

from torch import Tensor

from hdmil_lib.kernels.random import Seed, logistic


def gumbel_mask(logits: Tensor, seed: Seed | None, temperature: float, threshold: float) -> Tensor:
    """Return the mask (N, C) that `kernels.gumbel_mask` describes."""
    noisy = logits if seed is None else logits + logistic(seed, logits)
    soft = (noisy / temperature).sigmoid()
    if soft.dtype != logits.dtype:
        soft = soft.to(logits.dtype)
    fixed = soft.detach()
    return (soft - fixed) + (fixed > threshold)
