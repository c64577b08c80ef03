"""The Chebyshev Kolmogorov-Arnold layer (paper: CKA classifier)."""

import torch
from torch import Tensor, nn

from hdmil_lib.kernels import chebyshev_kan


class ChebyshevKAN(nn.Module):
    """A layer with a learned polynomial of degree K on every connection; see `kernels.chebyshev_kan`.

    Args:
        in_features: Number of inputs, Q.
        out_features: Number of outputs, O.
        degree: Degree of the polynomials, K >= 1.
        linear_start: Whether only the coefficients of T_1 are drawn and the others start at 0. By default all
            coefficients are drawn, as in the paper; both are Xavier-normal.

    Attributes:
        coefficients: Omega, (Q, O, K + 1).

    Raises:
        ValueError: The degree is less than 1.
    """

    def __init__(self, in_features: int, out_features: int, degree: int = 12, *, linear_start: bool = False):
        super().__init__()
        if degree < 1:
            raise ValueError(f"degree is {degree}: a Chebyshev layer needs a degree of 1 or more")
        self.coefficients = nn.Parameter(torch.zeros(in_features, out_features, degree + 1))
        if self.coefficients.is_meta:  # weights to be read: a draw there would import torch's compiler
            return
        with torch.no_grad():
            nn.init.xavier_normal_(self.coefficients[..., 1] if linear_start else self.coefficients)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, Q) to (B, O)."""
        return chebyshev_kan(inputs, self.coefficients)
