"""`tissue_statistics`: the public operator."""

from typing import NamedTuple

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check_tiles, use_triton
from hdmil_lib.kernels.tissue_statistics import reference

MAX_BINS = 128


class TissueStatistics(NamedTuple):
    """Colors of tiles.

    Attributes:
        histogram: Pixels of each tile in each bin of hue, saturation and value, int64 (N, 3, bins).
        tissue_share: Share of pixels more saturated than the threshold, float32 (N,).
    """

    histogram: Tensor
    tissue_share: Tensor


def tissue_statistics(
    tiles: Tensor, *, bins: int = 16, threshold: int = 15, backend: Backend = "auto"
) -> TissueStatistics:
    """Histograms of hue, saturation and value, and the share of tissue, of each tile.

    All in integers, so that every backend counts the same, and the same as OpenCV's `COLOR_RGB2HSV` of
    bytes: with v = max(r, g, b), c = v - min(r, g, b) and [x] the nearest integer,

    - value v, 0 to 255;
    - saturation (c [255 * 4096 / v] + 2048) >> 12, 0 to 255; 0 for black;
    - hue in steps of two degrees, 0 to 179: (d [30 * 4096 / c] + 2048) >> 12, plus 180 if negative, where d
      is g - b if r = v, else b - r + 2 c if g = v, else r - g + 4 c; 0 for gray.

    Bin i of B holds the hues h with h * B // 180 = i, the saturations and values x with x * B // 256 = i.

    Args:
        tiles: RGB pixels, uint8 (N, H, W, 3) with H and W of 1 or more.
        bins: Of each histogram, 1 to 128.
        threshold: A pixel is tissue if its saturation is above; the default is the least that
            `tissue_mask` takes. 0 to 255.
        backend: "torch" is the reference; "triton" the kernel; "auto" the kernel on a GPU.

    Returns:
        `TissueStatistics`; nothing is differentiable.

    Raises:
        ValueError: An argument has another shape, type or value, or the backend cannot run.
    """
    check_tiles(tiles)
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


@torch.library.custom_op("hdmil::tissue_statistics", mutates_args=())
def _forward(tiles: Tensor, bins: int, threshold: int) -> tuple[Tensor, Tensor]:
    from hdmil_lib.kernels.tissue_statistics import triton

    return triton.forward(tiles, bins, threshold)


@_forward.register_fake
def _(tiles, bins, threshold):
    counts = tiles.new_empty(len(tiles), 3, bins, dtype=torch.int64)
    return counts, counts.new_empty(len(tiles))
