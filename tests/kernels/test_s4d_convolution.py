"""The kernel of the impulse response of S4D: lengths and states around its blocks."""

import math

import pytest
import torch
from comparison import assert_kernel_equals_reference

from hdmil_lib.kernels import s4d_convolution
from hdmil_lib.kernels.s4d_convolution import gpu
from hdmil_lib.kernels.s4d_convolution.op import _forward

POSITIONS, STATES = gpu.COARSE * gpu.FINE, gpu.STATES.value


def draw(device, length, channels, states, batch=1, dtype=torch.float32):
    """Initial parameters of S4D: steps of 0.001 to 0.1, a = 1/2, and frequencies that are multiples of pi."""
    torch.manual_seed(0)
    arguments = (
        torch.randn(batch, length, channels),
        math.log(1e-3) + math.log(100) * torch.rand(channels),
        math.log(0.5) + 0.1 * torch.randn(channels, states),
        math.pi * torch.arange(states).repeat(channels, 1),
        torch.randn(channels, states, 2),
        torch.randn(channels),
    )
    return tuple(argument.to(device, dtype) for argument in arguments)


@pytest.mark.parametrize("length", [1, gpu.FINE, 300, POSITIONS - 1, POSITIONS, POSITIONS + 1])
def test_lengths_around_a_block(device, length):
    assert_kernel_equals_reference(s4d_convolution, draw(device, length, 3, 4))


@pytest.mark.parametrize("states", [1, STATES - 1, STATES, STATES + 1])
def test_states_around_a_block(device, states):
    """The gradient of a step is a sum of large terms; with 12 channels it does not cancel in all of them."""
    assert_kernel_equals_reference(s4d_convolution, draw(device, 70, 12, states))


@pytest.mark.parametrize(("channels", "batch"), [(1, 3), (9, 2)])
def test_channels_and_bags(device, channels, batch):
    assert_kernel_equals_reference(s4d_convolution, draw(device, 20, channels, 16, batch))


def test_inputs_that_are_not_contiguous(device):
    arguments = draw(device, 9, 4, 3)
    spread = [a.repeat_interleave(2, -1)[..., ::2] for a in arguments]
    assert not spread[0].is_contiguous()
    torch.testing.assert_close(
        s4d_convolution(*spread, backend="triton"), s4d_convolution(*arguments, backend="triton")
    )


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_no_tiles(device, batch, length):
    arguments = [a.requires_grad_() for a in draw(device, length, 3, 4, batch)]
    output = s4d_convolution(*arguments, backend="triton")
    output.sum().backward()
    assert output.shape == (batch, length, 3)
    assert not any(a.grad.any() for a in arguments)


def test_the_operator_is_registered_correctly(device):
    amplitudes, exponents = torch.randn(2, 2, 3, 2, device=device).unbind()
    exponents[..., 0].abs_().neg_()  # states decay: growing ones overflow behind the last position
    pairs = [t.clone().requires_grad_() for t in (amplitudes, exponents)]
    torch.library.opcheck(_forward, (*pairs, 5))


@pytest.mark.gpu
def test_bfloat16_and_repetition(device):
    if device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    arguments = draw(device, 10_000, 512, 16, dtype=torch.bfloat16)
    # Outputs in bfloat16 have 8 bits; everything else is float32.
    assert_kernel_equals_reference(s4d_convolution, arguments, forward=8e-3, backward=8e-3)
    arguments = [a.requires_grad_() for a in arguments]

    def results():
        output = s4d_convolution(*arguments)
        return [output, *torch.autograd.grad(output.sum(), arguments)]

    first = results()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
