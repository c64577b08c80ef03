"""Open whole-slide images and read fields and thumbnails from them at any scale in micrometers per pixel."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from hdmil_lib.errors import SlideError
from hdmil_lib.slides.dicom_frames import open_frames
from hdmil_lib.slides.formats import check_file, open_file
from hdmil_lib.slides.image import Pixels
from hdmil_lib.slides.openslide_file import OpenSlideFile
from hdmil_lib.slides.scale import scale_of
from hdmil_lib.slides.stored_tiles import VENDORS, StoredTiles
from hdmil_lib.slides.thumbnails import GAP, overlap_weights, quarters

if TYPE_CHECKING:
    from torch import Tensor

    from hdmil_lib.slides.device_tiles import TilesOnDevice
    from hdmil_lib.slides.gpu_decoding import NvImageCodec

Reader = Literal["auto", "openslide", "stored"]

LEVEL_TOLERANCE = 1.02
"""A level may be coarser than the requested mpp by this factor: 0.505 um/px is used for 0.5."""

BLOCK = 2048
"""Side of the blocks from which a thumbnail is averaged, in pixels of the level; it limits the memory."""

MAX_GAPS, MAX_THUMBNAIL = 0.25, 2**30
"""Largest share of a thumbnail that may be unreadable, and largest number of its pixels: 26 cm at 8 um/px."""

COPY_AGAIN = "The file is damaged or incomplete; copy or download it again."


@dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        downsample_x: Level-0 pixels per pixel of this level in x.
        downsample_y: Level-0 pixels per pixel of this level in y.
    """

    width: int
    height: int
    downsample_x: float
    downsample_y: float


