"""`chebyshev_kan`: the public operator."""

import torch
from torch import Tensor

from hdmil_lib.kernels.chebyshev_kan import reference
from hdmil_lib.kernels.dispatch import Backend, check, use_triton


def chebyshev_kan(inputs: Tensor, coefficients: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Sum of learned polynomials, one for each pair of input and output (paper: CKA classifier).

    Phi(x)[o] = sum_k sum_q T_k(tanh x)[q] Omega[q, o, k].

    Args:
        inputs: x, (B, Q), any real number.
        coefficients: Omega, (Q, O, K + 1) with K >= 1.
        backend: "torch" is the reference; "triton" the kernel, whose gradients cannot be differentiated
            again; "auto" the kernel on a GPU.

    Returns:
        (B, O).

    Raises:
        ValueError: An argument has another shape, type or device, or the backend cannot run.
    """
    sizes = check(inputs=(inputs, "B Q"), coefficients=(coefficients, "Q O K+1"))
    if sizes["K+1"] < 2:
        raise ValueError(f"coefficients has shape {tuple(coefficients.shape)}: the degree must be 1 or more")
    if use_triton(backend, inputs):
        return _forward(inputs, coefficients)
    return reference.chebyshev_kan(inputs, coefficients)


@torch.library.custom_op("hdmil::chebyshev_kan", mutates_args=())
def _forward(inputs: Tensor, coefficients: Tensor) -> Tensor:
    from hdmil_lib.kernels.chebyshev_kan import triton

    return triton.forward(inputs, coefficients)


@_forward.register_fake
def _(inputs: Tensor, coefficients: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], coefficients.shape[1])


@torch.library.custom_op("hdmil::chebyshev_kan_backward", mutates_args=())
def _backward(grad: Tensor, inputs: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    from hdmil_lib.kernels.chebyshev_kan import triton

    return triton.backward(grad, inputs, coefficients)


@_backward.register_fake
def _(grad: Tensor, inputs: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs), torch.empty_like(coefficients)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_forward.register_autograd(lambda ctx, grad: _backward(grad, *ctx.saved_tensors), setup_context=_save)
