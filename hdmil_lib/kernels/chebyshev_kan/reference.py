"""The Chebyshev Kolmogorov-Arnold layer by the recurrence of the polynomials (paper: CKA classifier)."""

import torch
from torch import Tensor


def chebyshev_kan(inputs: Tensor, coefficients: Tensor) -> Tensor:
    """Sum of learned polynomials, one for each pair of input and output.

    Phi(x)[o] = sum_k sum_q T_k(x)[q] Omega[q, o, k], with x = tanh(inputs) in (-1, 1), T_0 = 1, T_1 = x
    and T_k = 2 x T_{k-1} - T_{k-2}. Each degree is added as it comes; the basis is never stored whole.

    Args:
        inputs: (B, Q), any real number.
        coefficients: Omega, (Q, O, K + 1) with K >= 1.

    Returns:
        (B, O).
    """
    x = inputs.tanh()
    constant, linear, *higher = coefficients.permute(2, 0, 1).contiguous().unbind(0)
    outputs = torch.addmm(constant.sum(0), x, linear)
    previous, current = 1.0, x
    for weight in higher:
        previous, current = current, 2 * x * current - previous
        outputs = torch.addmm(outputs, current, weight)
    return outputs
