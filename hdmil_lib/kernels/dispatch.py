"""Which code runs an operator, and what it accepts: shared by all operators."""

import importlib.util
from collections.abc import Callable
from functools import wraps
from typing import Literal

import torch
from torch import Tensor

from hdmil_lib.config import interprets_triton

Backend = Literal["auto", "torch", "triton"]


def use_triton(backend: Backend, inputs: Tensor) -> bool:
    """Whether the Triton kernel runs: with "auto" on a GPU, except for float64, else as asked.

    Raises:
        ValueError: There is no such backend, or Triton cannot run here.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}, expected 'auto', 'torch' or 'triton'")
    double = inputs.dtype == torch.float64
    if backend == "torch" or (backend == "auto" and (double or not inputs.is_cuda)):
        return False
    installed = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return installed
    if not installed:
        raise ValueError("backend='triton', but Triton is not installed: use 'auto', or pip install triton")
    if not inputs.is_cuda and not interprets_triton():
        raise ValueError(
            f"backend='triton' needs tensors on a GPU, these are on {inputs.device}: move them there, use "
            "backend='auto', or start Python with TRITON_INTERPRET=1 to run the kernel, slowly, on the CPU"
        )
    if double:
        raise ValueError("backend='triton' computes in float32, these are torch.float64: use backend='auto'")
    return True


def check(**arguments: tuple[Tensor | None, str]) -> dict[str, int]:
    """Hold tensors to their shapes, and to one floating type and one device.

    Args:
        arguments: Name -> (tensor, its axes as letters, such as "N E"); a `None` is skipped. The first one
            sets type and device, and the first to have a letter sets that size.

    Returns:
        Letter -> size.

    Raises:
        ValueError: An argument disagrees; the message names it.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    first = next(iter(arguments))
    model = arguments[first][0]
    for name, (tensor, axes) in arguments.items():
        if tensor is None:
            continue
        check_tensor(name, tensor, axes)
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected a floating type")
        if tensor.dtype != model.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but {first} is {model.dtype}: convert one of them")
        if tensor.device != model.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but {first} is on {model.device}: move one of them"
            )
        letters = axes.split()
        if tensor.ndim != len(letters):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({', '.join(letters)})")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected ({', '.join(letters)}) with "
                    f"{letter} = {sizes[letter]} as in {owner[letter]}"
                )
            owner.setdefault(letter, name)
    return sizes


def check_tensor(name: str, value: object, axes: str) -> None:
    """Raise ValueError where a value is no tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a tensor ({', '.join(axes.split())})")


def check_tiles(tiles: Tensor) -> None:
    """Hold `tiles` to RGB bytes.

    Raises:
        ValueError: It is no uint8 tensor (B, H, W, 3).
    """
    if not isinstance(tiles, Tensor):
        raise ValueError(f"tiles is a {type(tiles).__name__}, expected a uint8 tensor (B, H, W, 3)")
    if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3:
        raise ValueError(f"tiles is {tiles.dtype} {tuple(tiles.shape)}, expected torch.uint8 (B, H, W, 3)")


def same_type(*tensors: Tensor | None) -> list[Tensor | None]:
    """Under autocast, all floating tensors in its type, as `linear` takes them; otherwise as they are."""
    kinds = {t.device.type for t in tensors if isinstance(t, Tensor)}
    if len(kinds) != 1 or not torch.is_autocast_enabled(kind := kinds.pop()):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


def in_float32(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Under autocast, an operator in float32, as PyTorch runs its cumulative sums: rounded decays drift."""

    def widened(value: object) -> object:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    @wraps(operator)
    def run(*values, **named) -> Tensor:
        kinds = {v.device.type for v in (*values, *named.values()) if isinstance(v, Tensor)}
        if len(kinds) != 1 or not torch.is_autocast_enabled(kind := kinds.pop()):
            return operator(*values, **named)
        with torch.autocast(kind, enabled=False):
            return operator(*map(widened, values), **{name: widened(v) for name, v in named.items()})

    return run
