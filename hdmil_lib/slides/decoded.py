"""Images without stored tiles: decoded once into a temporary file, then read like any other slide."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from hdmil_lib.errors import SlideError
from hdmil_lib.slides.colors import Converter, eight_bits

MOST_PIXELS = 2**30
"""Largest number of pixels of an image that is decoded as a whole; its temporary file then takes 3 GiB."""


class DecodedImage:
    """An image of one level whose samples lie in an array, in memory or on disk.

    Usable from several threads.

    Attributes:
        size: (width, height) in pixels.
    """

    def __init__(self, samples: np.ndarray, to_rgb: Converter = eight_bits):
        """Take an array of samples, (height, width, samples), and how these become uint8 (h, w, 3)."""
        self._samples, self._to_rgb = samples, to_rgb
        self.size = samples.shape[1], samples.shape[0]

    def read(
        self, level: int, left: int, top: int, width: int, height: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read a rectangle, as `StoredTiles.read` does; `level` is 0."""
        region = np.full((height, width, 3), 255, np.uint8) if out is None else out
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + width, self.size[0]), min(top + height, self.size[1])
        if (x0, y0, x1, y1) != (left, top, left + width, top + height):
            region.fill(255)
        if x1 > x0 and y1 > y0:
            region[y0 - top : y1 - top, x0 - left : x1 - left] = self._to_rgb(self._samples[y0:y1, x0:x1])
        return region

    def close(self) -> None:
        """Free the array; its temporary file goes with it."""
        self._samples = np.empty((0, 0, 3), np.uint8)


def check_size(path: Path, width: int, height: int, most: int = MOST_PIXELS) -> None:
    """Refuse an image that is too large to be decoded as a whole, before memory is taken.

    Raises:
        SlideError: It has more than `most` pixels, or none.
    """
    if width < 1 or height < 1:
        raise SlideError(f"{path}: its header says {width} x {height} pixels; it is damaged, copy it again.")
    if width * height > most:
        raise SlideError(
            f"{path}: {width} x {height} pixels in one piece, more than the {most:,} that are decoded as a "
            "whole. Convert it to a tiled pyramidal TIFF, for example with `vips tiffsave --tile --pyramid`."
        )


def decode_once(path: Path, width: int, height: int, rows: Iterable[np.ndarray]) -> DecodedImage:
    """Write the rows of an image into a temporary file that is deleted when the image is closed.

    Args:
        path: The image, for messages.
        width: Width in pixels.
        height: Height in pixels.
        rows: RGB pixels of some rows at a time, uint8 (h, width, 3), from the top on.

    Raises:
        SlideError: There is no space for the file.
    """
    try:
        with tempfile.TemporaryFile() as file:
            for part in rows:
                file.write(np.ascontiguousarray(part).data)
            file.flush()
            return DecodedImage(np.memmap(file, np.uint8, mode="r", shape=(height, width, 3)))
    except OSError as error:
        raise SlideError(
            f"{path}: cannot be decoded into {tempfile.gettempdir()}: {error.strerror or error}. It takes "
            f"{width * height * 3 / 1e9:.1f} GB there; make space, or set TMPDIR to another folder."
        ) from error
