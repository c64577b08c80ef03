"""The stored tiles of a TIFF slide, each decoded once: the fast way to read fields.

A field of a tile grid hardly ever lies on the grid in which the file stores its pixels. OpenSlide decodes all
stored tiles under a field for every call; here a decoded tile stays in memory until its neighbors have been
read, so that the fields of a slide, row by row, decode each stored tile once and skip those that none needs.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import imagecodecs
import numpy as np
import tifffile
from tifffile.tifffile import jpeg_decode_colorspace

from hdmil_lib.errors import SlideError

COMPRESSIONS = (tifffile.COMPRESSION.JPEG, tifffile.COMPRESSION.APERIO_JP2000_RGB)
ROWS_HELD = 2
"""Rows of decoded tiles held: a field lies in two rows, and so do its neighbors on the grid."""

MOST_THREADS = 64
"""Tiles that may be decoded at a time, beside those held."""


@dataclass(frozen=True)
class _StoredLevel:
    """One level: where its tiles lie in the file, and how they are decoded."""

    page: tifffile.TiffPage
    offsets: np.ndarray
    sizes: np.ndarray
    decode: Callable[[bytes], np.ndarray]

    @property
    def columns(self) -> int:
        return -(-self.page.imagewidth // self.page.tilewidth)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a decoded tile."""
        return self.page.tilelength, self.page.tilewidth, 3


class _DecodedTiles:
    """The decoded tiles of a level that were used last, in one block of memory.

    NumPy asks for huge pages for a block of this size. In memory of its own for each tile, a seventh of the
    time of decoding was spent on pages.
    """

    def __init__(self, capacity: int, shape: tuple[int, int, int]):
        self._block = np.empty((capacity, *shape), np.uint8)  # no memory is used before it is written
        self._free = list(range(capacity))
        self._places: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, index: int) -> np.ndarray | None:
        """The pixels of a tile, to be used before the next call of `place`; None where it is not held."""
        if index not in self._places:
            return None
        self._places.move_to_end(index)
        return self._block[self._places[index]]

    def place(self) -> tuple[int, np.ndarray]:
        """A place for a tile to be decoded, at the cost of the one used longest ago, and its memory."""
        place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
        return place, self._block[place]

    def hold(self, index: int, place: int) -> None:
        """From now on the place holds this tile."""
        if index in self._places:  # another thread has decoded it meanwhile
            self._free.append(self._places[index])
        self._places[index] = place

    def give_back(self, place: int) -> None:
        self._free.append(place)


class StoredTiles:
    """Levels of a slide whose TIFF stores RGB tiles as JPEG, or as JPEG 2000 in Aperio's RGB form.

    Usable from several threads. Pixels are those of OpenSlide: both decode with libjpeg-turbo or OpenJPEG.
    """

    def __init__(self, path: Path, levels: Sequence[_StoredLevel]):
        self.path, self._levels = path, levels
        self._file = os.open(path, os.O_RDONLY)
        self._decoded = [
            _DecodedTiles(ROWS_HELD * (level.columns + 1) + MOST_THREADS, level.shape) for level in levels
        ]
        self._lock = Lock()

    @classmethod
    def open(cls, path: Path, sizes: Sequence[tuple[int, int]]) -> "StoredTiles | None":
        """Open a slide with levels of these (width, height); None where the file stores them otherwise."""
        try:
            with tifffile.TiffFile(path) as file:
                pages = {(p.imagewidth, p.imagelength): p for p in reversed(file.pages) if _is_readable(p)}
                if not all(size in pages for size in sizes):
                    return None
                return cls(path, [_level(pages[size]) for size in sizes])
        except (tifffile.TiffFileError, OSError, ValueError, KeyError, IndexError):
            return None

    def close(self) -> None:
        """Release the file and the decoded tiles."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
        self._decoded.clear()

    def read(
        self, level: int, left: int, top: int, width: int, height: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """A rectangle of a level, in pixels of that level; it may reach beyond.

        Returns:
            RGB pixels, uint8 (height, width, 3), in `out` where given; white where the slide has none.

        Raises:
            SlideError: A tile is damaged; its place is named. Other tiles can still be read.
        """
        stored = self._levels[level]
        tile_w, tile_h = stored.page.tilewidth, stored.page.tilelength
        right = min(left + width, stored.page.imagewidth)
        bottom = min(top + height, stored.page.imagelength)
        region = np.empty((height, width, 3), np.uint8) if out is None else out
        if left < 0 or top < 0 or right < left + width or bottom < top + height:
            region.fill(255)
        if right <= left or bottom <= top:
            return region
        for row in range(max(top, 0) // tile_h, -(-bottom // tile_h)):
            for column in range(max(left, 0) // tile_w, -(-right // tile_w)):
                x, y = column * tile_w, row * tile_h
                x0, x1 = max(left, x), min(right, x + tile_w)
                y0, y1 = max(top, y), min(bottom, y + tile_h)
                part = (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))
                to = region[y0 - top : y1 - top, x0 - left : x1 - left]
                self._copy(level, row * stored.columns + column, part, to)
        return region

    def _copy(self, level: int, index: int, part: tuple[slice, slice], to: np.ndarray) -> None:
        """Copy a part of a stored tile, from memory or decoded; white where the file has none.

        Copies are made under the lock, since the memory of a tile that is let go is used again.
        """
        decoded = self._decoded[level]
        with self._lock:
            if (tile := decoded.get(index)) is not None:
                to[:] = tile[part]
                return
            place, memory = decoded.place()
        try:
            is_stored = self._decode(level, index, memory)
        except SlideError:
            with self._lock:
                decoded.give_back(place)
            raise
        with self._lock:
            if is_stored:
                to[:] = memory[part]
                decoded.hold(index, place)
            else:
                to.fill(255)
                decoded.give_back(place)

    def _decode(self, level: int, index: int, memory: np.ndarray) -> bool:
        """Decode a stored tile, uint8 (h, w, 3); False where the file has none."""
        stored = self._levels[level]
        size = int(stored.sizes[index])
        if size == 0:
            return False
        data = os.pread(self._file, size, int(stored.offsets[index]))
        try:
            stored.decode(data, out=memory)
        except Exception as error:  # each codec has errors of its own
            raise self._damaged(level, index, str(error)) from error
        return True

    def _damaged(self, level: int, index: int, why: str) -> SlideError:
        stored = self._levels[level]
        row, column = divmod(index, stored.columns)
        where = f"({column * stored.page.tilewidth}, {row * stored.page.tilelength})"
        return SlideError(
            f"{self.path}: cannot read level {level} at its pixel {where}: {why}. "
            "The file is damaged or incomplete; copy or download it again."
        )


def _is_readable(page: tifffile.TiffPage) -> bool:
    return (
        page.is_tiled
        and page.compression in COMPRESSIONS
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        and page.imagedepth == page.tiledepth == 1
    )


def _level(page: tifffile.TiffPage) -> _StoredLevel:
    """What reading needs of a page, taken from the file while it is open."""
    decode = imagecodecs.jpeg2k_decode
    if page.compression == tifffile.COMPRESSION.JPEG:
        stored, decoded = jpeg_decode_colorspace(
            page.photometric, page.planarconfig, page.extrasamples, page.is_jfif
        )
        decode = partial(
            imagecodecs.jpeg8_decode, tables=page.jpegtables, colorspace=stored, outcolorspace=decoded
        )
    return _StoredLevel(page, np.array(page.dataoffsets), np.array(page.databytecounts), decode)
