"""Small slides with known content, for all tests that read slides."""

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import openslide
import pyvips
import tifffile

INK = np.array([130, 60, 150], np.uint8)
"""A saturated purple, which `tissue_mask` takes for tissue."""


def write_slide(
    path: Path,
    pixels: np.ndarray,
    mpp: tuple[float, float] | None = (0.5, 0.5),
    *,
    pyramid: bool = True,
    tile: int = 64,
    compression: str = "packbits",
) -> Path:
    """Write RGB pixels (h, w, 3) as a tiled TIFF, by default without loss.

    An `mpp` of None stores 72 dpi, as image editors do. The levels halve, with sizes rounded down, until one
    fits into a TIFF tile.
    """
    per_mm = [72 / 25.4] * 2 if mpp is None else [1000 / m for m in mpp]
    image = pyvips.Image.new_from_array(pixels).copy(xres=per_mm[0], yres=per_mm[1], interpretation="srgb")
    image.tiffsave(
        str(path), tile=True, tile_width=tile, tile_height=tile, pyramid=pyramid, compression=compression
    )
    return path


def damage_tile(path: Path, target: Path, indices: Sequence[int]) -> Path:
    """Copy a slide with these stored tiles of its finest level overwritten."""
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        for index in indices:
            offset, size = page.dataoffsets[index], page.databytecounts[index]
            data[offset : offset + size] = b"\xa5" * size
    target.write_bytes(data)
    return target


def paint_disc(
    size: tuple[int, int], mpp: tuple[float, float], center_um: tuple[float, float], radius_um: float
) -> np.ndarray:
    """A disc of ink with a soft edge on white, uint8 (h, w, 3); `center_um` from the top-left corner."""
    x = (np.arange(size[0]) + 0.5) * mpp[0] - center_um[0]
    y = (np.arange(size[1]) + 0.5) * mpp[1] - center_um[1]
    distance = np.hypot(x[None, :], y[:, None])
    cover = np.clip((radius_um - distance) / max(mpp) + 0.5, 0, 1)[..., None]
    return np.rint(255 - cover * (255 - INK.astype(float))).astype(np.uint8)


def find_ink(pixels: np.ndarray, mpp: float) -> tuple[float, float]:
    """Center of mass (x, y) of everything that is not white, in um from the top-left corner."""
    weight = 255.0 - pixels[..., 1]
    x = (np.arange(pixels.shape[1]) + 0.5) * mpp
    y = (np.arange(pixels.shape[0]) + 0.5) * mpp
    return (weight.sum(0) @ x) / weight.sum(), (weight.sum(1) @ y) / weight.sum()


@contextmanager
def slide_properties(changes: dict[str, str | None]):
    """Let OpenSlide report these properties within the block; None removes a property."""
    stored = openslide.OpenSlide.properties.fget

    def changed(slide):
        properties = dict(stored(slide)) | changes
        return {key: value for key, value in properties.items() if value is not None}

    with mock.patch.object(openslide.OpenSlide, "properties", property(changed)):
        yield


def bounds_properties(x: int, y: int, width: int, height: int) -> dict[str, str]:
    """The properties in which scanners store the scanned part of a slide."""
    return {
        "openslide.bounds-x": str(x),
        "openslide.bounds-y": str(y),
        "openslide.bounds-width": str(width),
        "openslide.bounds-height": str(height),
    }
