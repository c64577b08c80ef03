"""Bags of any length, one after the other in one tensor: where each starts, checked once."""

from collections.abc import Sequence
from functools import cached_property
from operator import index

import torch
from torch import Tensor


class Segments:
    """Where each of B bags lies among N tiles that stand one after the other.

    Lengths are known on the host, offsets lie where the tiles lie: nothing that is derived from a `Segments`
    makes a GPU wait. Operators and models take one and do not check it again.

    Attributes:
        lengths: Tiles of each bag, on the host.
        n_tiles: Number of tiles of all bags, N.
        longest: Number of tiles of the longest bag.
        offsets: Where each bag starts and the last one ends, from 0 to N, int64 (B + 1,).
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        """Describe bags with these lengths.

        Args:
            lengths: Tiles of each bag, 0 or more; at least one bag.
            device: Device of the tiles.

        Raises:
            ValueError: There is no bag, or a length is negative.
            TypeError: A length is no integer.
        """
        self.lengths = tuple(index(length) for length in lengths)
        if not self.lengths or min(self.lengths) < 0:
            raise ValueError(f"lengths is {self.lengths}, expected one bag or more, of 0 or more tiles each")
        self.n_tiles, self.longest = sum(self.lengths), max(self.lengths)
        sizes = torch.tensor((0, *self.lengths), dtype=torch.int64)
        self.offsets = sizes.cumsum(0).to(device, non_blocking=True)

    @classmethod
    def from_offsets(cls, offsets: Tensor) -> "Segments":
        """Describe bags by their offsets (B + 1,), integers from 0 upwards; reads them on the host.

        Raises:
            ValueError: They do not start at 0, descend, or are no vector of integers.
        """
        if offsets.dtype not in (torch.int32, torch.int64) or offsets.ndim != 1 or len(offsets) < 2:
            shape = tuple(offsets.shape)
            raise ValueError(f"offsets is {offsets.dtype} of shape {shape}, expected integers (B + 1,)")
        values = offsets.tolist()
        if values[0] != 0:
            raise ValueError(f"offsets starts at {values[0]}, expected 0")
        return cls([end - start for start, end in zip(values, values[1:], strict=False)], offsets.device)

    @property
    def n_bags(self) -> int:
        """Number of bags, B."""
        return len(self.lengths)

    @cached_property
    def sizes(self) -> Tensor:
        """Tiles of each bag on the device, int64 (B,)."""
        return self.offsets.diff()

    @cached_property
    def bag(self) -> Tensor:
        """Number of the bag that each tile is in, int64 (N,)."""
        bags = torch.arange(self.n_bags, device=self.offsets.device)
        return torch.repeat_interleave(bags, self.sizes, output_size=self.n_tiles)

    @cached_property
    def place(self) -> Tensor:
        """Place of each tile in its bag, from 0, int64 (N,)."""
        return torch.arange(self.n_tiles, device=self.offsets.device) - self.offsets[self.bag]

    def __len__(self) -> int:
        return self.n_bags

    def __repr__(self) -> str:
        return f"Segments({self.n_bags} bags, {self.n_tiles} tiles, {self.offsets.device})"


def check_segments(segments: Segments | None, n_tiles: int, device: torch.device) -> None:
    """Hold segments to the tensors they come with; no number on a device is read.

    Raises:
        ValueError: They are no `Segments`, cover another number of tiles, or lie on another device.
    """
    if segments is None:
        return
    if not isinstance(segments, Segments):
        raise ValueError(f"segments is a {type(segments).__name__}, expected a Segments, or None for one bag")
    if segments.n_tiles != n_tiles:
        raise ValueError(f"segments covers {segments.n_tiles} tiles, embeddings has {n_tiles}")
    if segments.offsets.device != device:
        raise ValueError(f"segments is on {segments.offsets.device}, but embeddings is on {device}")


def chunks(offsets: Tensor, n_tiles: int, size: int) -> tuple[Tensor, Tensor]:
    """Cut every bag into chunks of at most `size` tiles; no chunk has tiles of two bags.

    The number of chunks depends on the lengths, which are not read here: there are rows for as many as there
    can be, and surplus rows have no tiles.

    Args:
        offsets: Where each bag starts and the last one ends, (B + 1,).
        n_tiles: Number of tiles, N.
        size: Largest number of tiles per chunk.

    Returns:
        table: int32 (N // size + B, 3): bag, first tile, end.
        first_chunk: int32 (B + 1,), where the chunks of each bag start in the table.
    """
    counts = (offsets.diff() + size - 1) // size
    first_chunk = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    number = torch.arange(n_tiles // size + len(counts), device=offsets.device)
    bag = torch.searchsorted(first_chunk, number, right=True) - 1
    beyond = bag >= len(counts)
    bag = bag.clamp(max=len(counts) - 1)
    start = offsets[bag] + (number - first_chunk[bag]) * size
    start = start.masked_fill(beyond, n_tiles)
    end = torch.minimum(start + size, offsets[bag + 1]).masked_fill(beyond, n_tiles)
    return torch.stack((bag, start, end), 1).int(), first_chunk.int()
