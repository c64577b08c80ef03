"""Heatmaps as pyramidal OME-TIFF files, which lie on the slide in QuPath and other viewers."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hdmil_lib.errors import BagError
from hdmil_lib.storage import write_whole

if TYPE_CHECKING:
    from hdmil_lib.inference.prediction import Prediction

PIXELS = 16
"""Pixels of the heatmap along the side of a tile, about."""

BLOCK, MIN_SIDE = 256, 512
"""Side of the stored tiles, and the longer side at which the pyramid ends, in pixels."""

SUFFIXES = (".ome.tif", ".ome.tiff")


def write_heatmap(prediction: "Prediction", path: Path) -> None:
    """Write the attention of each class and the kept tiles as channels of a pyramidal OME-TIFF.

    The image covers the whole slide, or its scanned part if it states one (QuPath shows no more), and is
    smaller by a whole factor, so that a viewer places it over the slide without being told where. Each
    channel is uint8. An attention channel has the tile's rank among the tiles that were read, from 1 (lowest)
    to 255, and 0 where nothing was read; "kept" has 255 for tiles that LIPN kept, 128 for tiles that it
    dropped, and 0 where there is no tile.

    Args:
        prediction: Prediction of N tiles.
        path: The file, written whole or not at all.

    Raises:
        BagError: The prediction is from a bag that does not know the size of its slide.
    """
    if prediction.slide_size is None:
        raise BagError(
            f"bag {prediction.slide_id} does not say how large its slide is; predict the slide itself, or "
            "extract it again"
        )
    from tifffile import TiffWriter

    factor = max(1, prediction.tile_size_level0[0] // PIXELS)
    channels = [*(_ranks(column) for column in prediction.attention.T), 255 - 127 * ~prediction.kept]
    values = np.stack(channels).astype(np.uint8)
    names = [*(f"attention for {name}" for name in prediction.classes), "kept"]
    microns = prediction.tile_um / prediction.tile_size_level0[0] * factor
    about: dict[str, Any] = {
        "axes": "CYX",
        "Channel": {"Name": names},
        "PhysicalSizeX": microns,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": prediction.tile_um / prediction.tile_size_level0[1] * factor,
        "PhysicalSizeYUnit": "µm",
    }
    shown = prediction.slide_size if prediction.bounds is None else prediction.bounds[2:]
    width, height = (-(-side // factor) for side in shown)
    n_coarser = max(0, int(np.ceil(np.log2(max(width, height) / MIN_SIDE))))
    options: dict[str, Any] = {"tile": (BLOCK, BLOCK), "compression": "zlib", "photometric": "minisblack"}

    def write(part: Path) -> None:
        with TiffWriter(part, ome=True, bigtiff=True) as file:
            for level in range(n_coarser + 1):
                step = 2**level
                shape = (len(values), -(-height // step), -(-width // step))
                blocks = _blocks(prediction, values, shape, factor * step)
                own = {"metadata": about, "subifds": n_coarser} if level == 0 else {"subfiletype": 1}
                file.write(blocks, shape=shape, dtype=np.uint8, **own, **options)

    write_whole(path, write)


def _ranks(attention: np.ndarray) -> np.ndarray:
    """Ranks of the tiles that were read, 1 to 255; 0 for the others."""
    ranks, read = np.zeros(len(attention), np.uint8), np.isfinite(attention)
    order = attention[read].argsort(kind="stable").argsort(kind="stable")
    ranks[read] = 1 + order * 254 // max(1, read.sum() - 1)
    return ranks


def _blocks(
    prediction: "Prediction", values: np.ndarray, shape: tuple[int, int, int], factor: int
) -> Iterator[np.ndarray]:
    """The stored tiles of a level, one after the other, so that memory holds rows of the grid only.

    A pixel has the value of the tile that covers its center.
    """
    columns = _covering(prediction, 0, shape[2], factor)
    rows = _covering(prediction, 1, shape[1], factor)
    lookup = np.full((prediction.shape[0] + 1, prediction.shape[1] + 1), -1)  # the last ones: outside
    lookup[prediction.rowcol[:, 0], prediction.rowcol[:, 1]] = np.arange(prediction.n_tiles)
    for channel in values:
        colors = np.append(channel, np.uint8(0))  # no tile
        for top in range(0, shape[1], BLOCK):
            for left in range(0, shape[2], BLOCK):
                block = np.zeros((BLOCK, BLOCK), np.uint8)
                tiles = lookup[np.ix_(rows[top : top + BLOCK], columns[left : left + BLOCK])]
                block[: tiles.shape[0], : tiles.shape[1]] = colors[tiles]
                yield block


def _covering(prediction: "Prediction", axis: int, n_pixels: int, factor: int) -> np.ndarray:
    """Row or column of the grid under the center of each pixel, (n_pixels,); -1 outside of the grid.

    Args:
        prediction: The tiles.
        axis: 0 for columns of the grid along x, 1 for rows along y.
        n_pixels: Number of pixels along this axis.
        factor: Level-0 pixels per pixel.
    """
    places, size = prediction.rowcol[:, 1 - axis], prediction.tile_size_level0[axis]
    count = prediction.shape[1 - axis]
    first, last = places.argmin(), places.argmax()
    ends = prediction.coords[[first, last], axis]
    n_between = int(places[last] - places[first])
    pitch = (ends[1] - ends[0]) / n_between if n_between else size  # tiles begin at rounded positions
    origin = ends[0] - places[first] * pitch
    start = 0 if prediction.bounds is None else prediction.bounds[axis]
    found = np.floor(((np.arange(n_pixels) + 0.5) * factor + start - origin) / pitch).astype(int)
    return np.where((found >= 0) & (found < count), found, -1)
