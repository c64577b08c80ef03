"""Color statistics of tiles in plain PyTorch."""

import torch
from torch import Tensor


def tissue_statistics(tiles: Tensor, bins: int, threshold: int) -> tuple[Tensor, Tensor]:
    """Return the histograms that `kernels.tissue_statistics` describes, and the tissue pixels, int64 (N,)."""
    hue, saturation, value = hsv(*tiles.flatten(1, 2).unbind(2))
    places = torch.stack([hue * bins // 180, saturation * bins >> 8, value * bins >> 8], 1)
    total = 3 * len(tiles) * bins
    first = torch.arange(0, total, bins, dtype=torch.int32, device=tiles.device).view(-1, 3, 1)
    histogram = torch.bincount((places + first).flatten(), minlength=total)
    return histogram.view(-1, 3, bins), (saturation > threshold).sum(1)


def hsv(red: Tensor, green: Tensor, blue: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue (0 to 179), saturation and value of bytes as OpenCV computes them, int32."""
    value = red.maximum(green).maximum(blue)
    red, green, blue, least = (x.int() for x in (red, green, blue, red.minimum(green).minimum(blue)))
    value = value.int()
    chroma = value - least
    saturation = (chroma * nearest(255 * 4096, value) + 2048) >> 12
    turn = torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    turn = torch.where(value == red, green - blue, turn)
    hue = (turn * nearest(30 * 4096, chroma) + 2048) >> 12
    return torch.where(hue < 0, hue + 180, hue), saturation, value


def nearest(number: int, divisor: Tensor) -> Tensor:
    """Look up the integer nearest to number / divisor for divisors from 0 (which counts as 1) to 255."""
    divisors = torch.arange(256, dtype=torch.int32, device=divisor.device).clamp(min=1)
    quotients = (2 * number + divisors) // (2 * divisors)
    return quotients.index_select(0, divisor.flatten()).view_as(divisor)
