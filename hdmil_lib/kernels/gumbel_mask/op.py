"""`gumbel_mask`: the public operator."""

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check, kernel_op, use_triton
from hdmil_lib.kernels.gumbel_mask import reference
from hdmil_lib.kernels.random import Seed, key


def gumbel_mask(
    logits: Tensor,
    *,
    seed: Seed | None = None,
    temperature: float = 1.0,
    threshold: float = 0.5,
    backend: Backend = "auto",
) -> Tensor:
    """Select tiles for each branch with a straight-through Gumbel-sigmoid (paper: DMIN, student branch).

    A^ = sigmoid((A + G1 - G2) / tau) and M = B(A^ > gamma) - stopgrad(A^) + A^. The mask consists of exact
    zeros and ones; its gradient is that of the sigmoid. The noise is a function of the seed and the position
    (`kernels.random.logistic`), so that one seed gives the same mask on every device.

    Args:
        logits: Attention logits A, (N, C) with N >= 1.
        seed: Seed of the noise G1 - G2; `None` for no noise (in evaluation, and for LIPN).
        temperature: Temperature tau of the sigmoid, more than 0.
        threshold: Threshold gamma, between 0 and 1.
        backend: "torch" for the reference; "triton" for the kernel, which supports first derivatives only;
            "auto" for the kernel on a GPU and the reference elsewhere.

    Returns:
        Mask M, (N, C).

    Raises:
        ValueError: An argument has a wrong shape, type or value, or the backend cannot run here.
    """
    if type(logits) is not Tensor or logits.ndim != 2 or not logits.is_floating_point():
        check(logits=(logits, "N C"))  # says what is wrong; each time it would take as long as an operator
    check_selection(len(logits), temperature, threshold)
    if use_triton(backend, logits):
        return _forward(logits, None if seed is None else key(seed, logits.device), temperature, threshold)
    return reference.gumbel_mask(logits, seed, temperature, threshold)


def check_selection(n_tiles: int, temperature: float, threshold: float) -> None:
    """Raise a ValueError unless tiles can be selected with these values."""
    if n_tiles == 0:
        raise ValueError("there are no tiles: a mask needs at least one tile")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}, expected a number between 0 and 1")


@kernel_op("hdmil::gumbel_mask")
def _forward(logits: Tensor, key: Tensor | None, temperature: float, threshold: float) -> Tensor:
    from hdmil_lib.kernels.gumbel_mask import gpu

    return gpu.forward(logits, key, temperature, threshold)


@_forward.register_fake
def _(logits, key, temperature, threshold):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@kernel_op("hdmil::gumbel_mask_backward")
def _backward(grad_mask: Tensor, logits: Tensor, key: Tensor | None, temperature: float) -> Tensor:
    from hdmil_lib.kernels.gumbel_mask import gpu

    return gpu.backward(grad_mask, logits, key, temperature)


@_backward.register_fake
def _(grad_mask, logits, key, temperature):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    logits, key, ctx.temperature, _threshold = inputs
    ctx.save_for_backward(logits, key)


def _differentiate(ctx, grad_mask):
    return _backward(grad_mask, *ctx.saved_tensors, ctx.temperature), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
