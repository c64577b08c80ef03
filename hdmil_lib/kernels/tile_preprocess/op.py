"""`tile_preprocess`: the public operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check_bytes, kernel_op, use_triton
from hdmil_lib.kernels.tile_preprocess import reference
from hdmil_lib.kernels.tile_preprocess.stain import StainTransform

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tile_preprocess(
    tiles: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    stain: StainTransform | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Convert RGB bytes to the input of an encoder: (x / 255 - mean) / std with channels first.

    It is computed as x * scale + shift in float32 and rounded once to `dtype`; nothing is differentiable. If
    the stain is normalized, this happens before, in the same pass and without rounding to bytes.

    Args:
        tiles: RGB tiles, uint8 (B, H, W, 3).
        mean: Mean of each channel for pixels in [0, 1], 3 numbers.
        std: Standard deviation of each channel, 3 numbers above 0.
        stain: Stain normalization from `fit_macenko` or `fit_reinhard`; `None` for no normalization.
        dtype: Type of the result: float32, float16 or bfloat16.
        channels_last: Whether the memory format of the result is `torch.channels_last`.
        backend: "torch" for the reference; "triton" for the kernel; "auto" for the kernel on a GPU and the
            reference elsewhere.

    Returns:
        Normalized tiles, (B, 3, H, W).

    Raises:
        ValueError: An argument has a wrong shape, type or value, or the backend cannot run here.
    """
    check_bytes("tiles", tiles, "B H W 3")
    for name, values in (("mean", mean), ("std", std)):
        if isinstance(values, Tensor) or len(values) != 3:
            raise ValueError(f"{name} is {values!r}, expected three numbers: red, green, blue")
    if min(std) <= 0:
        raise ValueError(f"std is {std!r}, expected numbers above 0")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if stain is not None and not isinstance(stain, StainTransform):
        raise ValueError(f"stain is a {type(stain).__name__}, expected one from fit_macenko or fit_reinhard")
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    numbers = [] if stain is None else stain.numbers()
    if use_triton(backend, tiles, dtype):
        return _forward(tiles, scale, shift, numbers, dtype, channels_last)
    return reference.tile_preprocess(tiles, scale, shift, numbers, dtype, channels_last)


@kernel_op("hdmil::tile_preprocess")
def _forward(
    tiles: Tensor,
    scale: Sequence[float],
    shift: Sequence[float],
    stain: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    from hdmil_lib.kernels.tile_preprocess import gpu

    return gpu.forward(tiles, (*scale, *shift, *stain), dtype, channels_last)


@_forward.register_fake
def _(tiles, scale, shift, stain, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch, height, width, _ = tiles.shape
    return torch.empty(batch, 3, height, width, dtype=dtype, device=tiles.device, memory_format=layout)
