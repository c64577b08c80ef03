"""Normalization of tiles on a GPU: bytes are read once, and the result is written once.

Memory bandwidth is the limit, so no intermediate result is written. In `pixel_kernel`, a program processes a
block of pixels of one tile: it holds their three channels in registers, mixes them if the stain is
normalized, and writes three planes or interleaved values. Without a stain and with channels last, values keep
their order and are independent: `value_kernel` reads and writes them in sequence, in wide accesses.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.tile_preprocess.reference import LARGEST_LOG
from hdmil_lib.kernels.variants import Variant

PIXELS = 512  # pixels per program of `pixel_kernel`
VALUES = 2048  # values per program of `value_kernel`
NUMBERS = ("*fp32", "*fp16", "*bf16")
SPACE, MATRIX, OFFSET, BACK = (tl.constexpr(n) for n in (6, 15, 24, 27))  # positions in `numbers`
LIMIT = tl.constexpr(LARGEST_LOG)


@triton.jit
def product(matrix, x, y, z):
    """Return the products of a (3, 3) matrix in memory with one vector (x, y, z) per pixel."""
    return (
        tl.load(matrix) * x + tl.load(matrix + 1) * y + tl.load(matrix + 2) * z,
        tl.load(matrix + 3) * x + tl.load(matrix + 4) * y + tl.load(matrix + 5) * z,
        tl.load(matrix + 6) * x + tl.load(matrix + 7) * y + tl.load(matrix + 8) * z,
    )


@triton.jit
def normalize_stain(numbers, red, green, blue):
    """Return 256 S^-1 exp(M log(S (x + 1) / 256) + t) - 1, clipped to [0, 255]."""
    x, y, z = product(numbers + SPACE, (red + 1) / 256, (green + 1) / 256, (blue + 1) / 256)
    x, y, z = product(numbers + MATRIX, tl.log(x), tl.log(y), tl.log(z))
    x = tl.exp(tl.minimum(x + tl.load(numbers + OFFSET), LIMIT))
    y = tl.exp(tl.minimum(y + tl.load(numbers + OFFSET + 1), LIMIT))
    z = tl.exp(tl.minimum(z + tl.load(numbers + OFFSET + 2), LIMIT))
    x, y, z = product(numbers + BACK, x, y, z)
    red = tl.minimum(tl.maximum(256 * x - 1, 0.0), 255.0)
    green = tl.minimum(tl.maximum(256 * y - 1, 0.0), 255.0)
    return red, green, tl.minimum(tl.maximum(256 * z - 1, 0.0), 255.0)


@triton.jit(do_not_specialize=["n_blocks"])
def pixel_kernel(
    tiles, numbers, out, n_pixels, n_blocks,
    STAIN: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Write x[c] * scale[c] + shift[c] for a block of pixels of one tile, which has `n_pixels` pixels."""
    tile = tl.program_id(0) // n_blocks
    p = (tl.program_id(0) % n_blocks) * PIXELS + tl.arange(0, PIXELS)
    inside = p < n_pixels
    start = tile.to(tl.int64) * n_pixels * 3
    pixel = tiles + start + 3 * p
    red = tl.load(pixel, inside, 0).to(tl.float32)
    green = tl.load(pixel + 1, inside, 0).to(tl.float32)
    blue = tl.load(pixel + 2, inside, 0).to(tl.float32)
    if STAIN:
        red, green, blue = normalize_stain(numbers, red, green, blue)
    red = red * tl.load(numbers) + tl.load(numbers + 3)
    green = green * tl.load(numbers + 1) + tl.load(numbers + 4)
    blue = blue * tl.load(numbers + 2) + tl.load(numbers + 5)
    if CHANNELS_LAST:
        place, step = out + start + 3 * p, 1
    else:
        place, step = out + start + p, n_pixels
    tl.store(place, red, inside)
    tl.store(place + step, green, inside)
    tl.store(place + 2 * step, blue, inside)


@triton.jit
def value_kernel(tiles, numbers, out, n_values, VALUES: tl.constexpr):
    """Write x[i] * scale[i mod 3] + shift[i mod 3] for a block of values."""
    start = tl.program_id(0).to(tl.int64) * VALUES
    i = tl.arange(0, VALUES)
    channel = (i + (start % 3).to(tl.int32)) % 3
    inside = i < n_values - start
    value = tl.load(tiles + start + i, inside, 0).to(tl.float32)
    red, green, blue = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    scale = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
    red, green, blue = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5)
    shift = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
    tl.store(out + start + i, value * scale + shift, inside)


@lru_cache(maxsize=32)
def on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the constants of a call on the device, to which each set is copied once."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def forward(tiles: Tensor, numbers: tuple[float, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Launch a kernel and return the tiles (B, 3, H, W).

    Args:
        tiles: RGB tiles, uint8 (B, H, W, 3).
        numbers: Scale and shift of the channels, 6 numbers, followed by those of a stain, if any.
        dtype: Type of the result.
        channels_last: Whether the memory format of the result is `torch.channels_last`.
    """
    batch, height, width, _ = tiles.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(batch, 3, height, width, dtype=dtype, device=tiles.device, memory_format=layout)
    constants, stain = on_device(numbers, tiles.device), len(numbers) > 6
    n_pixels = height * width
    n_blocks = triton.cdiv(n_pixels, PIXELS)
    if out.numel() == 0:
        return out
    if channels_last and not stain:
        grid = (triton.cdiv(out.numel(), VALUES),)
        value_kernel[grid](tiles.contiguous(), constants, out, out.numel(), VALUES)
    else:
        grid = (batch * n_blocks,)
        pixel_kernel[grid](
            tiles.contiguous(), constants, out, n_pixels, n_blocks, stain, channels_last, PIXELS
        )
    return out


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` can launch: results of all types, sizes divisible by 16 and others."""
    for number in NUMBERS:
        types = {"out": number, "tiles": "*u8", "numbers": "*fp32"}
        for size in ("i32:16", "i32", "i64:16", "i64"):  # 11,000 tiles have more than 2^31 values
            yield Variant(value_kernel, types | {"n_values": size}, {"VALUES": VALUES})
        for size in ("i32:16", "i32"):
            for stain, channels_last in ((False, False), (True, False), (True, True)):
                constants = {"STAIN": stain, "CHANNELS_LAST": channels_last, "PIXELS": PIXELS}
                yield Variant(pixel_kernel, types | {"n_pixels": size, "n_blocks": "i32"}, constants)
