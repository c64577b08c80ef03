"""Which code runs an operator and which arguments it accepts, shared by all operators."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, Literal

import torch
from torch import Tensor

from hdmil_lib.config import interprets_triton

Backend = Literal["auto", "torch", "triton"]

OLDEST = (7, 5)
"""Compute capability of the oldest NVIDIA GPUs for which Triton compiles."""

_automatic: Backend = "auto"


@contextmanager
def default_backend(backend: Backend) -> Iterator[None]:
    """Set what "auto" means for all operators of this process within a `with` block."""
    global _automatic
    before, _automatic = _automatic, backend
    try:
        yield
    finally:
        _automatic = before


def use_triton(backend: Backend, inputs: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether to run the Triton kernel.

    On a GPU "auto" does so unless the inputs are float64, Triton is absent, or the GPU is too old for it, or
    for bfloat16; the last three are said once. `dtype` is the type of the numbers if it is not that of the
    inputs.

    Raises:
        ValueError: The backend does not exist, or Triton cannot run here.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}, expected 'auto', 'torch' or 'triton'")
    if backend == "auto":
        backend = _automatic
    dtype = dtype or inputs.dtype
    double, narrow = dtype == torch.float64, dtype == torch.bfloat16
    if backend == "torch" or (backend == "auto" and (double or not inputs.is_cuda)):
        return False
    if backend == "auto":
        return _runs_kernels(inputs.device, narrow)
    installed = importlib.util.find_spec("triton") is not None
    if not installed:
        raise ValueError("backend='triton', but Triton is not installed: use 'auto', or pip install triton")
    if not inputs.is_cuda and not interprets_triton():
        raise ValueError(
            f"backend='triton' needs tensors on a GPU, these are on {inputs.device}: move them there, use "
            "backend='auto', or start Python with TRITON_INTERPRET=1 to run the kernel, slowly, on the CPU"
        )
    if inputs.is_cuda and (reason := _hindrance(inputs.device, narrow)):
        raise ValueError(f"backend='triton': {reason}; use backend='auto'")
    if double:
        raise ValueError("backend='triton' computes in float32, these are torch.float64: use backend='auto'")
    return True


@lru_cache
def _runs_kernels(gpu: torch.device, bfloat16: bool) -> bool:
    """Whether the kernels run on a GPU; if not, the reason is said, once since the answer is kept."""
    reason = _hindrance(gpu, bfloat16)
    if reason:
        warnings.warn(
            f"{reason}: the operators run as formulas of PyTorch, correct but slower", RuntimeWarning, 3
        )
    return not reason


# As `torch.compiler.assume_constant_result` does, which would import the compiler.
_runs_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _hindrance(gpu: torch.device, bfloat16: bool) -> str:
    """Why the kernels do not run on a GPU, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() or torch.version.hip:
        return ""  # a made-up GPU of a test; or one of AMD, all of which that PyTorch runs on have bfloat16
    capability = torch.cuda.get_device_capability(gpu)
    name = f"{torch.cuda.get_device_name(gpu)} has compute capability {'.'.join(map(str, capability))}"
    if capability < OLDEST:
        return f"{name}, Triton needs {'.'.join(map(str, OLDEST))}"
    return f"{name}, bfloat16 needs 8.0" if bfloat16 and capability < (8, 0) else ""


