"""`selective_scan`: the public operator."""

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check, in_float32, use_triton
from hdmil_lib.kernels.selective_scan import reference

MAX_STATES = 16  # that the kernel holds in registers


@in_float32
def selective_scan(
    inputs: Tensor,
    steps: Tensor,
    decay: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """The selective state space model of Mamba (Gu & Dao 2023, section 3), along the tiles of a bag.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t from h_0 = 0, and y_t = <C_t, h_t> + D u_t; each of D
    channels has S states of its own.

    Args:
        inputs: u, (B, L, D).
        steps: delta, (B, L, D); positive, as softplus makes it.
        decay: A, (D, S); negative.
        input_matrix: B, (B, L, S).
        output_matrix: C, (B, L, S).
        skip: D, (D,).
        backend: "torch" is the reference; "triton" the kernel, for up to 16 states, whose gradients cannot
            be differentiated again; "auto" the kernel on a GPU.

    Returns:
        y, (B, L, D). States are float32 in the kernel, of the type of the inputs in the reference,
        and everything is float32 under autocast.

    Raises:
        ValueError: An argument has another shape, type or device, or the backend cannot run.
    """
    sizes = check(
        inputs=(inputs, "B L D"),
        steps=(steps, "B L D"),
        decay=(decay, "D S"),
        input_matrix=(input_matrix, "B L S"),
        output_matrix=(output_matrix, "B L S"),
        skip=(skip, "D"),
    )
    if not use_triton(backend, inputs):
        return reference.selective_scan(inputs, steps, decay, input_matrix, output_matrix, skip)
    if sizes["S"] > MAX_STATES:
        raise ValueError(f"decay has {sizes['S']} states, the kernel holds {MAX_STATES}: use backend='torch'")
    return _forward(inputs, steps, decay, input_matrix, output_matrix, skip)[0]


@torch.library.custom_op("hdmil::selective_scan", mutates_args=())
def _forward(
    inputs: Tensor, steps: Tensor, decay: Tensor, input_matrix: Tensor, output_matrix: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs, and the state at the start of every chunk, which the backward pass needs."""
    from hdmil_lib.kernels.selective_scan import triton

    return triton.forward(inputs, steps, decay, input_matrix, output_matrix, skip)


@_forward.register_fake
def _(inputs, steps, decay, input_matrix, output_matrix, skip):
    from hdmil_lib.kernels.selective_scan import triton

    return torch.empty_like(inputs, memory_format=torch.contiguous_format), triton.new_states(inputs)


@torch.library.custom_op("hdmil::selective_scan_backward", mutates_args=())
def _backward(
    grad: Tensor,
    starts: Tensor,
    inputs: Tensor,
    steps: Tensor,
    decay: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from hdmil_lib.kernels.selective_scan import triton

    return triton.backward(grad, starts, inputs, steps, decay, input_matrix, output_matrix, skip)


@_backward.register_fake
def _(grad, starts, *arguments):
    return tuple(torch.empty_like(a, memory_format=torch.contiguous_format) for a in arguments)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad, _):
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_save)
