"""The selective scan kernel: lengths around its chunks and steps, channels around its block, few states."""

import pytest
import torch
from comparison import assert_kernel_equals_reference
from torch.nn import functional as F

from hdmil_lib.kernels import selective_scan
from hdmil_lib.kernels.selective_scan import gpu
from hdmil_lib.kernels.selective_scan.op import _forward

CHUNK, BLOCK = gpu.MIN_CHUNK, gpu.CHANNELS


def draw(device, length, channels, states, batch=1, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (
        [(batch, length, channels)] * 2 + [(channels, states)] + [(batch, length, states)] * 2 + [(channels,)]
    )
    inputs, steps, decay, *others = (torch.randn(s, device=device) for s in shapes)
    arguments = (inputs, F.softplus(steps - 1), -4 * decay.sigmoid(), *others)
    return tuple(argument.to(dtype) for argument in arguments)


@pytest.mark.parametrize("length", [1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 6, 300])
def test_lengths_around_a_chunk(device, length):
    assert_kernel_equals_reference(selective_scan, draw(device, length, 3, 4))


@pytest.mark.parametrize("channels", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_channels_around_a_block(device, channels):
    assert_kernel_equals_reference(selective_scan, draw(device, 6, channels, 16))


@pytest.mark.parametrize("states", [1, 15])
def test_states_and_bags(device, states):
    assert_kernel_equals_reference(selective_scan, draw(device, CHUNK + 1, 5, states, batch=2))


def test_chunks_longer_than_the_shortest(device, monkeypatch):
    """Long bags, which give enough programs anyway, are cut into chunks longer than the minimum."""
    monkeypatch.setattr(gpu, "PROGRAMS", 2)
    arguments = draw(device, 2 * CHUNK + 6, 3, 16)
    assert gpu.cut(arguments[0]) == (CHUNK + 4, 2, 1)
    assert_kernel_equals_reference(selective_scan, arguments)


def test_a_state_that_is_forgotten_at_once_and_one_that_never_is(device):
    """Products of many decays underflow to 0 and must not become nan; a decay of 0 keeps every input."""
    inputs, steps, decay, *others = draw(device, CHUNK + 3, 2, 2)
    decay = torch.tensor([[-1e4, 0.0], [-1e-6, -50.0]], device=device)
    assert_kernel_equals_reference(selective_scan, (inputs, steps, decay, *others))


def test_inputs_that_are_not_contiguous(device):
    arguments = draw(device, 7, 5, 3, batch=2)
    spread = [a.repeat_interleave(2, -1)[..., ::2] for a in arguments]
    assert not spread[0].is_contiguous()
    torch.testing.assert_close(
        selective_scan(*spread, backend="triton"), selective_scan(*arguments, backend="triton")
    )


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_no_tiles(device, batch, length):
    arguments = [a.requires_grad_() for a in draw(device, length, 3, 4, batch)]
    output = selective_scan(*arguments, backend="triton")
    output.sum().backward()
    assert output.shape == (batch, length, 3)
    assert not any(a.grad.any() for a in arguments)


def test_more_states_than_the_kernel_holds_are_refused(device):
    with pytest.raises(ValueError, match="decay has 17 states"):
        selective_scan(*draw(device, 2, 3, 17), backend="triton")


def test_the_operator_is_registered_correctly(device):
    torch.library.opcheck(_forward, tuple(a.requires_grad_() for a in draw(device, 2, 2, 1)))


@pytest.mark.gpu
def test_bfloat16_and_repetition(device):
    if device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    arguments = draw(device, 10_000, 1024, 16, dtype=torch.bfloat16)
    # Outputs in bfloat16 have 8 bits; states and sums are float32.
    assert_kernel_equals_reference(selective_scan, arguments, forward=8e-3, backward=8e-3)
    arguments = [a.requires_grad_() for a in arguments]

    def results():
        output = selective_scan(*arguments)
        return [output, *torch.autograd.grad(output.sum(), arguments)]

    first = results()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
