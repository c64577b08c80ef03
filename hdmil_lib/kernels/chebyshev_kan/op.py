"""`chebyshev_kan`: the public operator."""

import torch
from torch import Tensor

from hdmil_lib.kernels.chebyshev_kan import reference
from hdmil_lib.kernels.dispatch import Backend, check, in_float32, kernel_op, use_triton


@in_float32
def chebyshev_kan(inputs: Tensor, coefficients: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Apply a Chebyshev Kolmogorov-Arnold layer (paper: CKA classifier).

    Each pair of an input q and an output o has a learned polynomial, and an output is the sum of its
    polynomials: Phi(x)[o] = sum_q sum_k T_k(tanh x)[q] Omega[q, o, k], where T_0 = 1, T_1(t) = t and
    T_k(t) = 2 t T_{k-1}(t) - T_{k-2}(t) are the Chebyshev polynomials.

    Args:
        inputs: Inputs x, (B, Q), any real numbers.
        coefficients: Coefficients Omega, (Q, O, K + 1), of polynomials of degree K >= 1.
        backend: "torch" for the reference; "triton" for the kernel, which supports first derivatives only;
            "auto" for the kernel on a GPU and the reference elsewhere.

    Returns:
        Outputs Phi(x), (B, O); float32 under autocast, since polynomials of high degree amplify rounding.

    Raises:
        ValueError: An argument has a wrong shape, type or device, or the backend cannot run here.
    """
    check(inputs=(inputs, "B Q"), coefficients=(coefficients, "Q O K+1"))
    if coefficients.shape[2] < 2:
        raise ValueError(f"coefficients has shape {tuple(coefficients.shape)}: the degree must be 1 or more")
    if use_triton(backend, inputs):
        return _forward(inputs, coefficients)
    return reference.chebyshev_kan(inputs, coefficients)


@kernel_op("hdmil::chebyshev_kan")
def _forward(inputs: Tensor, coefficients: Tensor) -> Tensor:
    from hdmil_lib.kernels.chebyshev_kan import gpu

    return gpu.forward(inputs, coefficients)


@_forward.register_fake
def _(inputs: Tensor, coefficients: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], coefficients.shape[1])


@kernel_op("hdmil::chebyshev_kan_backward")
def _backward(grad: Tensor, inputs: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    from hdmil_lib.kernels.chebyshev_kan import gpu

    return gpu.backward(grad, inputs, coefficients)


@_backward.register_fake
def _(grad: Tensor, inputs: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs), torch.empty_like(coefficients)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_forward.register_autograd(lambda ctx, grad: _backward(grad, *ctx.saved_tensors), setup_context=_save)
