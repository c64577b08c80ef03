"""The Chebyshev Kolmogorov-Arnold layer by the recurrence of the polynomials (paper: CKA classifier)."""

import torch
from torch import Tensor


def chebyshev_kan(inputs: Tensor, coefficients: Tensor) -> Tensor:
    """Sum of learned polynomials, one for each pair of input and output.

    Phi(x)[o] = sum_k sum_q T_k(x)[q] Omega[q, o, k], with x = tanh(inputs) in (-1, 1), T_0 = 1, T_1 = x
    and T_k = 2 x T_{k-1} - T_{k-2}. Each degree is added as it comes; the basis is never stored whole.
    With one output nothing is shared, and Clenshaw's recurrence sums from the highest degree down,
    element by element, which a compiler makes one loop.

    Args:
        inputs: (B, Q), any real number.
        coefficients: Omega, (Q, O, K + 1) with K >= 1.

    Returns:
        (B, O).
    """
    x = inputs.tanh()
    if coefficients.shape[1] == 1:
        return _clenshaw(x, coefficients)
    constant, linear, *higher = coefficients.permute(2, 0, 1).contiguous().unbind(0)
    outputs = torch.addmm(constant.sum(0), x, linear)
    twice, previous, current = 2 * x, 1.0, x
    for weight in higher:
        previous, current = current, twice * current - previous
        outputs = torch.addmm(outputs, current, weight)
    return outputs


def _clenshaw(x: Tensor, coefficients: Tensor) -> Tensor:
    """B_k = Omega_k + 2 x B_{k+1} - B_{k+2}; the sum is Omega_0 + x B_1 - B_2: (B, 1)."""
    constant, *weights = coefficients.squeeze(1).T.contiguous().unbind(0)
    twice, above, current = 2 * x, 0.0, weights.pop()
    for weight in reversed(weights):
        above, current = current, torch.addcmul(weight - above, twice, current)
    return torch.addcmul(constant - above, x, current).sum(1, keepdim=True)
