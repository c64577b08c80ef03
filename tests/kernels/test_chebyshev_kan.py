"""The Chebyshev kernel: sizes around its blocks, the degrees of the paper, several outputs."""

import pytest
import torch
from comparison import assert_kernel_equals_reference

from hdmil_lib.kernels import chebyshev_kan
from hdmil_lib.kernels.chebyshev_kan.gpu import INPUTS, ROWS
from hdmil_lib.kernels.chebyshev_kan.op import _forward


def draw(device, n_rows, n_inputs, n_outputs, degree, dtype=torch.float32):
    torch.manual_seed(0)
    inputs = torch.randn(n_rows, n_inputs, dtype=dtype, device=device)
    return inputs, torch.randn(n_inputs, n_outputs, degree + 1, dtype=dtype, device=device) / n_inputs**0.5


@pytest.mark.parametrize("n_rows", [1, ROWS - 1, ROWS, ROWS + 1, 300])
def test_rows_around_a_block(device, n_rows):
    assert_kernel_equals_reference(chebyshev_kan, draw(device, n_rows, 20, 2, 3))


@pytest.mark.parametrize("n_inputs", [1, INPUTS - 1, INPUTS, INPUTS + 1, 301])
def test_inputs_around_a_block(device, n_inputs):
    assert_kernel_equals_reference(chebyshev_kan, draw(device, 3, n_inputs, 1, 3))


@pytest.mark.parametrize("degree", [1, 3, 12, 16])
@pytest.mark.parametrize("n_outputs", [1, 2, 3])
def test_degrees_and_outputs(device, degree, n_outputs):
    assert_kernel_equals_reference(chebyshev_kan, draw(device, 5, 33, n_outputs, degree))


def test_inputs_that_are_not_contiguous(device):
    inputs, coefficients = draw(device, 6, 10, 2, 3)
    spread = inputs.repeat_interleave(2, 1)[:, ::2]
    assert not spread.is_contiguous()
    torch.testing.assert_close(
        chebyshev_kan(spread, coefficients, backend="triton"),
        chebyshev_kan(inputs, coefficients, backend="triton"),
    )


def test_no_rows(device):
    inputs, coefficients = (t.requires_grad_() for t in draw(device, 0, 10, 2, 3))
    output = chebyshev_kan(inputs, coefficients, backend="triton")
    output.sum().backward()
    assert output.shape == (0, 2)
    assert not coefficients.grad.any()


def test_saturated_inputs(device):
    """For large inputs tanh is +-1, where every T_k is +-1 and the gradient vanishes."""
    coefficients = torch.rand(4, 1, 17, device=device)
    inputs = torch.tensor([[-1e4], [-50.0], [50.0], [1e4]], device=device).expand(-1, 4).contiguous()
    output = chebyshev_kan(inputs, coefficients, backend="triton")
    torch.testing.assert_close(output[2:], coefficients.sum().expand(2, 1))
    assert_kernel_equals_reference(chebyshev_kan, (inputs, coefficients))


def test_the_operator_is_registered_correctly(device):
    arguments = tuple(t.requires_grad_() for t in draw(device, 2, 3, 1, 3))
    torch.library.opcheck(_forward, arguments)


@pytest.mark.gpu
def test_bfloat16_and_repetition(device):
    if device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    arguments = draw(device, 10_000, 512, 2, 12, torch.bfloat16)
    # Outputs in bfloat16 have 8 bits; the sums are computed in float32.
    assert_kernel_equals_reference(chebyshev_kan, arguments, forward=8e-3, backward=8e-3)
    first = chebyshev_kan(*arguments)
    assert all(torch.equal(first, chebyshev_kan(*arguments)) for _ in range(20))
