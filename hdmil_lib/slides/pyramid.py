"""Write a whole-slide image: strips of RGB rows in, a tiled pyramidal JPEG TIFF out.

Rows pass through once. A level keeps one band of tiles, encodes it when it is full and hands the
band at half size to the next level, so memory grows with the width of the slide and not with its
height. The file is a BigTIFF (8-byte offsets): one directory a level, largest first, as OpenSlide
expects of a generic tiled TIFF.
"""

import os
import struct
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from hdmil_lib.errors import SlideError

SHORT, LONG, RATIONAL, LONG8 = 3, 4, 5, 16
FORMATS = {SHORT: "H", LONG: "I", RATIONAL: "I", LONG8: "Q"}


class _Level:
    """One level of the pyramid: collects a band of rows, encodes it, feeds the level below."""

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
        """Encode the rows collected so far as one band of tiles, edges padded by repetition."""
        if not self.filled:
            return
        band, self.filled = self.band[: self.filled], 0
        padded = np.pad(
            band, ((0, -len(band) % self.tile), (0, -self.width % self.tile), (0, 0)), mode="edge"
        )
        for x in range(0, padded.shape[1], self.tile):
            bgr = cv2.cvtColor(padded[:, x : x + self.tile], cv2.COLOR_RGB2BGR)
            jpeg = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, self.quality))[1]
            self.offsets.append(self.file.tell())
            self.sizes.append(len(jpeg))
            self.file.write(jpeg)
        if self.below:
            height, width = -(-len(band) // 2), self.below.width
            even = padded[: 2 * height, : 2 * width]
            self.below.push(cv2.resize(even, (width, height), interpolation=cv2.INTER_AREA))

    def chain(self) -> list["_Level"]:
        return [self, *(self.below.chain() if self.below else [])]


def _rational(value: float) -> tuple[int, int]:
    """Numerator and denominator of a number, each in 32 bits."""
    largest = min(100_000, max(1, int((2**32 - 1) / (value + 1))))
    return Fraction(value).limit_denominator(largest).as_integer_ratio()


def _directory(
    level: _Level, mpp: tuple[float, float], reduced: bool
) -> dict[int, tuple[int, tuple[int, ...]]]:
    """TIFF tags of one level: tag -> (type, values)."""
    x, y = (_rational(10_000 / side) for side in mpp)
    return {
        254: (LONG, (int(reduced),)),
        256: (LONG, (level.width,)),
        257: (LONG, (level.height,)),
        258: (SHORT, (8, 8, 8)),
        259: (SHORT, (7,)),  # compression: JPEG
        262: (SHORT, (6,)),  # photometric: YCbCr
        277: (SHORT, (3,)),
        282: (RATIONAL, x),
        283: (RATIONAL, y),
        284: (SHORT, (1,)),
        296: (SHORT, (3,)),  # resolution unit: centimeter
        322: (LONG, (level.tile,)),
        323: (LONG, (level.tile,)),
        324: (LONG8, tuple(level.offsets)),
        325: (LONG, tuple(level.sizes)),
        530: (SHORT, (2, 2)),  # chroma at half resolution
    }


def _write_directories(file: BinaryIO, directories: list[dict]) -> None:
    """Append the chained BigTIFF directories and point the header at the first one."""
    pointer = 8
    for directory in directories:
        entries, spilled = [], []
        for tag, (kind, values) in directory.items():
            payload = struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)
            if len(payload) > 8:
                spilled.append((len(entries), payload))
            entries.append(
                [tag, kind, len(values) // (2 if kind == RATIONAL else 1), payload.ljust(8, b"\0")]
            )
        for index, payload in spilled:
            entries[index][3] = struct.pack("<Q", file.tell())
            file.write(payload.ljust(-(-len(payload) // 8) * 8, b"\0"))
        start = file.tell()
        file.write(struct.pack("<Q", len(entries)))
        for tag, kind, count, payload in entries:
            file.write(struct.pack("<HHQ", tag, kind, count) + payload)
        file.write(struct.pack("<Q", 0))
        end = file.tell()
        file.seek(pointer)
        file.write(struct.pack("<Q", start))
        file.seek(end)
        pointer = end - 8


def n_levels(width: int, height: int, tile: int = 256) -> int:
    """Levels of a pyramid that halves until the slide fits one tile, and at least four."""
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
    """Write RGB rows as a slide that OpenSlide opens as `generic-tiff` with its mpp and >= 4 levels.

    The file appears under its name only when it is complete. The same rows give the same bytes, however
    they are cut into strips.

    Args:
        path: Target; a `.tif` name. Its folder must exist.
        strips: Consecutive uint8 (h, width, 3) blocks of rows, top to bottom, any h; together `height` rows.
        width: Pixels of level 0.
        height: Pixels of level 0.
        mpp: Micrometers a pixel at level 0, one number or (x, y).
        tile: Side of the stored tiles in pixels, a multiple of 16.
        quality: JPEG quality, 1 to 100.

    Returns:
        The path.

    Raises:
        SlideError: The strips are not uint8 RGB rows of `width` pixels, or not `height` of them.
    """
    path = Path(path)
    mpp = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    if min(width, height) < 1 or min(mpp) <= 0:
        raise SlideError(f"{path}: a slide needs a positive size and mpp, not {width} x {height} at {mpp}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
            levels = _Level(file, width, height, tile, quality, n_levels(width, height, tile) - 1).chain()
            rows = 0
            for strip in strips:
                if strip.dtype != np.uint8 or strip.ndim != 3 or strip.shape[1:] != (width, 3):
                    found = f"{strip.dtype} {strip.shape}"
                    raise SlideError(
                        f"{path}: the strip at row {rows} is {found}; give uint8 (h, {width}, 3)"
                    )
                levels[0].push(strip)
                rows += len(strip)
                if rows > height:
                    break
            if rows != height:
                raise SlideError(f"{path}: the strips hold {rows} rows or more, the slide has {height}")
            for level in levels:
                level.flush()
            _write_directories(file, [_directory(level, mpp, level is not levels[0]) for level in levels])
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
