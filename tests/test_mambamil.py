"""MambaMIL: against a recurrence over single numbers, and batches against bags one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.mambamil import MambaBranch, MambaMIL, SRMamba, strided_order

LENGTHS, RATE = [1, 7, 2, 40, 13], 3


def draw(n_classes=2, **options):
    torch.manual_seed(0)
    options = {"embed_dim": 6, "n_states": 4, "rate": RATE, "attention_dim": 3} | options
    model = MambaMIL(5, n_classes, **options).double().eval()
    segments = Segments(LENGTHS)
    return model, torch.randn(segments.n_tiles, 5, dtype=torch.float64), segments


def numpy_weights(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def branch_step_by_step(branch, tiles):
    """One bag (L, D) through convolution and scan, tile after tile."""
    w = numpy_weights(branch)
    rank, n_states, _ = branch.sizes
    taps = w["convolution.weight"].shape[2]
    state, read = np.zeros_like(w["decay_log"]), []
    for t in range(len(tiles)):
        u = w["convolution.bias"].copy()
        for i in range(min(taps, t + 1)):
            u += w["convolution.weight"][:, 0, taps - 1 - i] * tiles[t - i]
        u *= expit(u)
        chosen = w["selection.weight"] @ u
        low_rank, into, out = np.split(chosen, [rank, rank + n_states])
        step = np.log1p(np.exp(w["step.weight"] @ low_rank + w["step.bias"]))[:, None]
        state = np.exp(-step * np.exp(w["decay_log"])) * state + step * into * u[:, None]
        read.append(state @ out + w["skip"] * u)
    return np.array(read)


def strides(length, rate):
    return [t for first in range(rate) for t in range(first, length, rate)]


def block_step_by_step(block, tiles, rate):
    """SR-Mamba on one bag, (L, dim)."""
    w, order = numpy_weights(block), strides(len(tiles), rate)
    inputs, gate = np.split(tiles @ w["input.weight"].T, 2, axis=1)
    read = branch_step_by_step(block.straight, inputs)
    read[order] += branch_step_by_step(block.strided, inputs[order])
    return (read * gate * expit(gate)) @ w["output.weight"].T


def normalize(tiles, norm):
    centered = tiles - tiles.mean(1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(1, keepdims=True) + norm.eps)
    return scaled * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def model_step_by_step(model, bag):
    w = numpy_weights(model)
    tiles = np.maximum(bag @ w["projection.0.weight"].T + w["projection.0.bias"], 0)
    for norm, mixer in zip(model.norms, model.mixers, strict=True):
        tiles = tiles + block_step_by_step(mixer, normalize(tiles, norm), model.rate)
    tiles = normalize(tiles, model.norm)
    hidden = np.tanh(tiles @ w["attention.0.weight"].T + w["attention.0.bias"])
    attention = hidden @ w["attention.2.weight"].T + w["attention.2.bias"]
    pooled = softmax(attention[:, 0]) @ tiles
    return w["classifier.weight"] @ pooled + w["classifier.bias"], attention


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 12))
def test_the_strided_order_is_that_of_each_bag_by_itself(lengths, rate):
    segments = Segments(lengths)
    expected = [
        start + t
        for start, length in zip(segments.offsets[:-1].tolist(), lengths, strict=True)
        for t in strides(length, rate)
    ]
    assert strided_order(segments, rate).tolist() == expected


@pytest.mark.parametrize("rate", [1, 3, 10])
@pytest.mark.parametrize("length", [1, 3, 10, 21])
def test_the_block_is_two_recurrences(length, rate):
    torch.manual_seed(length)
    block, segments = SRMamba(4, n_states=3).double(), Segments([length])
    tiles = torch.randn(length, 4, dtype=torch.float64)
    got = block(tiles, strided_order(segments, rate), segments).detach()
    np.testing.assert_allclose(got, block_step_by_step(block, tiles.numpy(), rate), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_the_model_is_its_definition(n_classes):
    model, features, segments = draw(n_classes)
    output = model(features, segments)
    expected = [model_step_by_step(model, bag.numpy()) for bag in features.split(LENGTHS)]
    np.testing.assert_allclose(output.logits.detach(), [logits for logits, _ in expected], rtol=1e-9)
    attention = np.concatenate([attention for _, attention in expected])
    np.testing.assert_allclose(output.attention.detach(), attention, rtol=1e-9, atol=1e-12)


def test_it_starts_as_mamba():
    branch = MambaBranch(400, n_states=16, conv_size=4, rank=25)
    steps = torch.nn.functional.softplus(branch.step.bias)
    assert 0.00099 < steps.min() < 0.0013
    assert 0.07 < steps.max() < 0.101
    assert branch.step.weight.abs().max() <= 0.2
    torch.testing.assert_close(branch.decay_log.exp()[3], torch.arange(1.0, 17.0))
    assert SRMamba(33).straight.sizes == (3, 16, 16)


def test_batched_logits_and_gradients_are_those_of_single_bags():
    model, features, segments = draw()
    batched = model(features, segments).logits
    singly = torch.cat([model(bag).logits for bag in features.split(LENGTHS)])
    torch.testing.assert_close(batched, singly)
    up, parameters = torch.randn_like(singly), list(model.parameters())
    got = torch.autograd.grad((batched * up).sum(), parameters)
    expected = torch.autograd.grad((singly * up).sum(), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_in_float32_batches_agree_with_single_bags():
    model, features, segments = draw()
    model, features = model.float(), features.float()
    singly = torch.cat([model(bag).logits for bag in features.split(LENGTHS)])
    torch.testing.assert_close(model(features, segments).logits, singly, rtol=1e-5, atol=1e-5)


def test_a_huge_bag_beside_it_changes_nothing():
    model, features, _ = draw()
    small, huge = features[:7], 1000 * torch.randn(500, 5, dtype=torch.float64)
    both = model(torch.cat([small, huge]), Segments([7, 500])).logits
    torch.testing.assert_close(both[:1], model(small).logits)


def test_the_order_of_tiles_matters():
    model, features, _ = draw()
    change = model(features).logits - model(features.flip(0)).logits
    assert change.abs().min() > 1e-4


def test_the_rate_matters():
    model, features, _ = draw()
    other, _, _ = draw(rate=RATE + 1)
    assert (model(features).logits - other(features).logits).abs().max() > 1e-6


def test_one_tile_trains():
    torch.manual_seed(0)
    model = MambaMIL(5, 3, embed_dim=8)
    output = model(torch.randn(1, 5), Segments([1]))
    sum(model.loss(output, torch.tensor([2])).values()).backward()
    assert output.attention.shape == (1, 1)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_stride_of_zero_is_refused():
    with pytest.raises(ValueError, match="rate is 0, expected a stride of at least 1"):
        MambaMIL(5, 2, rate=0)