class Slide:
    """A whole-slide image; usable as a context manager and from several threads.

    OpenSlide reads the properties of the file and its pixels, except those of TIFF files with JPEG tiles:
    `StoredTiles` reads them and decodes each tile once. What OpenSlide does not open is read by `formats`:
    OME-TIFF, TIFF in strips, PNG and JPEG.

    Attributes:
        path: Path of the file.
        name: Name of the slide, by default that of the file without its suffix.
        vendor: OpenSlide's name of the format, or "ome-tiff", "tiff", "png" or "jpeg".
        mpp: Micrometers per level-0 pixel, (x, y).
        scale: The same with its source, and what is odd about it.
        dimensions: (width, height) of level 0 in pixels.
        bounds: The scanned part, (x, y, width, height) in level-0 pixels.
        levels: Levels of the pyramid, finest first.
    """

    def __init__(
        self,
        path: str | Path,
        mpp: float | tuple[float, float] | None = None,
        *,
        name: str | None = None,
        reader: Reader = "auto",
    ):
        """Open a slide.

        Args:
            path: A file in a format that OpenSlide reads, or an OME-TIFF, TIFF, PNG or JPEG file.
            mpp: Micrometers per level-0 pixel, one number or (x, y), whatever the file says; as `IfUnknown`
                only if the file states no credible scale. None takes the scale in the file.
            name: Name of the slide; that of the file without its suffix by default.
            reader: What reads the pixels: "stored" is `StoredTiles`, "openslide" is OpenSlide alone, and
                "auto" takes what suits the file best.

        Raises:
            SlideError: The file is missing, damaged or not a slide; or it has no scale and `mpp` is None; or
                `reader` is "stored" and the file has no tiles that it can read.
        """
        self.path = Path(path)
        self.name = name or self.path.stem
        check_file(self.path)
        self._file = OpenSlideFile(self.path) if reader == "openslide" else open_file(self.path)
        self.vendor, properties, sizes = self._file.vendor, self._file.properties, self._file.sizes
        self.dimensions = sizes[0]
        self.bounds = _bounds(properties, self.dimensions)
        self.levels = [
            Level(w, h, _downsample(self.dimensions[0], w), _downsample(self.dimensions[1], h))
            for w, h in sizes
        ]
        self._downsamples = (
            self._file.downsamples
            if isinstance(self._file, OpenSlideFile)
            else [level.downsample_x for level in self.levels]
        )
        self._level_for = cache(self._find_level)  # without the cache, a tenth of the time to read a tile
        self._pixels: Pixels | None = None
        if not isinstance(self._file, OpenSlideFile):
            self._pixels = self._file.pixels
        elif reader != "openslide" and self.vendor == "dicom":
            self._pixels = open_frames(self.path, properties, sizes)
        elif reader != "openslide" and self.vendor in VENDORS:
            self._pixels = StoredTiles.open(self.path, sizes)
        self._stored = self._pixels if isinstance(self._pixels, StoredTiles) else None
        self._on_device: dict[NvImageCodec, TilesOnDevice] = {}
        if reader == "stored" and self._stored is None:
            self.close()
            raise SlideError(f"{self.path}: stores no JPEG tiles that can be read; use reader='auto'")
        try:
            self.scale = scale_of(properties, mpp)
        except ValueError as error:
            self.close()
            raise SlideError(f"{self.path}: {error}") from None
        self.mpp = self.scale.mpp

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Slide({self.name!r}, {self.dimensions[0]} x {self.dimensions[1]} px, mpp {self.mpp})"

    def close(self) -> None:
        """Close the file."""
        self._on_device.clear()
        if self._pixels is not None:
            self._pixels.close()
        if isinstance(self._file, OpenSlideFile):
            self._file.close()

    def read_field(
        self, x: float, y: float, size: tuple[int, int], mpp: float, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read a rectangle at any scale, from the coarsest level that is fine enough.

        If a level has exactly this mpp and the rectangle starts on a whole pixel, the stored pixels are
        returned. If a power of two of its pixels makes a pixel of the result along both axes, they are
        averaged. Otherwise they are resampled with an antialiased bicubic filter at the exact sub-pixel
        position.

        Args:
            x: Left edge in level-0 pixels; may be fractional or outside of the slide.
            y: Top edge in level-0 pixels.
            size: (width, height) of the result in pixels.
            mpp: Scale of the result in um/px, the same in both axes.
            out: Array for the result, uint8 (height, width, 3). Using it again for many fields is faster than
                new arrays.

        Returns:
            RGB pixels, uint8 (height, width, 3); white where the slide has no pixels.

        Raises:
            SlideError: The file is damaged in this rectangle.
        """
        index, scale, (left, top) = self._locate(x, y, mpp)
        downsample, factor = self._downsamples[index], _averaged_factor(scale)
        if factor and all(map(_is_whole, (left, top, left * downsample, top * downsample))):
            left, top = round(left), round(top)
            end = left + factor * size[0], top + factor * size[1]
            if factor == 1:
                return self._read_level(index, left, top, *end, out)[0]
            region, _ = self._read_level(index, left, top, *end)
            return _into(out, Image.fromarray(region).reduce(factor))

        right, bottom = left + size[0] * scale[0], top + size[1] * scale[1]
        margin = [math.ceil(2 * max(s, 1.0)) for s in scale]  # the bicubic filter's support
        region, (u, v) = self._read_level(
            index, left - margin[0], top - margin[1], right + margin[0], bottom + margin[1]
        )
        box = (left - u, top - v, right - u, bottom - v)
        return _into(out, Image.fromarray(region).resize(size, Image.Resampling.BICUBIC, box=box))

    def can_decode(self, mpp: float, decoder: "NvImageCodec") -> bool:
        """Whether `read_fields` can read fields of this scale with this decoder.

        Their level must store JPEG tiles, which the decoder gives the same colors as libjpeg-turbo.
        """
        tiles = self._tiles_on(decoder)
        return tiles is not None and tiles.can_read(self._level_for(mpp, 1.0)[0])

    def read_fields(
        self, corners: np.ndarray, size: tuple[int, int], mpp: float, decoder: "NvImageCodec"
    ) -> "tuple[Tensor, dict[int, SlideError]]":
        """Read many rectangles of one size and scale on a GPU; see `read_field`.

        The tiles of the file are decoded there, all those that are missing in one call, and resampled there.

        Args:
            corners: (x, y) of the rectangles in level-0 pixels, (n, 2).
            size: (width, height) of the results in pixels.
            mpp: Scale of the results in um/px.
            decoder: A decoder for which `can_decode` is true.

        Returns:
            RGB pixels on the GPU, uint8 (n, height, width, 3), and the errors of those rectangles in which
            the file is damaged, by their row.
        """
        from hdmil_lib.slides.resampling import average, margin, resample  # imports PyTorch

        tiles = self._tiles_on(decoder)
        assert tiles is not None
        index, scale = self._level_for(mpp, 1.0)
        level = self.levels[index]
        places = corners / np.array([level.downsample_x, level.downsample_y])
        factor, nearest = _averaged_factor(scale), np.rint(places)
        with decoder.running():
            if factor and (np.abs(places - nearest) < 1e-3).all():
                extent = size[0] * factor, size[1] * factor
                regions, errors = tiles.read(index, nearest.astype(np.int64), extent)
                return average(regions, factor), errors
            around = [margin(s) for s in scale]
            starts = np.floor(places).astype(np.int64) - around
            width, height = (
                math.ceil(n * s) + 1 + 2 * a for n, s, a in zip(size, scale, around, strict=True)
            )
            regions, errors = tiles.read(index, starts, (width, height))
            return resample(regions, places - starts, scale, size), errors

    def _tiles_on(self, decoder: "NvImageCodec") -> "TilesOnDevice | None":
        if self._stored is None:
            return None
        if decoder not in self._on_device:
            from hdmil_lib.slides.device_tiles import TilesOnDevice  # imports PyTorch

            self._on_device.setdefault(decoder, TilesOnDevice(self._stored, decoder))
        return self._on_device[decoder]

    def thumbnail(self, mpp: float = 8.0) -> np.ndarray:
        """Make a picture of the bounds; each pixel is the mean over its square of `mpp` x `mpp` um.

        It is averaged block by block, so that a slide without a pyramid needs no more memory than a slide
        with one. The source is a level of this scale, or else the coarsest level that is at least twice as
        fine, since averaging 1.1 pixels into one would blur.

        Args:
            mpp: Scale of the thumbnail in um/px.

        Returns:
            RGB pixels, uint8 (H, W, 3). Pixel (0, 0) starts at the top-left corner of the bounds; the
            last row and column may reach beyond the bounds.

        Raises:
            SlideError: The file is damaged, or says that it is larger than any slide.
        """
        picture, readable = self.thumbnail_with_gaps(mpp)
        if not readable.all():
            raise SlideError(f"{self.path}: {1 - readable.mean():.2%} of it cannot be read. {COPY_AGAIN}")
        return picture

    def thumbnail_with_gaps(self, mpp: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
        """Make the picture of `thumbnail` of a slide that may be damaged in places.

        What cannot be read from a level is read from the finer ones.

        Args:
            mpp: Scale of the thumbnail in um/px.

        Returns:
            The thumbnail, uint8 (H, W, 3), white where no level can be read, and where one can, bool (H, W).

        Raises:
            SlideError: More than a quarter cannot be read, or the file says that it is larger than any slide.
        """
        width, height = (
            math.ceil(e * m / mpp - 1e-6) for e, m in zip(self.bounds[2:], self.mpp, strict=True)
        )
        if width * height > MAX_THUMBNAIL:
            raise SlideError(
                f"{self.path}: says that it has {self.bounds[2]:,} x {self.bounds[3]:,} pixels of "
                f"{self.mpp[0]:g} um, more than any slide. {COPY_AGAIN}"
            )
        index, scale = self._level_for(mpp, 1.0)
        if max(scale) > LEVEL_TOLERANCE:
            index, scale = self._level_for(mpp, 2.0)
        picture, readable = np.full((height, width, 3), 255, np.uint8), np.zeros((height, width), bool)
        step_x, step_y = (max(GAP, int(BLOCK / s) // GAP * GAP) for s in scale)
        parts = [
            (row, column, min(step_y, height - row), min(step_x, width - column))
            for row in range(0, height, step_y)
            for column in range(0, width, step_x)
        ]
        n_lost = 0
        while parts:
            row, column, rows, columns = part = parts.pop()
            error = self._draw(picture, part, index, mpp)
            if error is None:
                readable[row : row + rows, column : column + columns] = True
            elif max(rows, columns) > GAP:
                parts += quarters(*part)
            else:
                n_lost += rows * columns
                if n_lost > MAX_GAPS * readable.size:
                    raise error
        return picture, readable

    def _draw(
        self, picture: np.ndarray, part: tuple[int, int, int, int], index: int, mpp: float
    ) -> SlideError | None:
        """Draw a part (row, column, rows, columns) of a thumbnail; a small one if need be from finer levels.

        Returns:
            None, or the last error if the part cannot be drawn.
        """
        row, column, rows, columns = part
        failed = None
        for level_index in range(index, -1 if max(rows, columns) <= GAP else index - 1, -1):
            level = self.levels[level_index]
            scale = mpp / (self.mpp[0] * level.downsample_x), mpp / (self.mpp[1] * level.downsample_y)
            left = self.bounds[0] / level.downsample_x + column * scale[0]
            top = self.bounds[1] / level.downsample_y + row * scale[1]
            try:
                mean = self._area_mean(level_index, left, top, scale, (rows, columns))
            except SlideError as error:
                failed = error
                continue
            picture[row : row + rows, column : column + columns] = mean
            return None
        return failed

    def read_mean(self, x: float, y: float, size: tuple[int, int], mpp: float) -> np.ndarray:
        """Read a rectangle of which each pixel is the mean over its square, as in `thumbnail`.

        Args:
            x: Left edge in level-0 pixels; may be outside of the slide.
            y: Top edge in level-0 pixels.
            size: (width, height) of the result in pixels.
            mpp: Scale of the result in um/px.

        Returns:
            RGB pixels, uint8 (height, width, 3); white where the slide has no pixels.

        Raises:
            SlideError: The file is damaged in this rectangle.
        """
        index, scale, (left, top) = self._locate_for_mean(x, y, mpp)
        return self._area_mean(index, left, top, scale, (size[1], size[0])).astype(np.uint8)

    def _locate_for_mean(
        self, x: float, y: float, mpp: float
    ) -> tuple[int, tuple[float, float], tuple[float, float]]:
        """As `_locate`: a level of this scale, or else the coarsest that is at least twice as fine."""
        found = self._locate(x, y, mpp)
        return found if max(found[1]) <= LEVEL_TOLERANCE else self._locate(x, y, mpp, min_scale=2.0)

    def _locate(
        self, x: float, y: float, mpp: float, min_scale: float = 1.0
    ) -> tuple[int, tuple[float, float], tuple[float, float]]:
        """Find the coarsest level of which at least `min_scale` pixels make a pixel of `mpp` um.

        Returns:
            Index of the level, number of its pixels per pixel of the result in (x, y), and the position of
            (x, y) on the level.
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

    def _area_mean(
        self, index: int, left: float, top: float, scale: tuple[float, float], shape: tuple[int, int]
    ) -> np.ndarray:
        """Mean color of each cell of a grid.

        Args:
            index: Index of the level.
            left: Left edge of the grid in pixels of the level.
            top: Top edge of the grid in pixels of the level.
            scale: (width, height) of a cell in pixels of the level.
            shape: Number of (rows, columns) of the grid.

        Returns:
            float32 (rows, columns, 3).
        """
        rows, columns = shape
        region, (u, v) = self._read_level(index, left, top, left + columns * scale[0], top + rows * scale[1])
        pixels = region.astype(np.float32)
        h, w, _ = pixels.shape
        down = overlap_weights(top - v, scale[1], rows, h) @ pixels.reshape(h, w * 3)
        down = down.reshape(rows, w, 3).transpose(1, 0, 2).reshape(w, rows * 3)
        mean = overlap_weights(left - u, scale[0], columns, w) @ down
        return np.rint(mean.reshape(columns, rows, 3).transpose(1, 0, 2))

    def _read_level(
        self,
        index: int,
        left: float,
        top: float,
        right: float,
        bottom: float,
        out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[float, float]]:
        """Read at least the given rectangle of a level, in pixels of that level.

        Stored tiles and decoded images are read from the next whole pixel to the left and above, other files
        from where OpenSlide reads; see `OpenSlideFile.read`.

        Returns:
            The region, uint8 (h, w, 3), white outside of the slide, and the (x, y) of its corner.
        """
        if isinstance(self._file, OpenSlideFile) and self._pixels is None:
            region, corner = self._file.read(index, left, top, right, bottom)
            return _into(out, region), corner
        assert self._pixels is not None
        x, y = math.floor(left), math.floor(top)
        size = (math.ceil(right - x - 1e-6), math.ceil(bottom - y - 1e-6))
        return self._pixels.read(index, x, y, *size, out), (x, y)


def _into(out: np.ndarray | None, image: Image.Image) -> np.ndarray:
    """Copy the pixels of an image to `out`, or to a new array if it is None."""
    if out is None:
        return np.array(image)
    out[:] = image
    return out


def _bounds(properties: Mapping[str, str], dimensions: tuple[int, int]) -> tuple[int, int, int, int]:
    keys = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
    if all(key in properties for key in keys):
        x, y, width, height = (int(properties[key]) for key in keys)
        return x, y, width, height
    return (0, 0, *dimensions)


def _downsample(size: int, level_size: int) -> float:
    """Level-0 pixels per pixel of a level along one axis, as exactly as the sizes allow.

    Programs that write pyramids round odd sizes down or up, so that size / level_size is wrong by up to one
    pixel at the far end. A power of two, or else a whole number, that rounds to this level size is taken as
    the true value.
    """
    ratio = size / level_size
    for guess in (2 ** max(0, round(math.log2(ratio))), max(1, round(ratio))):  # levels may be larger
        if level_size in (size // guess, math.ceil(size / guess)):
            return float(guess)
    return ratio


def _averaged_factor(scale: tuple[float, float]) -> int | None:
    """The power of two from 1 upwards that both scales are, up to 1e-5; `None` if they are not."""
    factor = 2 ** max(0, round(math.log2(scale[0])))
    return factor if all(abs(s / factor - 1) < 1e-5 for s in scale) else None


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-3
