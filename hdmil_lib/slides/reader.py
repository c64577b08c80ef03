"""An open whole-slide image that knows its scale: fields and thumbnails at any mpp, in the right place."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import openslide
from PIL import Image
from scipy import sparse

from hdmil_lib.errors import SlideError
from hdmil_lib.slides.stored_tiles import StoredTiles

Reader = Literal["auto", "openslide", "stored"]

LEVEL_TOLERANCE = 1.02
"""A level may be this much coarser than the mpp asked for: 0.505 um/px serves 0.5."""

PLAUSIBLE_MPP = (0.02, 50.0)
"""Scales outside are defaults of image writers (72 dpi is 353 um/px), not measurements."""

UM_PER_RESOLUTION_UNIT = {"centimeter": 10_000.0, "inch": 25_400.0}
BLOCK = 2048
"""Side of the blocks that a thumbnail is averaged from, in level pixels: bounds its memory."""


@dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Attributes:
        width: Pixels in x.
        height: Pixels in y.
        downsample_x: Level-0 pixels per pixel of this level, in x.
        downsample_y: The same in y.
    """

    width: int
    height: int
    downsample_x: float
    downsample_y: float


class Slide:
    """A whole-slide image opened with OpenSlide; usable as a context manager and from several threads.

    Where the file is a TIFF with JPEG tiles, pixels come from `StoredTiles`, which decodes each of them once;
    everything else is OpenSlide's.

    Attributes:
        path: The file.
        name: File name without its suffix: the slide's id.
        vendor: OpenSlide's name of the format.
        mpp: Micrometres per level-0 pixel, (x, y).
        dimensions: Level-0 (width, height).
        bounds: The scanned part, (x, y, width, height) in level-0 pixels.
        levels: The pyramid, finest first.
    """

    def __init__(
        self,
        path: str | Path,
        mpp: float | tuple[float, float] | None = None,
        *,
        reader: Reader = "auto",
    ):
        """Open a slide.

        Args:
            path: A file that OpenSlide reads.
            mpp: Micrometres per level-0 pixel, one number or (x, y); overrides what the file says.
            reader: What decodes: "stored" are the file's own tiles, "openslide" reads every format, and
                "auto" takes the first where the file allows it.

        Raises:
            SlideError: The file is missing, is no slide, is damaged, has no scale and `mpp` is None, or has
                no tiles for "stored".
        """
        self.path = Path(path)
        self.name = self.path.stem
        self._slide = _open(self.path)
        properties = self._slide.properties
        self.vendor = properties[openslide.PROPERTY_NAME_VENDOR]
        self.dimensions = self._slide.dimensions
        self.bounds = _bounds(properties, self.dimensions)
        self._downsamples = self._slide.level_downsamples
        self.levels = [
            Level(w, h, _downsample(self.dimensions[0], w), _downsample(self.dimensions[1], h))
            for w, h in self._slide.level_dimensions
        ]
        self._level_for = cache(self._find_level)  # asked for every tile, it was a tenth of reading
        self._stored = (
            None if reader == "openslide" else StoredTiles.open(self.path, self._slide.level_dimensions)
        )
        if reader == "stored" and self._stored is None:
            self.close()
            raise SlideError(f"{self.path}: stores no JPEG tiles that could be read; use reader='auto'")
        try:
            self.mpp = _given_mpp(mpp) if mpp is not None else _stored_mpp(properties)
        except ValueError as error:
            self.close()
            raise SlideError(f"{self.path}: {error}") from None

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Slide({self.name!r}, {self.dimensions[0]} x {self.dimensions[1]} px, mpp {self.mpp})"

    def close(self) -> None:
        """Release the file."""
        self._slide.close()
        if self._stored:
            self._stored.close()

    def read_field(
        self, x: float, y: float, size: tuple[int, int], mpp: float, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read a rectangle at any scale, from the coarsest level that is fine enough.

        A level of exactly this mpp on whole pixels is returned as stored; anything else is resampled
        with an antialiased bicubic filter at its exact sub-pixel position.

        Args:
            x: Left edge in level-0 pixels; may be fractional or outside of the slide.
            y: Top edge in level-0 pixels.
            size: (width, height) of the result in pixels.
            mpp: Scale of the result in um/px, the same in both axes.
            out: Array to write to, uint8 (height, width, 3): for many fields faster than new ones.

        Returns:
            RGB pixels, uint8 (height, width, 3); white where the slide has none.

        Raises:
            SlideError: The file is damaged there.
        """
        index, scale, (left, top) = self._locate(x, y, mpp)
        downsample = self._downsamples[index]
        if all(map(_is_whole, (left, top, left * downsample, top * downsample))) and all(
            abs(s - 1) < 1e-5 for s in scale
        ):
            left, top = round(left), round(top)
            return self._read_level(index, left, top, left + size[0], top + size[1], out)[0]

        right, bottom = left + size[0] * scale[0], top + size[1] * scale[1]
        margin = [math.ceil(2 * max(s, 1.0)) for s in scale]  # the bicubic filter's support
        region, (u, v) = self._read_level(
            index, left - margin[0], top - margin[1], right + margin[0], bottom + margin[1]
        )
        box = (left - u, top - v, right - u, bottom - v)
        return _into(out, Image.fromarray(region).resize(size, Image.Resampling.BICUBIC, box=box))

    def thumbnail(self, mpp: float = 8.0) -> np.ndarray:
        """Picture of the bounds: each pixel is the mean over its `mpp` x `mpp` um square.

        It is averaged block by block, so that a slide without a pyramid needs no more memory than one
        with. The source is a level of this scale, or else the coarsest one at least twice as fine:
        averaging 1.1 pixels into one would blur.

        Args:
            mpp: Scale of the thumbnail in um/px.

        Returns:
            RGB pixels, uint8 (H, W, 3). Pixel (0, 0) starts at the top-left corner of the bounds; the
            last row and column may reach beyond them.

        Raises:
            SlideError: The file is damaged.
        """
        x, y, *extent = self.bounds
        width, height = (math.ceil(e * m / mpp - 1e-6) for e, m in zip(extent, self.mpp, strict=True))
        index, scale, (left, top) = self._locate(x, y, mpp)
        if max(scale) > LEVEL_TOLERANCE:
            index, scale, (left, top) = self._locate(x, y, mpp, min_scale=2.0)
        step_x, step_y = (max(1, int(BLOCK / s)) for s in scale)
        thumbnail = np.empty((height, width, 3), np.uint8)
        for row in range(0, height, step_y):
            for column in range(0, width, step_x):
                block = thumbnail[row : row + step_y, column : column + step_x]
                block[:] = self._area_mean(
                    index, left + column * scale[0], top + row * scale[1], scale, block.shape[:2]
                )
        return thumbnail

    def _locate(self, x: float, y: float, mpp: float, min_scale: float = 1.0):
        """The coarsest level with `min_scale` of its pixels or more in a pixel of `mpp` um.

        Returns:
            Its index, how many of its pixels make one of the result in (x, y), and where (x, y) lies on it.
        """

        index, scale = self._level_for(mpp, min_scale)
        level = self.levels[index]
        return index, scale, (x / level.downsample_x, y / level.downsample_y)

    def _find_level(self, mpp: float, min_scale: float) -> tuple[int, tuple[float, float]]:
        scales = [
            (mpp / (self.mpp[0] * level.downsample_x), mpp / (self.mpp[1] * level.downsample_y))
            for level in self.levels
        ]
        fine_enough = [i for i, scale in enumerate(scales) if min(scale) >= min_scale / LEVEL_TOLERANCE]
        index = max(fine_enough, default=0)
        return index, scales[index]

    def _area_mean(self, index, left, top, scale, shape) -> np.ndarray:
        """Mean color of each cell of a (rows, columns) grid; cells are `scale` level pixels large."""
        rows, columns = shape
        region, (u, v) = self._read_level(index, left, top, left + columns * scale[0], top + rows * scale[1])
        pixels = region.astype(np.float32)
        h, w, _ = pixels.shape
        down = _overlap_weights(top - v, scale[1], rows, h) @ pixels.reshape(h, w * 3)
        down = down.reshape(rows, w, 3).transpose(1, 0, 2).reshape(w, rows * 3)
        mean = _overlap_weights(left - u, scale[0], columns, w) @ down
        return np.rint(mean.reshape(columns, rows, 3).transpose(1, 0, 2))

    def _read_level(
        self,
        index: int,
        left: float,
        top: float,
        right: float,
        bottom: float,
        out: np.ndarray | None = None,
    ):
        """Read at least the given rectangle of a level, in pixels of that level.

        Stored tiles are read from the whole pixel before. OpenSlide takes whole level-0 pixels and divides
        them by its own downsample, which on levels of odd size is not the true one, and it misplaces
        fractions of a pixel left of 0. So it is asked from 0 on, and the position it really reads at is
        returned.

        Returns:
            The region, uint8 (h, w, 3), white outside of the slide, and the (x, y) of its corner.
        """
        if self._stored:
            u, v = math.floor(left), math.floor(top)
            size = (math.ceil(right - u - 1e-6), math.ceil(bottom - v - 1e-6))
            return self._stored.read(index, u, v, *size, out), (u, v)
        downsample = self._downsamples[index]
        pad = [max(0, -math.floor(edge)) for edge in (left, top)]
        start = [math.floor(max(0, math.floor(edge)) * downsample + 1e-6) for edge in (left, top)]
        u, v = (s / downsample - p for s, p in zip(start, pad, strict=True))
        size = (math.ceil(right - u - 1e-6), math.ceil(bottom - v - 1e-6))
        region = Image.new("RGB", size, "white")
        if pad[0] < size[0] and pad[1] < size[1]:
            inside = self._read_region(start, index, (size[0] - pad[0], size[1] - pad[1]))
            region.paste(inside, tuple(pad), mask=inside.getchannel("A"))
        return _into(out, region), (u, v)

    def _read_region(self, start: list[int], index: int, size: tuple[int, int]) -> Image.Image:
        try:
            return self._slide.read_region(tuple(start), index, size)
        except openslide.OpenSlideError as error:
            self._slide = _open(self.path)  # after an error OpenSlide refuses to read anything
            raise SlideError(
                f"{self.path}: cannot read level {index} at level-0 pixel {tuple(start)}: {error}. "
                "The file is damaged or incomplete; copy or download it again."
            ) from error


def _into(out: np.ndarray | None, image: Image.Image) -> np.ndarray:
    """The pixels of an image, in `out` where given."""
    if out is None:
        return np.array(image)
    out[:] = image
    return out


def _open(path: Path) -> openslide.OpenSlide:
    if not path.is_file():
        raise SlideError(f"{path}: no such file. Check the path to the slide.")
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        raise SlideError(
            f"{path}: not a slide that OpenSlide can read, or cut off before its directory. If it opens "
            "elsewhere, convert it to a tiled pyramidal TIFF; otherwise copy or download it again."
        ) from None
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path}: damaged slide: {error}. Copy or download it again.") from error


def _given_mpp(mpp: float | tuple[float, float]) -> tuple[float, float]:
    pair = (float(mpp), float(mpp)) if np.isscalar(mpp) else (float(mpp[0]), float(mpp[1]))
    if not all(math.isfinite(m) and m > 0 for m in pair):
        raise ValueError(f"mpp must be positive micrometres per pixel, got {mpp}.")
    return pair


def _stored_mpp(properties: Mapping[str, str]) -> tuple[float, float]:
    """Scale from the mpp properties, else the TIFF resolution, else the nominal objective (10 / power)."""

    def number(key: str) -> float:
        try:
            return float(properties.get(key, "nan"))
        except ValueError:
            return math.nan

    unit = UM_PER_RESOLUTION_UNIT.get(properties.get("tiff.ResolutionUnit", "").lower(), math.nan)
    power = number(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    nominal = 10.0 / power if power > 0 else math.nan
    candidates = [
        (number(openslide.PROPERTY_NAME_MPP_X), number(openslide.PROPERTY_NAME_MPP_Y)),
        tuple(unit / r if r > 0 else math.nan for r in map(number, ("tiff.XResolution", "tiff.YResolution"))),
        (nominal, nominal),
    ]
    low, high = PLAUSIBLE_MPP
    for pair in candidates:
        if all(low <= m <= high for m in pair):
            return pair
    raise ValueError("the file does not say how large its pixels are; pass mpp= (um per level-0 pixel).")


def _bounds(properties: Mapping[str, str], dimensions: tuple[int, int]) -> tuple[int, int, int, int]:
    keys = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
    if all(key in properties for key in keys):
        return tuple(int(properties[key]) for key in keys)
    return (0, 0, *dimensions)


def _downsample(size: int, level_size: int) -> float:
    """Level-0 pixels per level pixel along one axis, as exactly as the sizes tell.

    Pyramid writers round odd sizes down or up, so size / level_size is off by up to a pixel at the
    far end. A power of two, else a whole number, that rounds to this level size is taken for true.
    """
    ratio = size / level_size
    for guess in (2 ** round(math.log2(ratio)), round(ratio)):
        if level_size in (size // guess, math.ceil(size / guess)):
            return float(guess)
    return ratio


def _overlap_weights(start: float, scale: float, n_cells: int, n_pixels: int) -> sparse.csr_array:
    """Share of each pixel in each cell, (n_cells, n_pixels); cell i is [start + i scale, + scale)."""
    edges = start + scale * np.arange(n_cells + 1)
    pixels = np.arange(n_pixels)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return sparse.csr_array((np.maximum(overlap, 0.0) / scale).astype(np.float32))


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-3
