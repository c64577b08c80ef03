"""Straight-through binary selection of tiles and the share it keeps (paper: student branch, rate loss)."""

import torch
from torch import Tensor


def gumbel_mask(
    logits: Tensor, noise: Tensor | None = None, *, temperature: float = 1.0, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Select tiles for each branch, and measure the share kept by at least one branch.

    A^ = sigmoid((A + G1 - G2) / tau), M = B(A^ > gamma) - stopgrad(A^) + A^, and
    r~ = mean_j [1 - prod_c (1 - M_c^j)] over all C branches. Both are exact zeros and ones going
    forward and carry the gradient of the sigmoid going backward.

    Args:
        logits: A, (N, C).
        noise: G1 - G2, (N, C); `None` for none (evaluation, and LIPN).
        temperature: tau.
        threshold: gamma, in (0, 1).

    Returns:
        mask: M, (N, C).
        keep_ratio: r~, a scalar.
    """
    noisy = logits if noise is None else logits + noise
    soft = (noisy / temperature).sigmoid()
    mask = (soft > threshold).to(soft.dtype) + (soft - soft.detach())
    dropped = torch.ones_like(mask[:, 0])
    for branch in mask.unbind(1):
        dropped = dropped * (1 - branch)
    return mask, 1 - dropped.mean()
