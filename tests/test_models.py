"""The baselines and what all models share: one interface, one-tile bags, clear refusals."""

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from hdmil_lib.errors import BagError, HDMILError
from hdmil_lib.models import ABMIL, DMIN, MODELS, MaxPooling, MeanPooling, build_model
from hdmil_lib.training.losses import bag_loss

SMALL = {"embed_dim": 8}


def numpy_state(model):
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def project(features, w, prefix="projection"):
    return np.maximum(features @ w[f"{prefix}.0.weight"].T + w[f"{prefix}.0.bias"], 0)


def instance_logits(features, w):
    hidden = project(features, w, "classifier.0")
    return hidden @ w["classifier.1.weight"].T + w["classifier.1.bias"]


def bag(n, dim=5, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mean_pooling_is_the_mean_of_tile_logits():
    model, features = MeanPooling(5, 3, **SMALL).double().eval(), bag(7)
    expected = instance_logits(features.numpy(), numpy_state(model)).mean(0)
    np.testing.assert_allclose(model(features).logits.detach(), expected, rtol=1e-12)
    assert model(features).attention is None


@pytest.mark.parametrize("seed", range(5))
def test_max_pooling_with_two_classes_is_the_tile_likeliest_to_be_class_1(seed):
    torch.manual_seed(seed)
    model, features = MaxPooling(5, 2, **SMALL).double().eval(), bag(9, seed=seed)
    logits = instance_logits(features.numpy(), numpy_state(model))
    expected = logits[np.argmax(logits[:, 1] - logits[:, 0])]
    np.testing.assert_allclose(model(features).logits.detach(), expected, rtol=1e-12)


def test_max_pooling_with_more_classes_is_the_surest_tile():
    model, features = MaxPooling(5, 4, **SMALL).double().eval(), bag(9)
    logits = instance_logits(features.numpy(), numpy_state(model))
    expected = logits[np.argmax(softmax(logits, axis=1).max(1))]
    np.testing.assert_allclose(model(features).logits.detach(), expected, rtol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_abmil_weighs_tiles_by_the_softmax_of_attention(gated):
    model = ABMIL(5, 2, gated=gated, attention_dim=3, **SMALL).double().eval()
    features, w = bag(7), numpy_state(model)
    f = project(features.numpy(), w)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    if gated:
        hidden = np.tanh(linear(f, "attention.tanh")) * expit(linear(f, "attention.gate"))
        attention = linear(hidden, "attention.score")
    else:
        attention = linear(np.tanh(linear(f, "attention.0")), "attention.2")
    expected = linear(softmax(attention[:, 0]) @ f, "classifier")
    output = model(features)
    np.testing.assert_allclose(output.attention.detach(), attention, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(output.logits.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_every_model_trains_and_predicts_on_a_bag_of_one_tile(name, n_classes):
    torch.manual_seed(0)
    model = build_model(name, 5, n_classes, **SMALL)
    features = torch.randn(1, 5)
    total, _ = bag_loss(model.train(), model(features), n_classes - 1)
    total.backward()
    assert total.isfinite()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    assert any((g != 0).any() for g in gradients)
    logits = model.eval()(features).logits
    assert logits.shape == (n_classes,)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_tiles_does_not_matter(name):
    torch.manual_seed(0)
    model, features = build_model(name, 5, 2, **SMALL).double().eval(), bag(30)
    order = torch.randperm(30)
    straight, shuffled = model(features), model(features[order])
    torch.testing.assert_close(shuffled.logits, straight.logits)
    if straight.attention is not None:
        torch.testing.assert_close(shuffled.attention, straight.attention[order])


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_a_small_cohort(name):
    """Class 1 has a few shifted tiles: after training every bag is on its side.

    50 epochs: after 25, 2 of 8 seeds left DMIN with one bag on the wrong side, after 50 none did.
    """
    torch.manual_seed(0)
    bags = torch.randn(12, 20, 5)
    labels = [i % 2 for i in range(12)]
    bags[1::2, :6, 0] += 6
    model = build_model(name, 5, 2, embed_dim=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        for features, label in zip(bags, labels, strict=True):
            optimizer.zero_grad()
            bag_loss(model, model(features), label, k=4)[0].backward()
            optimizer.step()
    model.eval()
    assert [model(features).logits.argmax().item() for features in bags] == labels


@pytest.mark.parametrize("name", MODELS)
def test_features_of_another_encoder_are_refused_with_both_widths(name):
    model = build_model(name, 5, 2, **SMALL)
    with pytest.raises(BagError, match=r"shape \(4, 7\), expected \(n_tiles, 5\)"):
        model(torch.randn(4, 7))
    with pytest.raises(BagError, match=r"shape \(5,\), expected \(n_tiles, 5\)"):
        model(torch.randn(5))


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_bag_is_refused(name):
    with pytest.raises(BagError, match="no tiles"):
        build_model(name, 5, 2, **SMALL)(torch.zeros(0, 5))


def test_build_model_passes_settings_on():
    model = build_model("dmin", 320, 3, degree=4, head="linear")
    assert isinstance(model, DMIN)
    assert (model.in_dim, model.n_classes) == (320, 3)
    assert (model.settings.degree, model.settings.head) == (4, "linear")
    assert build_model("abmil", 7, 2, embed_dim=3).projection[0].weight.shape == (3, 7)


def test_an_unknown_model_is_refused_with_the_known_names():
    with pytest.raises(HDMILError, match="'nonsense'.*mean, max, abmil, .*dmin"):
        build_model("nonsense", 5, 2)


@pytest.mark.parametrize("name", MODELS)
def test_standardizing_is_the_z_score_of_the_training_tiles_and_travels_with_the_weights(name):
    bags = [100 + 50 * bag(n, seed=n) for n in (3, 8, 20)]
    model = build_model(name, 5, 2, **SMALL).double().eval()
    scaled = build_model(name, 5, 2, **SMALL).double().eval()
    scaled.load_state_dict(model.state_dict())
    model.standardize(bags)
    tiles = torch.cat(bags).numpy()
    z = (bags[0].numpy() - tiles.mean(0)) / tiles.std(0)
    torch.testing.assert_close(model(bags[0]).logits, scaled(torch.from_numpy(z)).logits)
    scaled.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(bags[1]).logits, scaled(bags[1]).logits)


def test_a_constant_feature_does_not_divide_by_zero():
    model = build_model("abmil", 5, 2, **SMALL)
    model.standardize([torch.ones(4, 5)])
    assert model(torch.ones(4, 5)).logits.isfinite().all()
