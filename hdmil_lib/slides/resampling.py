"""Pillow's bicubic filter and its averages for many pictures at once, on any device."""

import math

import numpy as np
import torch
from torch import Tensor

from hdmil_lib.devices import pinned

SUPPORT = 2.0
"""The filter reaches this far, in pixels of the coarser of the two pictures."""

AT_A_TIME = 64
"""Number of pictures that are resampled at a time; it limits the memory, of which each takes about 3 MB."""


def margin(scale: float) -> int:
    """Number of pixels around a rectangle from which the filter takes colors."""
    return math.ceil(SUPPORT * max(scale, 1.0))


def resample(
    pictures: Tensor, corners: np.ndarray, scale: tuple[float, float], size: tuple[int, int]
) -> Tensor:
    """Resample a rectangle of each picture with an antialiased bicubic filter.

    As Pillow's `resize(size, BICUBIC, box=...)`: first along the rows, then along the columns, rounded to
    whole levels after each. Pillow computes with whole numbers and this with float32, so that a level in
    between may be rounded to the other side.

    Args:
        pictures: RGB pixels, uint8 (B, h, w, 3).
        corners: (x, y) of the top-left corners of the rectangles in pixels of the pictures, float (B, 2), on
            the host.
        scale: Pixels of a picture per pixel of the result in (x, y), the same for all pictures.
        size: (width, height) of the result in pixels.

    Returns:
        RGB pixels, uint8 (B, height, width, 3).
    """
    parts, places = [], to_device(corners.astype(np.float32), pictures.device)
    for some, corner in zip(pictures.split(AT_A_TIME), places.split(AT_A_TIME), strict=True):
        batch, height, width, _ = some.shape
        across = _weights(corner[:, 0], scale[0], size[0], width)
        down = _weights(corner[:, 1], scale[1], size[1], height)
        planes = some.permute(0, 3, 1, 2).reshape(batch, 3 * height, width).float()
        rows = _rounded(planes @ across.mT).view(batch, 3, height, size[0])
        parts.append(_rounded(down[:, None] @ rows).permute(0, 2, 3, 1).to(torch.uint8).contiguous())
    return torch.cat(parts)


def average(pictures: Tensor, factor: int) -> Tensor:
    """Mean of each square of `factor` x `factor` pixels, rounded half up, as Pillow's `reduce`.

    Args:
        pictures: RGB pixels, uint8 (B, h, w, 3), whose sides are multiples of the factor.
        factor: Side of the squares in pixels.

    Returns:
        RGB pixels, uint8 (B, h / factor, w / factor, 3).
    """
    if factor == 1:
        return pictures
    batch, height, width, _ = pictures.shape
    squares = pictures.view(batch, height // factor, factor, width // factor, factor, 3)
    sums = squares.sum((2, 4), dtype=torch.int32)
    return ((sums + factor**2 // 2) // factor**2).to(torch.uint8)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array of the host to a device, without waiting for a GPU; on a CPU it is no copy."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else pinned(tensor).to(device, non_blocking=True)


def _weights(start: Tensor, scale: float, n_out: int, n_in: int) -> Tensor:
    """Weight of each pixel of a picture in each pixel of the result along one axis, (B, n_out, n_in)."""
    step = torch.arange(n_out, device=start.device) + 0.5
    centers = start[:, None, None] + scale * step[:, None]
    pixels = torch.arange(n_in, device=start.device) + 0.5
    x = ((pixels - centers) / max(scale, 1.0)).abs()
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, inner, torch.where(x < SUPPORT, outer, 0.0))
    return weights / weights.sum(2, keepdim=True)


def _rounded(values: Tensor) -> Tensor:
    return (values + 0.5).floor_().clamp_(0, 255)
