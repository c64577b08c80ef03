"""S4MIL: against a recurrence over single numbers, and batches against bags one by one."""

import numpy as np
import pytest
import torch
from scipy.special import erf, expit
from torch.nn.functional import layer_norm

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.s4mil import S4MIL, S4DLayer

LENGTHS = [1, 7, 2, 40, 13]


def draw(n_classes=2, seed=0, **settings):
    torch.manual_seed(seed)
    model = S4MIL(5, n_classes, **{"embed_dim": 6, "n_states": 8} | settings).double().eval()
    segments = Segments(LENGTHS)
    return model, torch.randn(segments.n_tiles, 5, dtype=torch.float64), segments


def step_by_step(layer, tiles):
    """The layer on one bag, (L, D): zero-order hold, then one state after the other."""
    w = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    step = np.exp(w["log_step"])[:, None]
    decay = -np.exp(w["decay_log"]) + 1j * w["frequency"]
    kept = np.exp(step * decay)
    into, out = (kept - 1) / decay, w["readout"] @ np.array([1, 1j])
    state, read = np.zeros_like(decay), []
    for tile in tiles:
        state = kept * state + into * tile[:, None]
        read.append(2 * (out * state).sum(1).real + w["skip"] * tile)
    read = np.array(read)
    hidden = read * (1 + erf(read / np.sqrt(2))) / 2
    value, gate = np.split(hidden @ w["output.0.weight"].T + w["output.0.bias"], 2, axis=1)
    return value * expit(gate)


@pytest.mark.parametrize("length", [1, 2, 33, 64])
def test_the_layer_is_a_recurrence(length):
    torch.manual_seed(length)
    layer = S4DLayer(4, 6).double()
    tiles = torch.randn(length, 4, dtype=torch.float64)
    got = layer(tiles, Segments([length])).detach()
    np.testing.assert_allclose(got, step_by_step(layer, tiles.numpy()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_the_model_is_its_definition(n_classes):
    model, features, segments = draw(n_classes)
    expected = []
    for bag in features.split(LENGTHS):
        tiles = layer_norm((model.projection[0](bag)).relu(), (6,), model.norm.weight, model.norm.bias)
        highest = step_by_step(model.sequence, tiles.detach().numpy()).max(0)
        expected.append(model.classifier(torch.from_numpy(highest)))
    torch.testing.assert_close(model(features, segments).logits, torch.stack(expected))


def test_it_starts_as_s4d_lin():
    layer = S4DLayer(500, 32)
    steps = layer.log_step.exp()
    assert 0.001 <= steps.min() < 0.0012
    assert 0.08 < steps.max() <= 0.1
    torch.testing.assert_close(layer.decay_log.exp(), torch.full((500, 16), 0.5))
    torch.testing.assert_close(layer.frequency[7], torch.pi * torch.arange(16.0))
    assert abs(layer.readout.square().sum(-1).mean() - 1) < 0.05


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
    """1e-5: the Fourier transform rounds relative to the largest tile of its own bag and channel alone."""
    model, features, _ = draw()
    model, small = model.float(), features[:6].float()
    both = model(torch.cat([small, 1000 * torch.randn(700, 5)]), Segments([6, 700])).logits
    torch.testing.assert_close(both[:1], model(small).logits, rtol=1e-5, atol=1e-5)


def test_padding_is_no_maximum():
    """Where all outputs of the layer are negative, the zeros behind a shorter bag would win."""
    model, features, segments = draw()
    with torch.no_grad():
        model.sequence.output[0].weight.zero_()
        model.sequence.output[0].bias.fill_(-1.0)
    expected = model.classifier(torch.full((6,), -1.0 * float(expit(-1.0)), dtype=torch.float64))
    torch.testing.assert_close(model(features, segments).logits, expected.expand(5, 2))


def test_later_tiles_reach_no_earlier_output():
    model, features, _ = draw()
    tiles = torch.randn(20, 6, dtype=torch.float64)
    whole = model.sequence(tiles, Segments([20]))
    torch.testing.assert_close(whole[:11], model.sequence(tiles[:11], Segments([11])))


def test_the_order_of_tiles_matters():
    model, features, _ = draw()
    change = model(features).logits - model(features.flip(0)).logits
    assert change.abs().min() > 1e-3


def test_one_tile_trains():
    torch.manual_seed(0)
    model = S4MIL(5, 3, embed_dim=8, dropout=0.1)
    output = model(torch.randn(1, 5), Segments([1]))
    sum(model.loss(output, torch.tensor([2])).values()).backward()
    assert output.attention is None
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_an_odd_number_of_states_is_refused():
    with pytest.raises(ValueError, match="n_states is 7, expected an even number"):
        S4MIL(5, 2, n_states=7)
