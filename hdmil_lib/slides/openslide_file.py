"""Slides as OpenSlide reads them: its properties, its pixels, and its errors in words of ours."""

import math
from pathlib import Path

import openslide
from PIL import Image

from hdmil_lib.errors import SlideError

UNSUPPORTED = ("not supported", "unsupported", "not configured", "cannot handle")
"""Words in OpenSlide's errors about files that need not be damaged."""

CONVERT = (
    "Convert it to OME-TIFF or a tiled pyramidal TIFF with the program of the scanner or, if it reads it, "
    "with `bfconvert` of Bio-Formats."
)


class OpenSlideFile:
    """A file that OpenSlide has opened; usable from several threads.

    Attributes:
        path: Path of the file.
        properties: OpenSlide's properties.
        vendor: OpenSlide's name of the format.
        sizes: (width, height) of the levels in pixels, finest first.
        downsamples: OpenSlide's own level-0 pixels per pixel of each level, with which it computes positions.
    """

    def __init__(self, path: Path):
        """Open a file.

        Raises:
            SlideError: OpenSlide does not know the format, or the file is damaged.
        """
        self.path = path
        self._slide = _open(path)
        self.properties = dict(self._slide.properties)
        self.vendor = self.properties[openslide.PROPERTY_NAME_VENDOR]
        self.sizes = self._slide.level_dimensions
        self.downsamples = self._slide.level_downsamples

    def close(self) -> None:
        """Close the file."""
        self._slide.close()

    def read(
        self, level: int, left: float, top: float, right: float, bottom: float
    ) -> tuple[Image.Image, tuple[float, float]]:
        """Read at least the given rectangle of a level, in pixels of that level.

        OpenSlide takes a position in whole level-0 pixels and divides it by its own downsample, which is not
        the true one on levels of odd size; and it misplaces fractions of a pixel left of 0. It is therefore
        called with positions from 0 on only, and the position at which it really reads is returned.

        Returns:
            The region in RGB, white where the slide has no pixels, and the (x, y) of its corner.

        Raises:
            SlideError: The file is damaged in this rectangle.
        """
        downsample = self.downsamples[level]
        pad = (max(0, -math.floor(left)), max(0, -math.floor(top)))
        start = [math.floor(max(0, math.floor(edge)) * downsample + 1e-6) for edge in (left, top)]
        u, v = (s / downsample - p for s, p in zip(start, pad, strict=True))
        size = (math.ceil(right - u - 1e-6), math.ceil(bottom - v - 1e-6))
        region = Image.new("RGB", size, "white")
        if pad[0] < size[0] and pad[1] < size[1]:
            inside = self._read_region((start[0], start[1]), level, (size[0] - pad[0], size[1] - pad[1]))
            region.paste(inside, pad, mask=inside.getchannel("A"))
        return region, (u, v)

    def _read_region(self, start: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        try:
            return self._slide.read_region(start, level, size)
        except openslide.OpenSlideError as error:
            self._slide = _open(self.path)  # after an error OpenSlide fails on every read
            raise SlideError(
                f"{self.path}: cannot read level {level} at level-0 pixel {start}: {error}. "
                "The file is damaged or incomplete; copy or download it again."
            ) from error


def detect(path: Path) -> str | None:
    """OpenSlide's name of the format of a file; None if it knows none."""
    try:
        return openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:
        return None


def _open(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        raise SlideError(
            f"{path}: not a slide that OpenSlide can read, or cut off before its directory. If it opens in "
            "another program, convert it to a tiled pyramidal TIFF; otherwise copy or download it again."
        ) from None
    except openslide.OpenSlideError as error:
        if any(word in str(error).lower() for word in UNSUPPORTED):
            raise SlideError(
                f"{path}: not supported by OpenSlide ({error}), though it may be whole. {CONVERT}"
            ) from error
        raise SlideError(
            f"{path}: OpenSlide cannot read it: {error}. It is damaged, or of a variant that OpenSlide does "
            "not know: copy or download it again, or convert it to a tiled pyramidal TIFF."
        ) from error
