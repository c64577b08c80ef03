"""Bags of different lengths, one after the other in one tensor: their means, maxima and padded form.

`cu_seqlens` (B + 1,) says where each bag starts and the last one ends, from 0 to N; no bag is empty.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def cumulative(lengths: Sequence[int] | Tensor, device: torch.device | str | None = None) -> Tensor:
    """`cu_seqlens` (B + 1,), int64, of bags with these lengths."""
    lengths = torch.as_tensor(lengths, dtype=torch.int64, device=device)
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))


def bag_of_tile(cu_seqlens: Tensor) -> Tensor:
    """Which bag each tile is in, int64 (N,)."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def pad(values: Tensor, cu_seqlens: Tensor, fill: float = 0.0) -> Tensor:
    """(N, ...) as (B, L, ...), L the longest bag's length, with `fill` behind the shorter ones."""
    lengths = cu_seqlens.diff()
    if len(lengths) == 1:
        return values.unsqueeze(0)
    padded = values.new_full((len(lengths), int(lengths.max()), *values.shape[1:]), fill)
    bag = bag_of_tile(cu_seqlens)
    place = torch.arange(len(values), device=values.device) - cu_seqlens[bag]
    return padded.index_put((bag, place), values)


def unpad(padded: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The tiles (N, ...) of what `pad` made."""
    place = torch.arange(padded.shape[1], device=padded.device)
    return padded[place < cu_seqlens.diff().unsqueeze(1)]


def bag_mean(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over the tiles of each bag: (N, ...) to (B, ...)."""
    lengths = cu_seqlens.diff().to(values.dtype)
    sums = values.new_zeros(len(lengths), *values.shape[1:]).index_add(0, bag_of_tile(cu_seqlens), values)
    return sums / lengths.view(-1, *[1] * (values.ndim - 1))


def bag_argmax(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Number, among all N tiles, of each bag's tile of highest value, the first of equals.

    Args:
        values: (N,) or (N, C), without gradient.

    Returns:
        int64 (B,) or (B, C).
    """
    starts = cu_seqlens[:-1]
    highest = pad(values.detach(), cu_seqlens, -torch.inf).argmax(1)
    return highest + starts.view(-1, *[1] * (values.ndim - 1))
