"""The selection kernel: sizes around its blocks, noise, several branches."""

import pytest
import torch
from comparison import assert_kernel_equals_reference

from hdmil_lib.kernels import gumbel_mask
from hdmil_lib.kernels.gumbel_mask.gpu import VALUES
from hdmil_lib.kernels.gumbel_mask.op import _forward
from hdmil_lib.kernels.random import key


def draw(device, n_tiles, n_branches, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(n_tiles, n_branches, dtype=dtype, device=device)


@pytest.mark.parametrize("n_tiles", [1, VALUES - 1, VALUES, VALUES + 1, 2 * VALUES + 88])
@pytest.mark.parametrize("seed", [None, 0, 2**40 + 7])
def test_values_around_a_block(device, n_tiles, seed):
    assert_kernel_equals_reference(gumbel_mask, [draw(device, n_tiles, 1)], seed=seed, temperature=0.7)


@pytest.mark.parametrize("n_branches", [1, 2, 3, 7])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_branches_and_thresholds(device, n_branches, threshold):
    logits = draw(device, 300, n_branches)
    assert_kernel_equals_reference(gumbel_mask, [logits], seed=3, temperature=1.5, threshold=threshold)


def test_logits_that_are_not_contiguous(device):
    logits = draw(device, 30, 2)
    spread = logits.T.contiguous().T
    assert not spread.is_contiguous()
    assert torch.equal(
        gumbel_mask(spread, seed=1, backend="triton"), gumbel_mask(logits, seed=1, backend="triton")
    )


def test_the_operator_is_registered_correctly(device):
    torch.library.opcheck(_forward, (draw(device, 5, 2).requires_grad_(), key(1, device), 0.7, 0.5))


@pytest.mark.gpu
def test_bfloat16_and_repetition(device):
    if device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    logits = draw(device, 100_000, 2)
    assert_kernel_equals_reference(gumbel_mask, [logits], seed=5)
    logits = logits.bfloat16()
    first = gumbel_mask(logits, seed=5)
    exact = gumbel_mask(logits.float(), seed=5, backend="torch")  # the kernel computes in float32
    assert (first.float() != exact).float().mean() <= 1e-4  # where rounding decides
    assert all(torch.equal(first, gumbel_mask(logits, seed=5)) for _ in range(20))
