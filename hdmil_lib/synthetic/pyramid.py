"""Write a whole-slide image: strips of RGB rows become a tiled pyramidal JPEG TIFF.

Rows pass through once. Each level keeps one band of tiles, encodes it when it is full, and hands the band at
half size to the next level, so that memory grows with the width of the slide and not with its height. Tiles
of all levels are encoded in turns, but a TIFF file holds one level after the other: encoded tiles wait in a
temporary file. The result is a BigTIFF with one directory per level, largest first, as OpenSlide expects of a
generic tiled TIFF.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import cv2
import numpy as np
import tifffile

from hdmil_lib.errors import SlideError
from hdmil_lib.storage import write_whole


class _Level:
    """One level of the pyramid: collects a band of rows, encodes it, and feeds the next smaller level."""

    def __init__(self, file: BinaryIO, width: int, height: int, tile: int, quality: int, n_below: int):
        self.file, self.width, self.height, self.tile, self.quality = file, width, height, tile, quality
        self.band = np.empty((tile, width, 3), np.uint8)
        self.filled = 0
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        half = (-(-width // 2), -(-height // 2))
        self.below = _Level(file, *half, tile, quality, n_below - 1) if n_below else None

    def push(self, rows: np.ndarray) -> None:
        while len(rows):
            taken = min(self.tile - self.filled, len(rows))
            self.band[self.filled : self.filled + taken] = rows[:taken]
            self.filled += taken
            rows = rows[taken:]
            if self.filled == self.tile:
                self.flush()

    def flush(self) -> None:
        """Encode the rows collected so far as one band of tiles, padded by repeating the edges."""
        if not self.filled:
            return
        band, self.filled = self.band[: self.filled], 0
        padded = np.pad(
            band, ((0, -len(band) % self.tile), (0, -self.width % self.tile), (0, 0)), mode="edge"
        )
        for x in range(0, padded.shape[1], self.tile):
            bgr = cv2.cvtColor(padded[:, x : x + self.tile], cv2.COLOR_RGB2BGR)
            jpeg = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, self.quality))[1].tobytes()
            self.offsets.append(self.file.tell())
            self.sizes.append(len(jpeg))
            self.file.write(jpeg)
        if self.below:
            height, width = -(-len(band) // 2), self.below.width
            even = padded[: 2 * height, : 2 * width]
            self.below.push(cv2.resize(even, (width, height), interpolation=cv2.INTER_AREA))

    def chain(self) -> list["_Level"]:
        return [self, *(self.below.chain() if self.below else [])]

    def encoded_tiles(self) -> Iterator[bytes]:
        """Read the encoded tiles back, row by row."""
        for offset, size in zip(self.offsets, self.sizes, strict=True):
            self.file.seek(offset)
            yield self.file.read(size)


def _rational(value: float) -> tuple[int, int]:
    """Numerator and denominator of a number, each in 32 bits."""
    largest = min(100_000, max(1, int((2**32 - 1) / (value + 1))))
    return Fraction(value).limit_denominator(largest).as_integer_ratio()


def n_levels(width: int, height: int, tile: int = 256) -> int:
    """Number of levels of a pyramid that halves until the slide fits into one tile, at least four."""
    return max(4, 1 + int(np.ceil(np.log2(max(width, height) / tile))))


def write_pyramid(
    path: str | Path,
    strips: Iterable[np.ndarray],
    width: int,
    height: int,
    mpp: float | tuple[float, float],
    *,
    tile: int = 256,
    quality: int = 85,
) -> Path:
    """Write RGB rows as a slide that OpenSlide opens as `generic-tiff` with its mpp and at least 4 levels.

    The file gets its name only when it is complete. The same rows give the same bytes, however they are cut
    into strips.

    Args:
        path: The `.tif` file to write. Its folder must exist.
        strips: Consecutive blocks of rows from top to bottom, uint8 (h, width, 3) with any h; together
            `height` rows.
        width: Width of level 0 in pixels.
        height: Height of level 0 in pixels.
        mpp: Micrometers per pixel at level 0, one number or (x, y).
        tile: Side of the stored tiles in pixels, a multiple of 16.
        quality: JPEG quality, 1 to 100.

    Returns:
        The path.

    Raises:
        SlideError: The strips are not uint8 RGB rows of `width` pixels, or there are not `height` rows.
    """
    path = Path(path)
    mpp = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    if min(width, height) < 1 or min(mpp) <= 0:
        raise SlideError(f"{path}: a slide needs a positive size and mpp, not {width} x {height} at {mpp}")
    with TemporaryFile(dir=path.parent) as encoded:
        levels = _Level(encoded, width, height, tile, quality, n_levels(width, height, tile) - 1).chain()
        _encode(path, strips, levels)
        write_whole(path, lambda part: _write_levels(part, levels, mpp))
    return path


def _encode(path: Path, strips: Iterable[np.ndarray], levels: list[_Level]) -> None:
    """Pass all strips through the levels; raises a SlideError that names the path where they do not fit."""
    width, height, rows = levels[0].width, levels[0].height, 0
    for strip in strips:
        if strip.dtype != np.uint8 or strip.ndim != 3 or strip.shape[1:] != (width, 3):
            found = f"{strip.dtype} {strip.shape}"
            raise SlideError(f"{path}: the strip at row {rows} is {found}; give uint8 (h, {width}, 3)")
        levels[0].push(strip)
        rows += len(strip)
        if rows > height:
            break
    if rows != height:
        raise SlideError(f"{path}: the strips hold {rows} rows or more, the slide has {height}")
    for level in levels:
        level.flush()


def _write_levels(path: Path, levels: list[_Level], mpp: tuple[float, float]) -> None:
    """Write the encoded levels as the directories of a BigTIFF."""
    with tifffile.TiffWriter(path, bigtiff=True, byteorder="<") as file:
        for level in levels:
            file.write(
                level.encoded_tiles(),
                shape=(level.height, level.width, 3),
                dtype=np.uint8,
                tile=(level.tile, level.tile),
                photometric="ycbcr",
                planarconfig="contig",
                compression="jpeg",
                subfiletype=int(level is not levels[0]),
                resolution=(_rational(10_000 / mpp[0]), _rational(10_000 / mpp[1])),
                resolutionunit="centimeter",
                metadata=None,
                software=False,
            )
