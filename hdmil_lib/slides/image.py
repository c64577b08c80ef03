"""What a reader other than OpenSlide tells of a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Pixels(Protocol):
    """The pixels of an image with levels, read by whole pixels of a level."""

    def read(
        self, level: int, left: int, top: int, width: int, height: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read a rectangle of a level as uint8 (height, width, 3), white where the image has no pixels."""

    def close(self) -> None:
        """Free files and memory."""


@dataclass(frozen=True)
class Image:
    """An open image file.

    Attributes:
        vendor: Name of the format.
        properties: What the file says of its scale, by OpenSlide's names where it has them.
        sizes: (width, height) of the levels in pixels, finest first.
        pixels: What reads them.
    """

    vendor: str
    properties: Mapping[str, str]
    sizes: Sequence[tuple[int, int]]
    pixels: Pixels
