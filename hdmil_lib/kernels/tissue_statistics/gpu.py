"""Color histograms on a GPU: every byte is read once, and no plane of hue or saturation is written.

A program counts a share of the pixels of one tile, block after block: hue, saturation and value stay in
registers, `tl.histogram` counts them, and the counts of the share are written to memory, where a final `sum`
adds the shares. Few large tiles are split into many shares each; if there are many tiles, each is one share.
All counts are integers, so that they do not depend on the order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.variants import Variant

PIXELS = 1024  # pixels per block
PROGRAMS = 1024  # number of programs that keeps a large GPU busy; tiles are split into shares to reach it
BINS = (16, 32, 64, 128)  # sizes of a histogram in registers, to which the number of bins is rounded up


@triton.jit
def nearest(number, divisor):
    """Return the integer nearest to number / divisor for divisors from 0 (which counts as 1) to 255.

    Float32 is enough: every quotient of this module differs from a half-integer by more than 8 rounding
    errors, while a GPU divides with an error of at most 2.
    """
    return (number / tl.maximum(divisor, 1).to(tl.float32) + 0.5).to(tl.int32)


@triton.jit
def hsv(red, green, blue):
    """Return hue (0 to 179), saturation and value as OpenCV computes them."""
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    saturation = (chroma * nearest(255 * 4096, value) + 2048) >> 12
    turn = tl.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    turn = tl.where(value == red, green - blue, turn)
    hue = (turn * nearest(30 * 4096, chroma) + 2048) >> 12
    return tl.where(hue < 0, hue + 180, hue), saturation, value


@triton.jit(do_not_specialize=["bins", "threshold"])
def count_kernel(
    tiles, histograms, tissue, n_pixels, share, bins, threshold, PIXELS: tl.constexpr, BINS: tl.constexpr
):
    """Write histograms[n, s, channel, bin] and tissue[n, s] of share s of tile n."""
    n, s = tl.program_id(0), tl.program_id(1)
    pixels = tiles + n.to(tl.int64) * n_pixels * 3
    hues = tl.zeros((BINS,), tl.int32)
    saturations = tl.zeros((BINS,), tl.int32)
    values = tl.zeros((BINS,), tl.int32)
    stained = tl.zeros((PIXELS,), tl.int32)
    for start in range(s * share, tl.minimum((s + 1) * share, n_pixels), PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = p < n_pixels
        red = tl.load(pixels + 3 * p, inside, 0).to(tl.int32)
        green = tl.load(pixels + 3 * p + 1, inside, 0).to(tl.int32)
        blue = tl.load(pixels + 3 * p + 2, inside, 0).to(tl.int32)
        hue, saturation, value = hsv(red, green, blue)
        hues += tl.histogram(hue * bins // 180, BINS, inside)
        saturations += tl.histogram(saturation * bins >> 8, BINS, inside)
        values += tl.histogram(value * bins >> 8, BINS, inside)
        stained += (saturation > threshold).to(tl.int32)  # beyond the share, pixels are black: saturation 0
    part = n.to(tl.int64) * tl.num_programs(1) + s
    i = tl.arange(0, BINS)
    out = histograms + part * 3 * bins + i
    tl.store(out, hues, i < bins)
    tl.store(out + bins, saturations, i < bins)
    tl.store(out + 2 * bins, values, i < bins)
    tl.store(tissue + part, tl.sum(stained))


def forward(tiles: Tensor, bins: int, threshold: int) -> tuple[Tensor, Tensor]:
    """Launch `count_kernel` and return the sums of its partial counts, int64 (N, 3, bins) and (N,)."""
    n_tiles, height, width, _ = tiles.shape
    n_pixels = height * width
    n_shares = min(triton.cdiv(n_pixels, PIXELS), max(1, PROGRAMS // max(n_tiles, 1)))
    share = PIXELS * triton.cdiv(triton.cdiv(n_pixels, n_shares), PIXELS)
    n_shares = triton.cdiv(n_pixels, share)
    histograms = torch.empty(n_tiles, n_shares, 3, bins, dtype=torch.int32, device=tiles.device)
    tissue = torch.empty(n_tiles, n_shares, dtype=torch.int32, device=tiles.device)
    if n_tiles:
        padded = max(BINS[0], triton.next_power_of_2(bins))
        count_kernel[(n_tiles, n_shares)](
            tiles.contiguous(), histograms, tissue, n_pixels, share, bins, threshold, PIXELS, padded
        )
    return histograms.sum(1), tissue.sum(1)


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` can launch: numbers of pixels divisible by 16 and others."""
    for padded in BINS:
        for size in ("i32:16", "i32"):
            types = {"tiles": "*u8", "histograms": "*i32", "tissue": "*i32", "n_pixels": size}
            types |= {"share": "i32:16", "bins": "i32", "threshold": "i32"}
            yield Variant(count_kernel, types, {"PIXELS": PIXELS, "BINS": padded})
