"""How a thumbnail is divided into parts, and pixels among its cells."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

GAP = 16
"""Side in pixels of the smallest part that is left out where a slide is damaged: a tile of the grid."""


def quarters(row: int, column: int, rows: int, columns: int) -> list[tuple[int, int, int, int]]:
    """Up to four parts (row, column, rows, columns) of a part, which begin at multiples of GAP of it."""
    high, wide = (-(-side // (2 * GAP)) * GAP for side in (rows, columns))
    return [
        (row + r, column + c, min(high, rows - r), min(wide, columns - c))
        for r in range(0, rows, high)
        for c in range(0, columns, wide)
    ]


def overlap_weights(start: float, scale: float, n_cells: int, n_pixels: int) -> "csr_array":
    """Share of each pixel in each cell, (n_cells, n_pixels).

    Cell i is the interval [start + i * scale, start + (i + 1) * scale), pixel j the interval [j, j + 1).
    """
    from scipy.sparse import csr_array  # a tenth of a second that opening a slide need not wait for

    edges = start + scale * np.arange(n_cells + 1)
    pixels = np.arange(n_pixels)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return csr_array((np.maximum(overlap, 0.0) / scale).astype(np.float32))
