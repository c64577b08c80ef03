"""The Chebyshev-KAN layer: its start, its function, its limits."""

import numpy as np
import pytest
import torch
from numpy.polynomial.chebyshev import chebval

from hdmil_lib.models import ChebyshevKAN


def test_layer_sums_one_chebyshev_series_for_each_connection():
    layer = ChebyshevKAN(4, 3, degree=12).double()
    inputs = torch.randn(6, 4, dtype=torch.float64)
    omega, x = layer.coefficients.detach().numpy(), np.tanh(inputs.numpy())
    expected = [[sum(chebval(x[b, q], omega[q, o]) for q in range(4)) for o in range(3)] for b in range(6)]
    np.testing.assert_allclose(layer(inputs).detach(), expected, rtol=1e-11, atol=1e-12)


def test_coefficients_start_xavier_normal_in_the_layout_of_the_paper():
    """Omega is Q x O x (K + 1); Xavier's fans count the K + 1 terms: var = 2 / ((Q + O) (K + 1))."""
    torch.manual_seed(0)
    omega = ChebyshevKAN(512, 2, degree=12).coefficients
    assert omega.shape == (512, 2, 13)
    # 13,312 draws: the standard error of the standard deviation is 0.6 %.
    assert omega.std().item() == pytest.approx((2 / (514 * 13)) ** 0.5, rel=0.03)


def test_linear_start_is_a_linear_layer_of_tanh():
    torch.manual_seed(0)
    layer = ChebyshevKAN(400, 5, degree=8, linear_start=True)
    omega = layer.coefficients.detach()
    inputs = torch.randn(7, 400)
    torch.testing.assert_close(layer(inputs), inputs.tanh() @ omega[..., 1], rtol=1e-4, atol=1e-5)
    assert omega[..., [0, *range(2, 9)]].count_nonzero() == 0
    assert omega[..., 1].std().item() == pytest.approx((2 / 405) ** 0.5, rel=0.1)


def test_linear_start_learns_the_higher_degrees():
    layer = ChebyshevKAN(3, 1, degree=4, linear_start=True)
    layer(torch.randn(5, 3)).sum().backward()
    assert layer.coefficients.grad.abs().amin() > 0


def test_a_layer_fits_what_no_linear_layer_can():
    """T_2 is learned from data: a linear function of tanh explains none of its variance."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 1)
    target = 2 * inputs.tanh() ** 2 - 1
    layer = ChebyshevKAN(1, 1, degree=4, linear_start=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3 * target.var().item()


def test_degree_zero_is_refused():
    with pytest.raises(ValueError, match="degree is 0"):
        ChebyshevKAN(4, 1, degree=0)