def kernel_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that launches kernels as a custom operator of PyTorch.

    Triton launches on the current GPU. While the function runs, that is the GPU of its first tensor.
    """

    def register(launch: Callable[..., Any]) -> Any:
        @wraps(launch)
        def on_its_gpu(*arguments: Any) -> Any:
            first = next(a for a in arguments if isinstance(a, Tensor))
            with torch.cuda.device_of(first):
                return launch(*arguments)

        return torch.library.custom_op(name, on_its_gpu, mutates_args=())

    return register


def check(**arguments: tuple[Tensor | None, str]) -> dict[str, int]:
    """Check that tensors have the expected shapes, one floating type and one device.

    Args:
        arguments: For each argument its tensor and its axes, such as "N E" or "D S 2". A number is a fixed
            size; a name stands for the size of the first axis that has it. The first tensor sets the type
            and the device. Arguments that are `None` are skipped.

    Returns:
        The size of each named axis.

    Raises:
        ValueError: An argument has another shape, type or device; the message names it.
    """
    given = {
        name: (check_tensor(name, tensor, axes), axes)
        for name, (tensor, axes) in arguments.items()
        if tensor is not None
    }
    first, (model, _) = next(iter(given.items()))
    sizes: dict[str, int] = {}
    source: dict[str, str] = {}
    for name, (tensor, axes) in given.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected a floating type")
        if tensor.dtype != model.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but {first} is {model.dtype}: convert one of them")
        check_device(name, tensor, model.device, first)
        if tensor.ndim != len(axes.split()):
            raise _wrong_shape(name, tensor, axes)
        for axis, size in zip(axes.split(), tensor.shape, strict=True):
            wanted = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
            if size != wanted:
                reason = "" if axis.isdigit() else f" with {axis} = {wanted} as in {source[axis]}"
                raise _wrong_shape(name, tensor, axes, reason)
            source.setdefault(axis, name)
    return sizes


def check_device(name: str, tensor: Tensor, device: torch.device, other: str) -> None:
    """Raise a ValueError if an argument lies on another device than the other one."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but {other} is on {device}: move one of them")


def check_bytes(name: str, value: object, axes: str) -> None:
    """Check that an argument is a uint8 tensor with these axes, which are written as for `check`.

    Raises:
        ValueError: It is not; the message names the argument.
    """
    tensor = check_tensor(name, value, axes)
    fixed = [(place, int(axis)) for place, axis in enumerate(axes.split()) if axis.isdigit()]
    fits = tensor.ndim == len(axes.split()) and all(tensor.shape[place] == size for place, size in fixed)
    if tensor.dtype != torch.uint8 or not fits:
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected torch.uint8 {_shape(axes)}"
        )


def check_tensor(name: str, value: object, axes: str) -> Tensor:
    """Return an argument that is a tensor, and raise a ValueError if it is not."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a tensor {_shape(axes)}")
    return value


def _wrong_shape(name: str, tensor: Tensor, axes: str, reason: str = "") -> ValueError:
    return ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {_shape(axes)}{reason}")


def _shape(axes: str) -> str:
    """Write axes as a shape, for messages: "N E" becomes "(N, E)"."""
    names = axes.split()
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def same_type(*tensors: Tensor | None) -> list[Any]:
    """Return tensors in the type that autocast gives to `linear`, or unchanged where autocast is off."""
    kind = _autocasting(tensors)
    return list(tensors) if kind is None else [_cast(t, torch.get_autocast_dtype(kind)) for t in tensors]


def in_float32(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate an operator that computes in float32 under autocast, since rounded decays accumulate errors.

    PyTorch treats its cumulative sums in the same way.
    """

    @wraps(operator)
    def run(*values: Any, **named: Any) -> Tensor:
        kind = _autocasting((*values, *named.values()))
        if kind is None:
            return operator(*values, **named)
        with torch.autocast(kind, enabled=False):
            wide = [_cast(value, torch.float32) for value in values]
            return operator(*wide, **{name: _cast(value, torch.float32) for name, value in named.items()})

    return run


def _autocasting(values: tuple[Any, ...]) -> str | None:
    """Return the device type of the tensors among these values if autocast is on for it, else `None`."""
    kinds = {value.device.type for value in values if isinstance(value, Tensor)}
    if len(kinds) != 1 or not torch.amp.is_autocast_available(kind := kinds.pop()):
        return None
    return kind if torch.is_autocast_enabled(kind) else None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return floating tensors in this type and everything else unchanged."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
