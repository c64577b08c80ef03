"""The Chebyshev Kolmogorov-Arnold layer (paper: CKA classifier)."""

import torch
from torch import Tensor, nn

from hdmil_lib.kernels import chebyshev_kan


class ChebyshevKAN(nn.Module):
    """A layer whose every connection is a learned polynomial of degree K; see `kernels.chebyshev_kan`.

    Args:
        in_features: Q.
        out_features: O.
        degree: K >= 1.
        linear_start: Only T_1 is non-zero at the start, drawn as a linear layer of this size would be;
            by default all degrees are drawn, Xavier-normal, as in the paper.

    Attributes:
        coefficients: Omega, (Q, O, K + 1).
    """

    def __init__(self, in_features: int, out_features: int, degree: int = 12, *, linear_start: bool = False):
        super().__init__()
        if degree < 1:
            raise ValueError(f"degree is {degree}: a Chebyshev layer needs a degree of 1 or more")
        self.coefficients = nn.Parameter(torch.zeros(in_features, out_features, degree + 1))
        with torch.no_grad():
            if linear_start:
                nn.init.xavier_normal_(self.coefficients[..., 1])
            else:
                nn.init.xavier_normal_(self.coefficients)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, Q) to (B, O)."""
        return chebyshev_kan(inputs, self.coefficients)
