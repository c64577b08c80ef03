"""`tissue_statistics`: the public operator."""

from typing import NamedTuple

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check_bytes, kernel_op, use_triton
from hdmil_lib.kernels.tissue_statistics import reference

MAX_BINS = 128


class TissueStatistics(NamedTuple):
    """Color statistics of tiles.

    Attributes:
        histogram: Number of pixels of each tile in each bin of hue, saturation and value, int64 (N, 3, bins).
        tissue_share: Share of the pixels of each tile whose saturation exceeds the threshold, float32 (N,).
    """

    histogram: Tensor
    tissue_share: Tensor


def tissue_statistics(
    tiles: Tensor, *, bins: int = 16, threshold: int = 15, backend: Backend = "auto"
) -> TissueStatistics:
    """Compute histograms of hue, saturation and value and the share of tissue for each tile.

    Everything is computed in integers, so that all backends give the same counts. Hue, saturation and value
    equal those of OpenCV's `COLOR_RGB2HSV` for bytes: with v = max(r, g, b), c = v - min(r, g, b) and [x] for
    the nearest integer,

    - value v, 0 to 255;
    - saturation (c [255 * 4096 / v] + 2048) >> 12, 0 to 255; 0 for black;
    - hue in steps of two degrees, 0 to 179: (d [30 * 4096 / c] + 2048) >> 12, plus 180 if negative, where d
      is g - b if r = v, else b - r + 2 c if g = v, else r - g + 4 c; 0 for gray.

    Bin i of B counts hues h with h * B // 180 = i and saturations and values x with x * B // 256 = i. Nothing
    is differentiable.

    Args:
        tiles: RGB tiles, uint8 (N, H, W, 3) with H >= 1 and W >= 1.
        bins: Number of bins of each histogram, 1 to 128.
        threshold: Saturation above which a pixel counts as tissue, 0 to 255; the default is the lowest
            threshold that `tissue_mask` chooses.
        backend: "torch" for the reference; "triton" for the kernel; "auto" for the kernel on a GPU and the
            reference elsewhere.

    Returns:
        Histograms and shares of tissue of the tiles.

    Raises:
        ValueError: An argument has a wrong shape, type or value, or the backend cannot run here.
    """
    check_bytes("tiles", tiles, "N H W 3")
    n_pixels = tiles.shape[1] * tiles.shape[2]
    if n_pixels == 0:
        raise ValueError(f"tiles has shape {tuple(tiles.shape)}: tiles without pixels have no statistics")
    if not 1 <= bins <= MAX_BINS:
        raise ValueError(f"bins is {bins}, expected 1 to {MAX_BINS}")
    if not 0 <= threshold <= 255:
        raise ValueError(f"threshold is {threshold}, expected 0 to 255")
    count = _forward if use_triton(backend, tiles) else reference.tissue_statistics
    histogram, tissue = count(tiles, bins, threshold)
    return TissueStatistics(histogram, tissue / n_pixels)


@kernel_op("hdmil::tissue_statistics")
def _forward(tiles: Tensor, bins: int, threshold: int) -> tuple[Tensor, Tensor]:
    from hdmil_lib.kernels.tissue_statistics import gpu

    return gpu.forward(tiles, bins, threshold)


@_forward.register_fake
def _(tiles, bins, threshold):
    counts = tiles.new_empty(len(tiles), 3, bins, dtype=torch.int64)
    return counts, counts.new_empty(len(tiles))
