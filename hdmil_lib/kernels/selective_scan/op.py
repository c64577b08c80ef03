"""`selective_scan`: the public operator."""

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check, in_float32, kernel_op, use_triton
from hdmil_lib.kernels.selective_scan import reference
from hdmil_lib.kernels.selective_scan.limits import MAX_STATES


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
    """Run the selective state space model of Mamba along the tiles of bags (Gu & Dao 2023, section 3).

    With h_0 = 0, h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t and y_t = <C_t, h_t> + D u_t. Each of D
    channels has S states.

    Args:
        inputs: Inputs u, (B, L, D).
        steps: Step sizes delta, (B, L, D), positive.
        decay: Decay rates A, (D, S), negative.
        input_matrix: Input weights B, (B, L, S).
        output_matrix: Output weights C, (B, L, S).
        skip: Weight D of the direct path, (D,).
        backend: "torch" for the reference; "triton" for the kernel, which takes at most 16 states and
            supports first derivatives only; "auto" for the kernel on a GPU and the reference elsewhere.

    Returns:
        Outputs y, (B, L, D). The states are float32 in the kernel and have the type of the inputs in the
        reference; everything is float32 under autocast.

    Raises:
        ValueError: An argument has a wrong shape, type or device, or the backend cannot run here.
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
        raise ValueError(
            f"decay has {sizes['S']} states, the kernel takes at most {MAX_STATES}: use backend='torch'"
        )
    return _forward(inputs, steps, decay, input_matrix, output_matrix, skip)[0]


@kernel_op("hdmil::selective_scan")
def _forward(
    inputs: Tensor, steps: Tensor, decay: Tensor, input_matrix: Tensor, output_matrix: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the outputs, and the state at the start of every chunk for the backward pass."""
    from hdmil_lib.kernels.selective_scan import gpu

    return gpu.forward(inputs, steps, decay, input_matrix, output_matrix, skip)


@_forward.register_fake
def _(inputs, steps, decay, input_matrix, output_matrix, skip):
    from hdmil_lib.kernels.selective_scan import gpu

    return torch.empty_like(inputs, memory_format=torch.contiguous_format), gpu.new_states(inputs)


@kernel_op("hdmil::selective_scan_backward")
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
    from hdmil_lib.kernels.selective_scan import gpu

    return gpu.backward(grad, starts, inputs, steps, decay, input_matrix, output_matrix, skip)


@_backward.register_fake
def _(grad, starts, *arguments):
    return tuple(torch.empty_like(a, memory_format=torch.contiguous_format) for a in arguments)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad, _):
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_save)
