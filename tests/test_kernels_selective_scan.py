"""selective_scan against a loop over scalars, closed forms, and numerical derivatives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from hdmil_lib.kernels import selective_scan
from hdmil_lib.kernels.selective_scan import reference
from hdmil_lib.kernels.selective_scan.reference import STEPS

few = settings(max_examples=25, deadline=None)


def draw(batch, length, channels, states, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(
        inputs=(batch, length, channels),
        steps=(batch, length, channels),
        decay=(channels, states),
        input_matrix=(batch, length, states),
        output_matrix=(batch, length, states),
        skip=(channels,),
    )
    arguments = {name: torch.randn(s, generator=generator, dtype=dtype) for name, s in shapes.items()}
    arguments["steps"] = F.softplus(arguments["steps"])
    arguments["decay"] = -arguments["decay"].exp()
    return {name: argument.requires_grad_() for name, argument in arguments.items()}


def by_impulses(inputs, steps, decay, input_matrix, output_matrix, skip):
    """Sum the contributions of each input to all later outputs, decayed over the steps in between."""
    outputs = skip * inputs
    for b, t, d in np.ndindex(inputs.shape):
        for i in range(t + 1):
            waited = sum(steps[b, j, d] for j in range(i + 1, t + 1))
            for n in range(decay.shape[1]):
                arrived = steps[b, i, d] * input_matrix[b, i, n] * inputs[b, i, d]
                outputs[b, t, d] += output_matrix[b, t, n] * np.exp(decay[d, n] * waited) * arrived
    return outputs


@few
@given(st.integers(0, 2**31), st.integers(1, 2), st.integers(1, 20), st.integers(1, 3), st.integers(1, 4))
def test_the_output_is_the_sum_of_decayed_inputs(seed, batch, length, channels, states):
    arguments = draw(batch, length, channels, states, seed)
    expected = by_impulses(**{name: a.detach().numpy() for name, a in arguments.items()})
    np.testing.assert_allclose(selective_scan(**arguments).detach(), expected, rtol=1e-10, atol=1e-10)


def test_without_decay_it_is_a_cumulative_sum():
    ones = torch.ones(1, 40, 1, dtype=torch.float64)
    output = selective_scan(ones, 0.5 * ones, torch.zeros(1, 1).double(), ones, ones, torch.zeros(1).double())
    np.testing.assert_allclose(output.flatten(), 0.5 * np.arange(1, 41))


def test_a_tile_reaches_no_earlier_output():
    arguments = draw(1, 2 * STEPS + 3, 3, 4)
    output = selective_scan(**arguments)
    (grad,) = torch.autograd.grad(output[:, STEPS + 1].sum(), arguments["inputs"])
    assert (grad[:, : STEPS + 2] != 0).all()
    assert not grad[:, STEPS + 2 :].any()


@pytest.mark.parametrize("length", [1, STEPS, STEPS + 1])
def test_gradients(length):
    assert gradcheck(lambda *a: selective_scan(*a), tuple(draw(2, length, 2, 2).values()))


def test_states_that_are_forgotten_at_once():
    """If exp(delta A) underflows to 0, the output depends on its own tile only; gradients are finite."""
    arguments = draw(1, 50, 2, 3, dtype=torch.float32)
    arguments["decay"] = torch.full((2, 3), -1e6, requires_grad=True)
    output = selective_scan(**arguments)
    alone = (arguments["input_matrix"] * arguments["output_matrix"]).sum(2, keepdim=True)
    expected = (alone * arguments["steps"] + arguments["skip"]) * arguments["inputs"]
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert all(a.grad.isfinite().all() for a in arguments.values())


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_no_tiles(batch, length):
    output = selective_scan(**draw(batch, length, 3, 4))
    assert output.shape == (batch, length, 3)
    output.sum().backward()


def test_under_autocast_it_stays_in_float32():
    arguments = draw(1, 40, 2, 3, dtype=torch.float32)
    short = arguments | {"inputs": arguments["inputs"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        output = selective_scan(**short)
    torch.testing.assert_close(output, selective_scan(**arguments | {"inputs": short["inputs"].float()}))


def test_the_compiled_operator_equals_the_eager_one(monkeypatch):
    monkeypatch.setattr(reference, "STEPS", 2)
    arguments = draw(1, 3, 3, 4, dtype=torch.float32)
    compiled = torch.compile(selective_scan, fullgraph=True)
    ours, wanted = compiled(**arguments), selective_scan(**arguments)
    torch.testing.assert_close(ours, wanted)
    leaves = list(arguments.values())
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inputs", torch.zeros(5, 3)),
        ("inputs", torch.zeros(1, 5, 3, dtype=torch.int64)),
        ("steps", torch.ones(1, 4, 3)),
        ("steps", [1.0]),
        ("decay", -torch.ones(2, 4)),
        ("input_matrix", torch.zeros(1, 5, 3)),
        ("output_matrix", torch.zeros(2, 5, 4)),
        ("skip", torch.zeros(4)),
        ("skip", torch.zeros(3).double()),
        ("backend", "cuda"),
        ("backend", "triton"),
    ],
)
def test_a_bad_argument_is_named(name, value, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=name):
        selective_scan(**draw(1, 5, 3, 4, dtype=torch.float32) | {name: value})
