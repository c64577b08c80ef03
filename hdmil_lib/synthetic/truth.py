"""Truth masks: which pixels of a synthetic slide are tumor, in a PNG file beside the slide.

They serve teaching and evaluation. Training and inference never read them.
"""

from pathlib import Path

import cv2
import numpy as np

from hdmil_lib.errors import SlideError
from hdmil_lib.slides.tiling import TileGrid
from hdmil_lib.storage import write_whole

TRUTH_MPP = 8.0
TRUTH_PER_TILE = 16
"""Pixels of the mask along one side of a tile of 128 um."""

TUMOR = 255
"""Value of tumor in the mask of a drawn slide."""


def truth_path(slide: str | Path) -> Path:
    """Path of the truth mask of a synthetic slide: `<stem>.truth.png` in the same folder."""
    return Path(slide).with_suffix(".truth.png")


def write_mask(path: Path, image: np.ndarray) -> None:
    """Write a PNG file, whole or not at all."""
    write_whole(path, lambda part: part.write_bytes(cv2.imencode(".png", image)[1].tobytes()))


def tumor_share(truth_png: str | Path, rowcol: np.ndarray, value: int = TUMOR) -> np.ndarray:
    """Share of each tile that is tumor.

    The mask and the grid of 128 um tiles start at the same corner: tile (row, col) covers the 16 x 16 mask
    pixels from (16 row, 16 col). Where a tile reaches beyond the mask, it counts as not tumor.

    Args:
        truth_png: Mask written by `synthesize_slide` or `compose_slide`.
        rowcol: `TileGrid.rowcol`, int (N, 2).
        value: Pixel value to count: 255 for tumor; in a composed slide, 1 + the index of a class.

    Returns:
        float32 (N,), 0 to 1.

    Raises:
        SlideError: The mask cannot be read.
    """
    mask = cv2.imread(str(truth_png), cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise SlideError(f"{truth_png}: no readable truth mask; synthesize the slide again")
    side = TRUTH_PER_TILE
    rowcol = np.asarray(rowcol, dtype=np.int64).reshape(-1, 2)
    rows, cols = np.maximum(-(-np.array(mask.shape) // side), rowcol.max(axis=0, initial=0) + 1)
    padded = np.zeros((rows * side, cols * side), np.float32)
    padded[: mask.shape[0], : mask.shape[1]] = mask == value
    share = padded.reshape(rows, side, cols, side).mean(axis=(1, 3), dtype=np.float32)
    return share[rowcol[:, 0], rowcol[:, 1]]


def tile_labels(slide_path: str | Path, grid: TileGrid, value: int = TUMOR) -> np.ndarray | None:
    """Share of tumor in each tile of a slide, where its truth mask lies beside it.

    Pass this function to `extract` as `tile_labels=` to store the shares in the bags of synthetic slides.

    Args:
        slide_path: The slide file.
        grid: Its N tiles, 128 um wide.
        value: Pixel value to count; see `tumor_share`.

    Returns:
        float32 (N,), 0 to 1; None if the slide has no truth mask.

    Raises:
        SlideError: The mask is there but cannot be read.
    """
    truth = truth_path(slide_path)
    return tumor_share(truth, grid.rowcol, value) if truth.is_file() else None
