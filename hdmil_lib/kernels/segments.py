"""Bags of any length, one after the other in one tensor: where each starts, checked once."""

from collections.abc import Iterable
from copy import copy
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import index
from typing import Any

import torch
from torch import Tensor

CHUNK = 64
"""Most tiles of a chunk of a bag that a program of the pooling kernels processes."""


class derived(property):
    """A property that is computed once: `functools.cached_property` without a lock, so that it compiles."""

    def __get__(self, segments: Any, owner: type | None = None) -> Any:
        """Return the kept value, computed at the first access."""
        assert self.fget is not None
        kept, name = segments.__dict__["_derived"], self.fget.__name__
        if name not in kept:
            kept[name] = self.fget(segments)
        return kept[name]


class Segments:
    """Where each of B bags lies among N tiles that stand one after the other.

    Lengths are known on the host, offsets lie where the tiles lie: nothing that is derived from a `Segments`
    makes a GPU wait. Operators and models take one and do not check it again.

    Attributes:
        lengths: Tiles of each bag, on the host; without `exact` the most that each bag can have.
        n_tiles: Number of tiles, N.
        longest: Number of tiles of the longest bag, or the most that it can have.
        offsets: Where each bag starts and the last one ends, from 0 upwards, int64 (B + 1,).
        exact: Whether the bags have these lengths and end with tile N. If not, which `select` makes so on a
            GPU, the lengths are in the offsets alone, and the tiles behind the last bag are in no bag.
    """

    def __init__(self, lengths: Iterable[int], device: torch.device | str = "cpu"):
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
        self.n_tiles, self.longest, self.exact = sum(self.lengths), max(self.lengths), True
        self._derived: dict[str, Any] = {}
        self._on_host = torch.tensor([0, *accumulate(self.lengths)], device="cpu")
        self.offsets = to_device(self._on_host, device)

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
        return cls([end - start for start, end in pairwise(values)], offsets.device)

    def select(self, kept: Tensor, *, wait: bool | None = None) -> tuple[Tensor, "Segments"]:
        """Choose tiles, and describe the bags that they make.

        Args:
            kept: Tiles to choose, bool (N,); none of them is in no bag.
            wait: Whether to wait for the number of tiles that are kept, by default as `may_wait` says.

        Returns:
            rows: Rows of the kept tiles, bag after bag, int64 (n,). Without waiting, the rows of all N tiles,
                kept ones first.
            segments: The bags of kept tiles; without waiting not `exact`.
        """
        ends = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
        offsets = ends[self.offsets]
        if may_wait(offsets.device) if wait is None else wait:
            return kept.nonzero()[:, 0], Segments.from_offsets(offsets)
        chosen = copy(self)
        chosen.offsets, chosen.exact, chosen._derived = offsets, False, {}
        return kept.logical_not().byte().argsort(stable=True), chosen

    def read_lengths(self) -> list[int]:
        """Tiles of each bag; waits for the GPU unless they are known."""
        return list(self.lengths) if self.exact else self.sizes.tolist()

    @property
    def n_bags(self) -> int:
        """Number of bags, B."""
        return len(self.lengths)

    @derived
    def covering(self) -> Tensor:
        """Offsets such that every tile is in a bag: if not `exact`, with one more bag of the other tiles."""
        if self.exact:
            return self.offsets
        return torch.nn.functional.pad(self.offsets, (0, 1), value=self.n_tiles)

    def chunks(self, size: int = CHUNK) -> tuple[Tensor, Tensor]:
        """Chunks of at most `size` tiles of the bags of `covering`, as the function `chunks` cuts them.

        They are cut once: on the host if the lengths are known there, since a dozen operators on small
        tensors take a GPU longer than the pooling of a slide does.
        """
        name = f"chunks of {size}"
        if name not in self._derived:
            if self.exact and not torch.compiler.is_compiling():
                with torch.inference_mode(False):  # a backward pass may keep them
                    cut = chunks(self._on_host, self.n_tiles, size)
                    self._derived[name] = tuple(to_device(part, self.offsets.device) for part in cut)
            else:
                self._derived[name] = chunks(self.covering, self.n_tiles, size)
        return self._derived[name]

    @derived
    def sizes(self) -> Tensor:
        """Tiles of each bag on the device, int64 (B,)."""
        return self.offsets.diff()

    @derived
    def bag(self) -> Tensor:
        """Number of the bag that each tile is in, int64 (N,); B for a tile that is in no bag."""
        if self.exact:
            bags = torch.arange(self.n_bags, device=self.offsets.device)
            return torch.repeat_interleave(bags, self.sizes, output_size=self.n_tiles)
        return torch.searchsorted(self.offsets[1:], self._tiles(), right=True)

    @derived
    def place(self) -> Tensor:
        """Place of each tile in its bag, from 0, int64 (N,)."""
        return self._tiles() - self.covering[self.bag]

    @derived
    def inside(self) -> Tensor:
        """Whether each tile is in a bag, bool (N,)."""
        return self._tiles() < self.offsets[-1]

    def _tiles(self) -> Tensor:
        return torch.arange(self.n_tiles, device=self.offsets.device)

    def __len__(self) -> int:
        return self.n_bags

    def __repr__(self) -> str:
        n_tiles = f"{self.n_tiles} tiles" if self.exact else f"at most {self.n_tiles} tiles"
        return f"Segments({self.n_bags} bags, {n_tiles}, {self.offsets.device})"


@lru_cache(maxsize=4096)
def one_bag(n_tiles: int, device: torch.device) -> Segments:
    """One bag of this many tiles; it is made once, and its chunks are cut once."""
    with torch.inference_mode(False):
        return Segments([n_tiles], device)


def may_wait(device: torch.device) -> bool:
    """Whether the host may read a tensor of a device: nothing waits for a GPU, nor in a compiled graph."""
    return device.type != "cuda" and not torch.compiler.is_compiling()


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device, from pinned memory of the host, without waiting for the device."""
    pins = torch.device(device).type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available()
    if pins and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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
    first_chunk = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    number = torch.arange(n_tiles // size + len(counts), device=offsets.device)
    bag = torch.searchsorted(first_chunk, number, right=True) - 1
    beyond = bag >= len(counts)
    bag = bag.clamp(max=len(counts) - 1)
    start = offsets[bag] + (number - first_chunk[bag]) * size
    start = start.masked_fill(beyond, n_tiles)
    end = torch.minimum(start + size, offsets[bag + 1]).masked_fill(beyond, n_tiles)
    return torch.stack((bag, start, end), 1).int(), first_chunk.int()
