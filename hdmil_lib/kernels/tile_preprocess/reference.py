"""Normalization of tiles in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_LOG = 10.0  # limit of logarithms: e^10 is far beyond white and still finite in every product


def tile_preprocess(
    tiles: Tensor,
    scale: Sequence[float],
    shift: Sequence[float],
    stain: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Return the tiles (B, 3, H, W) that `kernels.tile_preprocess` describes, as x * scale + shift.

    `stain` is empty or holds the numbers of a `StainTransform`. The computation is in float32, or in float64
    if `dtype` is float64.
    """
    number = torch.promote_types(dtype, torch.float32)
    factor, term = (torch.tensor(v, dtype=number, device=tiles.device) for v in (scale, shift))
    batch, height, width, _ = tiles.shape
    if channels_last and not stain:  # rows of W x 3 values, which are faster than pixels of 3
        values = tiles.reshape(batch, height, width * 3).to(number)
        values = values * factor.repeat(width) + term.repeat(width)
        return values.to(dtype).view(batch, height, width, 3).permute(0, 3, 1, 2)
    planes = tiles.permute(0, 3, 1, 2).contiguous().to(number)
    if stain:
        planes = normalize_stain(planes.flatten(2), stain).view_as(planes)
    planes = (planes * factor[:, None, None] + term[:, None, None]).to(dtype)
    return planes.contiguous(memory_format=torch.channels_last) if channels_last else planes


def normalize_stain(pixels: Tensor, stain: Sequence[float]) -> Tensor:
    """Return 256 S^-1 exp(M log(S (x + 1) / 256) + t) - 1, clipped to [0, 255], for pixels x, (B, 3, P)."""
    space, matrix, offset, back = pixels.new_tensor(stain).split((9, 9, 3, 9))
    mixes = list(stain[:9]) != [1, 0, 0, 0, 1, 0, 0, 0, 1]
    light = (pixels + 1) / 256
    if mixes:
        light = space.view(3, 3) @ light
    light = (matrix.view(3, 3) @ light.log() + offset[:, None]).clamp(max=LARGEST_LOG).exp()
    if mixes:
        light = back.view(3, 3) @ light
    return (256 * light - 1).clamp(0, 255)
