"""Means, maxima, padding and choices of concatenated bags, none empty; nothing is read on the host."""

import torch
from torch import Tensor

from hdmil_lib.kernels.random import bits_at
from hdmil_lib.kernels.segments import Segments


def pad(values: Tensor, segments: Segments, fill: float = 0.0) -> Tensor:
    """Pad values (N, ...) with `fill` to (B, L, ...), where L is the number of tiles of the longest bag."""
    if segments.n_bags == 1 and segments.exact:
        return values.unsqueeze(0)
    bag, place, n_bags = segments.bag, segments.place, segments.n_bags
    if not segments.exact:  # tiles that are in no bag go to one more bag, which is dropped
        n_bags, place = n_bags + 1, place.clamp(max=segments.longest - 1)
    padded = values.new_full((n_bags, segments.longest, *values.shape[1:]), fill)
    return padded.index_put((bag, place), values)[: segments.n_bags]


def unpad(padded: Tensor, segments: Segments) -> Tensor:
    """Inverse of `pad`: (B, L, ...) to (N, ...); of no meaning for tiles that are in no bag."""
    if segments.n_bags == 1 and segments.exact:
        return padded[0]
    bag, place = segments.bag, segments.place
    if not segments.exact:
        bag, place = bag.clamp(max=segments.n_bags - 1), place.clamp(max=segments.longest - 1)
    return padded[bag, place]


def bag_mean(values: Tensor, segments: Segments) -> Tensor:
    """Mean over the tiles of each bag: (N, ...) to (B, ...)."""
    if segments.n_bags == 1 and segments.exact:  # thousands of additions to few numbers wait for each other
        return values.sum(0, keepdim=True) / len(values)
    n_sums = segments.n_bags + (not segments.exact)
    sums = values.new_zeros(n_sums, *values.shape[1:]).index_add(0, segments.bag, values)
    return sums[: segments.n_bags] / segments.sizes.to(values.dtype).view(-1, *[1] * (values.ndim - 1))


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


def highest(scores: Tensor, segments: Segments, share: float | Tensor) -> Tensor:
    """Tiles of highest score of each bag, the nearest number to this share and at least one, bool (N,)."""
    order = scores.argsort(descending=True, stable=True)
    order = order[segments.bag[order].argsort(stable=True)]
    rank = torch.empty_like(order).index_put((order,), segments.place)
    return rank < (share * segments.sizes.double()).round().clamp(min=1)[segments.bag]


def random_tiles(segments: Segments, share: float) -> Tensor:
    """Random tiles of each bag, the nearest number to this share and at least one, bool (N,).

    They depend on the place of a tile in its bag alone, so that a slide is always read alike.
    """
    return highest(bits_at(0, segments.place, 1)[:, 0], segments, share)
