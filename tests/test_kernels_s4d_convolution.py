"""s4d_convolution against its recurrence, a direct convolution, and numerical derivatives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from hdmil_lib.kernels import s4d_convolution
from hdmil_lib.kernels.s4d_convolution.reference import FINE, coefficients, impulse_response

few = settings(max_examples=25, deadline=None)


def draw(batch, length, channels, states, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(
        inputs=(batch, length, channels),
        log_step=(channels,),
        decay_log=(channels, states),
        frequency=(channels, states),
        output=(channels, states, 2),
        skip=(channels,),
    )
    arguments = {name: torch.randn(s, generator=generator, dtype=dtype) for name, s in shapes.items()}
    arguments["log_step"] -= 2
    arguments["frequency"] *= 3
    return {name: argument.requires_grad_() for name, argument in arguments.items()}


def complex_states(log_step, decay_log, frequency, output):
    """Return dt, A and C as NumPy arrays, the latter two complex."""
    step, rates = np.exp(log_step)[:, None], -np.exp(decay_log) + 1j * frequency
    return step, rates, output[..., 0] + 1j * output[..., 1]


def by_recurrence(inputs, log_step, decay_log, frequency, output, skip):
    """Apply the zero-order hold tile by tile, with both members of every conjugate pair."""
    step, rates, weights = complex_states(log_step, decay_log, frequency, output)
    rates, weights = (np.concatenate([z, z.conj()], 1) for z in (rates, weights))
    kept = np.exp(step * rates)
    outputs = np.empty_like(inputs)
    for b, bag in enumerate(inputs):
        state = np.zeros(rates.shape, complex)
        for t, tile in enumerate(bag):
            state = kept * state + (kept - 1) / rates * tile[:, None]
            total = (weights * state).sum(1)
            np.testing.assert_allclose(total.imag, 0, atol=1e-9)
            outputs[b, t] = total.real + skip * tile
    return outputs


def by_convolution(inputs, log_step, decay_log, frequency, output, skip):
    """Compute K by its formula and convolve with NumPy."""
    step, rates, weights = complex_states(log_step, decay_log, frequency, output)
    length = inputs.shape[1]
    powers = np.exp((step * rates)[..., None] * np.arange(length))
    response = 2 * ((weights * (np.exp(step * rates) - 1) / rates)[..., None] * powers).sum(1).real
    outputs = skip * inputs
    for b, d in np.ndindex(len(inputs), inputs.shape[2]):
        outputs[b, :, d] += np.convolve(inputs[b, :, d], response[d])[:length]
    return outputs


@pytest.mark.parametrize("oracle", [by_recurrence, by_convolution])
@few
@given(st.integers(0, 2**31), st.integers(1, 2), st.integers(1, 80), st.integers(1, 3), st.integers(1, 4))
def test_the_output_is_that_of_the_state_space_model(oracle, seed, batch, length, channels, states):
    arguments = draw(batch, length, channels, states, seed)
    expected = oracle(**{name: a.detach().numpy() for name, a in arguments.items()})
    np.testing.assert_allclose(s4d_convolution(**arguments).detach(), expected, rtol=1e-9, atol=1e-9)


def test_one_real_state_is_an_exponential_average():
    """For A = -1 and C = 1/2, K_l = (1 - exp(-dt)) exp(-dt l), which sums to 1."""
    ones, zero = torch.ones(1, 200, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    half, step = torch.stack([zero + 0.5, zero], 2), torch.full((1,), 0.1, dtype=torch.float64)
    output = s4d_convolution(ones, step.log(), zero, zero, half, zero[0])
    np.testing.assert_allclose(output.flatten(), 1 - np.exp(-0.1 * np.arange(1, 201)), rtol=1e-10)


def test_a_tile_reaches_no_earlier_output():
    arguments = draw(1, 20, 2, 3)
    output = s4d_convolution(**arguments)
    (grad,) = torch.autograd.grad(output[:, 9].sum(), arguments["inputs"])
    assert (grad[:, :10].abs() > 1e-9).all()
    assert grad[:, 10:].abs().max() < 1e-12


@pytest.mark.parametrize("length", [1, FINE + 2])
def test_gradients(length):
    assert gradcheck(lambda *a: s4d_convolution(*a), tuple(draw(2, length, 2, 2).values()))


def test_short_steps_keep_their_digits():
    """Computed directly in float32, exp(dt A) - 1 would have four correct digits of seven at dt = 0.001."""
    arguments = draw(1, 1, 5, 1)
    parameters = [arguments[name].detach() for name in ("log_step", "decay_log", "frequency", "output")]
    parameters[0] -= 8
    exact = impulse_response(*coefficients(*parameters), 1)
    ours = impulse_response(*coefficients(*(p.float() for p in parameters)), 1)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_numbers_are_computed_in_float32(dtype):
    arguments = {name: a.to(dtype) for name, a in draw(1, 40, 2, 3).items()}
    output = s4d_convolution(**arguments)
    assert output.dtype == dtype
    expected = s4d_convolution(**{name: a.float() for name, a in arguments.items()})
    torch.testing.assert_close(output, expected.to(dtype))


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_no_tiles(batch, length):
    output = s4d_convolution(**draw(batch, length, 3, 4))
    assert output.shape == (batch, length, 3)
    output.sum().backward()


def test_under_autocast_it_stays_in_float32():
    arguments = draw(1, 40, 2, 3, dtype=torch.float32)
    short = arguments | {"inputs": arguments["inputs"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        output = s4d_convolution(**short)
    torch.testing.assert_close(output, s4d_convolution(**arguments | {"inputs": short["inputs"].float()}))


def test_the_compiled_operator_equals_the_eager_one():
    arguments = draw(2, FINE + 3, 3, 4, dtype=torch.float32)
    ours, wanted = torch.compile(s4d_convolution, fullgraph=True)(**arguments), s4d_convolution(**arguments)
    torch.testing.assert_close(ours, wanted)
    leaves = list(arguments.values())
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), leaves),
        torch.autograd.grad(wanted.sum(), leaves),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inputs", torch.zeros(5, 3)),
        ("inputs", torch.zeros(1, 5, 3, dtype=torch.int64)),
        ("log_step", torch.ones(4)),
        ("log_step", 0.1),
        ("decay_log", torch.ones(2, 4)),
        ("frequency", torch.zeros(3, 5)),
        ("output", torch.zeros(3, 4)),
        ("output", torch.zeros(3, 4, 1)),
        ("skip", torch.zeros(4)),
        ("skip", torch.zeros(3).double()),
        ("backend", "cuda"),
        ("backend", "triton"),
    ],
)
def test_a_bad_argument_is_named(name, value, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=name):
        s4d_convolution(**draw(1, 5, 3, 4, dtype=torch.float32) | {name: value})
