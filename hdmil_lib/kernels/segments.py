"""Bags of any length, one after the other: where each starts, and how a grid of programs covers them."""

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import check_tensor


def check_segments(cu_seqlens: Tensor | None, n_tiles: int, device: torch.device) -> None:
    """Hold `cu_seqlens` (B + 1,) to 0 = first <= ... <= last = n_tiles; reading it makes a GPU wait.

    Raises:
        ValueError: It is something else.
    """
    if cu_seqlens is None:
        return
    check_tensor("cu_seqlens", cu_seqlens, "B+1")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, expected integers (B + 1,)"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, but embeddings is on {device}")
    first, last, ascends = int(cu_seqlens[0]), int(cu_seqlens[-1]), bool((cu_seqlens.diff() >= 0).all())
    if first != 0 or last != n_tiles or not ascends:
        raise ValueError(
            f"cu_seqlens goes from {first} to {last}{'' if ascends else ' and descends in between'}: "
            f"expected bags that cover the {n_tiles} tiles one after the other, from 0 to {n_tiles}"
        )


def chunks(cu_seqlens: Tensor, n_tiles: int, size: int) -> tuple[Tensor, Tensor]:
    """Cut every bag into chunks of at most `size` tiles; no chunk has tiles of two bags.

    Its number depends on the lengths, which a GPU knows and the caller does not; there are rows for as
    many as there can be, and those that are too many have no tiles.

    Returns:
        table: int32 (n_tiles // size + B, 3): bag, first tile, end.
        first_chunk: int32 (B + 1,), where the chunks of each bag start in the table.
    """
    counts = (cu_seqlens.diff() + size - 1) // size
    first_chunk = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    number = torch.arange(n_tiles // size + len(counts), device=cu_seqlens.device)
    bag = torch.searchsorted(first_chunk, number, right=True) - 1
    beyond = bag >= len(counts)
    bag = bag.clamp(max=len(counts) - 1)
    start = cu_seqlens[bag] + (number - first_chunk[bag]) * size
    start = start.masked_fill(beyond, n_tiles)
    end = torch.minimum(start + size, cu_seqlens[bag + 1]).masked_fill(beyond, n_tiles)
    return torch.stack((bag, start, end), 1).int(), first_chunk.int()
