"""Straight-through binary selection of tiles and the share it keeps (paper: student branch, rate loss)."""

from functools import reduce

import torch
from torch import Tensor

from hdmil_lib.kernels.random import logistic


def gumbel_mask(
    logits: Tensor, seed: int | None, temperature: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Mask (N, C) and keep ratio, as `kernels.gumbel_mask` describes them."""
    noisy = logits if seed is None else logits + logistic(seed, logits)
    soft = (noisy / temperature).sigmoid().to(logits.dtype)
    mask = (soft > threshold).to(soft.dtype) + (soft - soft.detach())
    dropped = reduce(torch.mul, (1 - mask).unbind(1))
    return mask, 1 - dropped.mean()
