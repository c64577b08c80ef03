"""Means, maxima and padding of concatenated bags, none of which is empty."""

import torch
from torch import Tensor

from hdmil_lib.kernels.segments import Segments


def pad(values: Tensor, segments: Segments, fill: float = 0.0) -> Tensor:
    """Pad values (N, ...) with `fill` to (B, L, ...), where L is the number of tiles of the longest bag."""
    if segments.n_bags == 1:
        return values.unsqueeze(0)
    padded = values.new_full((segments.n_bags, segments.longest, *values.shape[1:]), fill)
    return padded.index_put((segments.bag, segments.place), values)


def unpad(padded: Tensor, segments: Segments) -> Tensor:
    """Inverse of `pad`: (B, L, ...) to (N, ...)."""
    if segments.n_bags == 1:
        return padded[0]
    return padded[segments.bag, segments.place]


def bag_mean(values: Tensor, segments: Segments) -> Tensor:
    """Mean over the tiles of each bag: (N, ...) to (B, ...)."""
    sums = values.new_zeros(segments.n_bags, *values.shape[1:]).index_add(0, segments.bag, values)
    return sums / segments.sizes.to(values.dtype).view(-1, *[1] * (values.ndim - 1))


def bag_argmax(values: Tensor, segments: Segments) -> Tensor:
    """Row, among all N tiles, of each bag's tile of highest value; the first of equal ones.

    Args:
        values: (N,) or (N, C); no gradient flows back to them.
        segments: The bags.

    Returns:
        int64 (B,) or (B, C).
    """
    highest = pad(values.detach(), segments, -torch.inf).argmax(1)
    return highest + segments.offsets[:-1].view(-1, *[1] * (values.ndim - 1))
