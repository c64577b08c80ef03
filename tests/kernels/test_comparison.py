"""The comparison itself: it must detect wrong results, and kernels must refuse float64."""

import pytest
import torch
from comparison import assert_kernel_equals_reference

from hdmil_lib.kernels import chebyshev_kan


def test_fresh_memory_is_nan(device):
    assert torch.empty(1000, device=device).isnan().all()


@pytest.mark.parametrize("fault", ["forgotten element", "small error", "wrong gradient"])
def test_a_wrong_result_is_caught(device, fault):
    def double(x, backend):
        if backend == "torch":
            return 2 * x
        if fault == "wrong gradient":
            return (2 - 1e-4) * x + (1e-4 * x).detach()
        result = torch.empty_like(x)
        result[1:] = 2 * x.detach()[1:]
        if fault == "small error":
            result[0] = 2 * x.detach()[0] + 1e-4
        return result + 0 * x

    x = torch.linspace(-1, 1, 9, device=device)
    assert_kernel_equals_reference(lambda x, backend: 2 * x, [x])
    with pytest.raises(AssertionError):
        assert_kernel_equals_reference(double, [x])


def test_kernels_refuse_float64(device):
    tensors = torch.randn(2, 3, device=device).double(), torch.randn(3, 1, 4, device=device).double()
    with pytest.raises(ValueError, match="backend='triton' computes in float32"):
        chebyshev_kan(*tensors, backend="triton")
    torch.testing.assert_close(chebyshev_kan(*tensors), chebyshev_kan(*tensors, backend="torch"))
