"""`s4d_convolution`: the public operator."""

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check, in_float32, kernel_op, use_triton
from hdmil_lib.kernels.s4d_convolution import reference


@in_float32
def s4d_convolution(
    inputs: Tensor,
    log_step: Tensor,
    decay_log: Tensor,
    frequency: Tensor,
    output: Tensor,
    skip: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Run the diagonal state space model S4D along the tiles of bags (Gu et al. 2022).

    Each of D channels has S complex states, each of which stands for a conjugate pair. With A = -a + ib and a
    step dt, h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A u_t and y_t = 2 Re sum_n C_n h_t,n + D u_t. No
    parameter depends on the tile, so y is the convolution of u with the impulse response
    K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l), plus D u.

    Args:
        inputs: Inputs u, (B, L, D).
        log_step: Logarithm of the step dt, (D,).
        decay_log: Logarithm of the decay rate a, (D, S).
        frequency: Frequency b, (D, S).
        output: Output weights C, real and imaginary parts, (D, S, 2).
        skip: Weight D of the direct path, (D,).
        backend: Code that computes K: "torch" for the reference; "triton" for the kernel, which supports
            first derivatives only; "auto" for the kernel on a GPU and the reference elsewhere.

    Returns:
        Outputs y, (B, L, D). They are computed in float32, or in float64 if the inputs are float64, and are
        float32 under autocast.

    Raises:
        ValueError: An argument has a wrong shape, type or device, or the backend cannot run here.
    """
    sizes = check(
        inputs=(inputs, "B L D"),
        log_step=(log_step, "D"),
        decay_log=(decay_log, "D S"),
        frequency=(frequency, "D S"),
        output=(output, "D S 2"),
        skip=(skip, "D"),
    )
    number = torch.promote_types(inputs.dtype, torch.float32)
    parameters = (p.to(number) for p in (log_step, decay_log, frequency, output))
    amplitudes, exponents = reference.coefficients(*parameters)
    respond = _forward if use_triton(backend, inputs) else reference.impulse_response
    response = respond(amplitudes, exponents, sizes["L"])
    return reference.convolve(inputs.to(number), response, skip.to(number)).to(inputs.dtype)


@kernel_op("hdmil::s4d_response")
def _forward(amplitudes: Tensor, exponents: Tensor, length: int) -> Tensor:
    from hdmil_lib.kernels.s4d_convolution import gpu

    return gpu.forward(amplitudes, exponents, length)


@_forward.register_fake
def _(amplitudes, exponents, length):
    return amplitudes.new_empty(len(amplitudes), length, dtype=torch.float32)


@kernel_op("hdmil::s4d_response_backward")
def _backward(grad: Tensor, amplitudes: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    from hdmil_lib.kernels.s4d_convolution import gpu

    return gpu.backward(grad, amplitudes, exponents)


@_backward.register_fake
def _(grad, amplitudes, exponents):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (amplitudes, exponents))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


_forward.register_autograd(
    lambda ctx, grad: (*_backward(grad, *ctx.saved_tensors), None), setup_context=_save
)
