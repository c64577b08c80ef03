"""Comparison of a kernel in float32 with its reference in float64, forward and backward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Tolerances relative to the largest output and the norm of a gradient: about 100 rounding errors of float32.
FORWARD, BACKWARD = 1e-5, 2e-5


def assert_kernel_equals_reference(
    operator: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    forward: float = FORWARD,
    backward: float = BACKWARD,
    **options,
) -> None:
    """Compare the outputs, and the gradients of all floating tensors for random gradients of the outputs."""
    kernel, kernel_grads = _run(operator, tensors, backend="triton", **options)
    exact, exact_grads = _run(operator, [_double(t) for t in tensors], backend="torch", **options)
    for ours, wanted in zip(kernel, exact, strict=True):
        assert ours.shape == wanted.shape
        assert (ours - wanted).abs().amax() <= forward * wanted.abs().amax().clamp(min=1.0)
    # A gradient that cancels to zero (softmax of one tile) is judged relative to a tenth of the largest one.
    floor = max((g.norm() for g in exact_grads), default=0.0) / 10 + 1e-6
    for ours, wanted in zip(kernel_grads, exact_grads, strict=True):
        assert (ours - wanted).norm() <= backward * wanted.norm().clamp(min=floor)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _run(operator, tensors, **options) -> tuple[list[Tensor], list[Tensor]]:
    tensors = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    outputs = operator(*tensors, **options)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        total = total + (output * weight).sum()
    leaves = [t for t in tensors if t.requires_grad]
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)
    return [o.detach().double() for o in outputs], [g.double() for g in grads]
