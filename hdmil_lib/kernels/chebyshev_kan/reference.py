"""The Chebyshev Kolmogorov-Arnold layer in plain PyTorch, by the recurrence of the polynomials."""

import torch
from torch import Tensor


def chebyshev_kan(inputs: Tensor, coefficients: Tensor) -> Tensor:
    """Return the outputs (B, O) that `kernels.chebyshev_kan` describes.

    Each degree is added as soon as it is computed, so the whole basis is never stored. A single output needs
    no basis at all: Clenshaw's recurrence sums from the highest degree down, element by element.
    """
    x = inputs.tanh()
    if coefficients.shape[1] == 1:
        return _clenshaw(x, coefficients)
    constant, linear, *higher = coefficients.permute(2, 0, 1).contiguous().unbind(0)
    outputs = torch.addmm(constant.sum(0), x, linear)
    previous: Tensor | float = 1.0
    twice, current = 2 * x, x
    for weight in higher:
        previous, current = current, twice * current - previous
        outputs = torch.addmm(outputs, current, weight)
    return outputs


def _clenshaw(x: Tensor, coefficients: Tensor) -> Tensor:
    """Return the output (B, 1) as Omega_0 + x B_1 - B_2, where B_k = Omega_k + 2 x B_{k+1} - B_{k+2}."""
    constant, *weights = coefficients.squeeze(1).T.contiguous().unbind(0)
    above: Tensor | float = 0.0
    twice, current = 2 * x, weights.pop()
    for weight in reversed(weights):
        above, current = current, torch.addcmul(weight - above, twice, current)
    return torch.addcmul(constant - above, x, current).sum(1, keepdim=True)
