"""`gumbel_mask`: the public operator."""

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check, use_triton
from hdmil_lib.kernels.gumbel_mask import reference
from hdmil_lib.kernels.random import key


def gumbel_mask(
    logits: Tensor,
    *,
    seed: int | None = None,
    temperature: float = 1.0,
    threshold: float = 0.5,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Select tiles for each branch, and measure the share kept by at least one branch.

    A^ = sigmoid((A + G1 - G2) / tau), M = B(A^ > gamma) - stopgrad(A^) + A^, and
    r~ = mean_j [1 - prod_c (1 - M_c^j)] over all C branches (paper: student branch, rate loss). Both are
    exact zeros and ones going forward and carry the gradient of the sigmoid going backward. The noise is
    a function of seed and place (`kernels.random.logistic`), so one seed gives one mask, on any device.

    Args:
        logits: A, (N, C), N >= 1.
        seed: Of the noise G1 - G2; `None` for no noise (evaluation, and LIPN).
        temperature: tau > 0.
        threshold: gamma, in (0, 1).
        backend: "torch" is the reference; "triton" the kernel, whose gradients cannot be differentiated
            again; "auto" the kernel on a GPU.

    Returns:
        mask: M, (N, C).
        keep_ratio: r~, a scalar.

    Raises:
        ValueError: An argument has another shape, type or range, or the backend cannot run.
    """
    if check(logits=(logits, "N C"))["N"] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: a mask needs at least one tile")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}, expected a number between 0 and 1")
    if use_triton(backend, logits):
        return _forward(logits, key(seed or 0), seed is not None, temperature, threshold)
    return reference.gumbel_mask(logits, seed, temperature, threshold)


@torch.library.custom_op("hdmil::gumbel_mask", mutates_args=())
def _forward(
    logits: Tensor, key: int, noisy: bool, temperature: float, threshold: float
) -> tuple[Tensor, Tensor]:
    from hdmil_lib.kernels.gumbel_mask import triton

    return triton.forward(logits, key, noisy, temperature, threshold)


@_forward.register_fake
def _(logits, key, noisy, temperature, threshold):
    return torch.empty_like(logits, memory_format=torch.contiguous_format), logits.new_empty(())


@torch.library.custom_op("hdmil::gumbel_mask_backward", mutates_args=())
def _backward(
    grad_mask: Tensor,
    grad_keep_ratio: Tensor,
    logits: Tensor,
    key: int,
    noisy: bool,
    temperature: float,
    threshold: float,
) -> Tensor:
    from hdmil_lib.kernels.gumbel_mask import triton

    return triton.backward(grad_mask, grad_keep_ratio, logits, key, noisy, temperature, threshold)


@_backward.register_fake
def _(grad_mask, grad_keep_ratio, logits, key, noisy, temperature, threshold):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    logits, *ctx.settings = inputs
    ctx.save_for_backward(logits)


def _differentiate(ctx, grad_mask, grad_keep_ratio):
    return _backward(grad_mask, grad_keep_ratio, *ctx.saved_tensors, *ctx.settings), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
