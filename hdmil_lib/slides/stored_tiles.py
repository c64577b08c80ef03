"""Fast reading of TIFF slides: each stored tile is decoded once.

The fields of a tile grid rarely coincide with the tiles that the file stores. OpenSlide decodes all stored
tiles under a field at every call. Here a decoded tile stays in memory until its neighbors have been read: if
the fields of a slide are read row by row, each stored tile is decoded once, and tiles under no field never.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Protocol, TypeGuard

import imagecodecs
import numpy as np
import tifffile
from tifffile.tifffile import jpeg_decode_colorspace

from hdmil_lib.errors import HDMILError, SlideError
from hdmil_lib.slides.codestreams import checked, checked_jpeg, jpeg2000_header
from hdmil_lib.system_errors import refusal

logging.getLogger("tifffile").addHandler(logging.NullHandler())
"""What tifffile logs of damaged files is not for users, who get our errors."""

VENDORS = ("aperio", "generic-tiff", "philips")
"""Formats, by OpenSlide's names, whose levels are the tiles of one directory side by side. Others shift
tiles, let them overlap or put several directories together."""

COMPRESSIONS = (tifffile.COMPRESSION.JPEG, tifffile.COMPRESSION.APERIO_JP2000_RGB)
ROWS_HELD = 2
"""Rows of decoded tiles kept in memory: a field lies in two rows, and so do its neighbors on the grid."""

MOST_THREADS = 64
"""Number of tiles that may be decoded at the same time, in addition to those kept."""

MAX_SIDE = 4096
"""Largest side of a stored tile in pixels."""


class Layout(Protocol):
    """Sizes of an image and of its tiles, in pixels."""

    @property
    def imagewidth(self) -> int:
        """Width of the image."""

    @property
    def imagelength(self) -> int:
        """Height of the image."""

    @property
    def tilewidth(self) -> int:
        """Width of a tile."""

    @property
    def tilelength(self) -> int:
        """Height of a tile."""

    @property
    def jpegtables(self) -> bytes | None:
        """Tables that all JPEG tiles share."""


@dataclass(frozen=True)
class StoredLevel:
    """One level of a file.

    Attributes:
        page: How its tiles lie on it: its directory in the TIFF file, or the frames of a DICOM file.
        offsets: Position of each tile in the file, in bytes.
        sizes: Number of bytes of each tile; 0 if the file has no such tile.
        decode: Function that decodes the bytes of a tile on the CPU, of each of its planes.
        is_jpeg: Whether the tiles are JPEG, not JPEG 2000.
        stores_rgb: Whether the JPEG tiles store red, green and blue, as Aperio's do, though nothing in them
            says so.
        planes: Number of parts in which a tile is stored, 1, or one per color.
        path: File of the level, if each level has its own.
    """

    page: Layout
    offsets: np.ndarray
    sizes: np.ndarray
    decode: Callable[..., np.ndarray]
    is_jpeg: bool
    stores_rgb: bool
    planes: int = 1
    path: Path | None = None

    @property
    def columns(self) -> int:
        """Number of columns of tiles."""
        return -(-self.page.imagewidth // self.page.tilewidth)

    @property
    def rows(self) -> int:
        """Number of rows of tiles."""
        return -(-self.page.imagelength // self.page.tilelength)

    @property
    def n_tiles(self) -> int:
        """Number of tiles."""
        return self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a decoded tile."""
        return self.page.tilelength, self.page.tilewidth, 3

    @property
    def n_held(self) -> int:
        """Number of decoded tiles that are kept in memory."""
        return ROWS_HELD * (self.columns + 1) + MOST_THREADS

    @property
    def is_sound(self) -> bool:
        """Whether the directory says where all tiles are, and their size is one that scanners use."""
        return (
            all(1 <= side <= MAX_SIDE for side in self.shape[:2])
            and len(self.offsets) == len(self.sizes) == self.planes * self.n_tiles
            and self.sizes.dtype.kind == self.offsets.dtype.kind == "i"
            and bool((self.sizes >= 0).all() and (self.offsets >= 0).all())
        )

    def under(self, left: int, top: int, width: int, height: int) -> list[tuple[int, int]]:
        """(row, column) of the tiles under a rectangle of the level, which may reach beyond the level."""
        right, bottom = (min(left + width, self.page.imagewidth), min(top + height, self.page.imagelength))
        if right <= left or bottom <= top:
            return []
        rows = range(max(top, 0) // self.page.tilelength, -(-bottom // self.page.tilelength))
        columns = range(max(left, 0) // self.page.tilewidth, -(-right // self.page.tilewidth))
        return [(row, column) for row in rows for column in columns]


class _DecodedTiles:
    """The most recently used decoded tiles of a level, in one block of memory.

    NumPy requests huge pages for a block of this size. With separate memory for each tile, page faults took a
    seventh of the decoding time.
    """

    def __init__(self, capacity: int, shape: tuple[int, int, int]):
        self._block = np.empty((capacity, *shape), np.uint8)  # takes up memory only where it is written
        self._free = list(range(capacity))
        self._places: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, index: int) -> np.ndarray | None:
        """Pixels of a tile, valid until the next call of `place`; None if the tile is not kept."""
        if index not in self._places:
            return None
        self._places.move_to_end(index)
        return self._block[self._places[index]]

    def place(self) -> tuple[int, np.ndarray]:
        """Get a place and its memory for a tile to decode; this may drop the least recently used tile."""
        place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
        return place, self._block[place]

    def hold(self, index: int, place: int) -> None:
        """Record that the place now holds this tile."""
        if index in self._places:  # another thread decoded it in the meantime
            self._free.append(self._places[index])
        self._places[index] = place

    def give_back(self, place: int) -> None:
        """Return a place that was not filled."""
        self._free.append(place)


class StoredTiles:
    """Levels of a slide that stores tiles, which are decoded one by one.

    `open` reads those of TIFF slides with RGB tiles in JPEG, or in JPEG 2000 in Aperio's RGB variant;
    `dicom_frames` and `tiff_image` make others.

    Usable from several threads. The pixels equal those of OpenSlide, which uses the same decoders,
    libjpeg-turbo and OpenJPEG. `gpu_decoding.TilesOnDevice` decodes the same tiles on a GPU.

    Attributes:
        path: Path of the file.
        levels: Layout of the levels in the file, finest first.
    """

    def __init__(self, path: Path, levels: Sequence[StoredLevel]):
        self.path, self.levels = path, levels
        self._decoded = [_DecodedTiles(level.n_held, level.shape) for level in levels]
        paths = {level.path or path for level in levels}
        self._files = {path: os.open(path, os.O_RDONLY) for path in paths}
        self._lock = Lock()

    @classmethod
    def open(cls, path: Path, sizes: Sequence[tuple[int, int]]) -> "StoredTiles | None":
        """Open a slide whose levels have these (width, height).

        None if they are stored in another way, or if this is not sure: a tile is missing, which scanners
        mean in ways of their own, several directories have the size of a level, so that OpenSlide may mean
        another one, or the directory of the file is odd. OpenSlide then reads it.
        """
        try:
            with tifffile.TiffFile(path) as file:
                pages = [_only_page(file, size) for size in sizes]
                if len(set(sizes)) < len(sizes) or not all(map(_is_known, pages)):
                    return None
                levels = [jpeg_level(page, colors_by_tag=True) for page in pages]
            return cls(path, levels) if all(map(_is_whole, levels)) else None
        except Exception:  # a damaged directory can end in any of Python's errors
            return None

    def close(self) -> None:
        """Close the file and free the decoded tiles."""
        for path, file in self._files.items():
            if file >= 0:
                os.close(file)
            self._files[path] = -1
        self._decoded.clear()

    def read(
        self, level: int, left: int, top: int, width: int, height: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read a rectangle of a level, in pixels of that level; it may reach beyond the level.

        Args:
            level: Index of the level.
            left: Left edge.
            top: Top edge.
            width: Width of the rectangle.
            height: Height of the rectangle.
            out: Array for the result, uint8 (height, width, 3); None makes a new one.

        Returns:
            RGB pixels, uint8 (height, width, 3), in `out` if given; white where the slide has no
                pixels.

        Raises:
            SlideError: A tile is damaged; the message names its position. Other tiles can still be read.
        """
        stored = self.levels[level]
        tile_w, tile_h = stored.page.tilewidth, stored.page.tilelength
        right = min(left + width, stored.page.imagewidth)
        bottom = min(top + height, stored.page.imagelength)
        region = np.empty((height, width, 3), np.uint8) if out is None else out
        if left < 0 or top < 0 or right < left + width or bottom < top + height:
            region.fill(255)
        for row, column in stored.under(left, top, width, height):
            x, y = column * tile_w, row * tile_h
            x0, x1 = max(left, x), min(right, x + tile_w)
            y0, y1 = max(top, y), min(bottom, y + tile_h)
            part = (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))
            to = region[y0 - top : y1 - top, x0 - left : x1 - left]
            self._copy(level, row * stored.columns + column, part, to)
        return region

    def compressed(self, level: int, index: int) -> bytes:
        """Bytes of a stored tile as they are in the file; none if the file has no such tile."""
        stored = self.levels[level]
        return os.pread(
            self._files[stored.path or self.path], int(stored.sizes[index]), int(stored.offsets[index])
        )

    def decode(self, level: int, index: int) -> np.ndarray:
        """Decode a stored tile on the CPU, without keeping it.

        Returns:
            RGB pixels, uint8 (h, w, 3); white if the file has no such tile.

        Raises:
            SlideError: The tile is damaged; the message names its position.
            HDMILError: The system refused to read it.
        """
        memory = np.full(self.levels[level].shape, 255, np.uint8)
        self._decode(level, index, memory)
        return memory

    def _copy(self, level: int, index: int, part: tuple[slice, slice], to: np.ndarray) -> None:
        """Copy a part of a stored tile, decoding it if necessary; white if the file has no such tile.

        Copies are made under the lock, since the memory of a dropped tile is used again.
        """
        decoded = self._decoded[level]
        with self._lock:
            if (tile := decoded.get(index)) is not None:
                to[:] = tile[part]
                return
            place, memory = decoded.place()
        try:
            is_stored = self._decode(level, index, memory)
        except HDMILError:
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
        """Decode a stored tile into `memory`, uint8 (h, w, 3); False if the file has no such tile."""
        stored = self.levels[level]
        if int(stored.sizes[index]) == 0:
            return False
        parts = range(index, index + stored.planes * stored.n_tiles, stored.n_tiles)
        try:
            streams = [self.compressed(level, part) for part in parts]
            if any(len(stream) < stored.sizes[part] for stream, part in zip(streams, parts, strict=True)):
                raise ValueError("the file ends within it")
            stored.decode(*streams, out=memory)
        except Exception as error:  # each codec raises its own types of errors
            if isinstance(error, OSError) and error.errno:  # not damage: it must not be left out
                raise HDMILError(f"{self.path}: {refusal(error)}") from error
            raise self._damaged(level, index, str(error)) from error
        return True

    def _damaged(self, level: int, index: int, why: str) -> SlideError:
        stored = self.levels[level]
        row, column = divmod(index, stored.columns)
        where = f"({column * stored.page.tilewidth}, {row * stored.page.tilelength})"
        return SlideError(
            f"{self.path}: cannot read level {level} at its pixel {where}: {why}. "
            "The file is damaged or incomplete; copy or download it again."
        )


def all_pages(file: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """The pages of a file, in their order.

    Raises:
        ValueError: They form a circle, which tifffile would follow for minutes.
    """
    pages: dict[int, tifffile.TiffPage] = {}
    for page in file.pages:
        if page.offset in pages:
            raise ValueError("its directories form a circle")
        pages[page.offset] = page if isinstance(page, tifffile.TiffPage) else page.aspage()
    return list(pages.values())


def is_readable(page: tifffile.TiffPage | tifffile.TiffFrame) -> TypeGuard[tifffile.TiffPage]:
    """Whether a page stores RGB tiles as JPEG or JPEG 2000, so that `jpeg_level` describes it."""
    return (
        isinstance(page, tifffile.TiffPage)
        and page.is_tiled
        and page.compression in COMPRESSIONS
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        and page.imagedepth == page.tiledepth == 1
    )


def _only_page(file: tifffile.TiffFile, size: tuple[int, int]) -> tifffile.TiffPage:
    """The tiled page of this (width, height); raises a ValueError if there is not exactly one."""
    tiled = [page for page in all_pages(file) if page.is_tiled]
    [page] = [page for page in tiled if (page.imagewidth, page.imagelength) == size]
    return page


def _is_known(page: tifffile.TiffPage) -> bool:
    """Whether OpenSlide decodes the tiles of a page as `jpeg_level` does by the tag of their colors."""
    by_tag = page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
    return is_readable(page) and (by_tag or page.compression != tifffile.COMPRESSION.JPEG)


def _is_whole(level: StoredLevel) -> bool:
    """Whether the file has every tile of a level, of a size that scanners use."""
    return level.is_sound and bool((level.sizes > 0).all())


def jpeg_level(page: tifffile.TiffPage, colors_by_tag: bool = False) -> StoredLevel:
    """Collect what is needed to read the tiles of a page, while the file is open.

    Args:
        page: A page for which `is_readable` is true.
        colors_by_tag: Whether the page alone says how JPEG tiles store their colors, as OpenSlide takes it;
            else also the markers in the tiles.
    """
    stored: int | str | None = None
    decode = checked(imagecodecs.jpeg2k_decode, jpeg2000_header)
    is_jpeg = page.compression == tifffile.COMPRESSION.JPEG
    if is_jpeg:
        stored, decoded = jpeg_decode_colorspace(
            page.photometric, page.planarconfig, page.extrasamples, page.is_jfif
        )
        if colors_by_tag:
            stored = tifffile.PHOTOMETRIC(page.photometric).name
        decode = checked_jpeg(
            partial(
                imagecodecs.jpeg8_decode, tables=page.jpegtables, colorspace=stored, outcolorspace=decoded
            )
        )
    stores_rgb = stored in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.RGB.name)
    places = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    return StoredLevel(page, *places, decode, is_jpeg, stores_rgb)
