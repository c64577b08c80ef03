"""DTFD against torchmil (AFS, one group) and closed forms in float64; how bags are split and tiers learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, softmax
from torchmil.models.dtfdmil import DTFDMIL
from torchmil.nn import AttentionPool

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.dtfd import DTFD, deal

DISTILLATIONS = pytest.mark.parametrize("distill", ["afs", "maxs", "maxmins"])


def make(n_classes=2, distill="afs", n_groups=4):
    torch.manual_seed(0)
    model = DTFD(6, n_classes, distill=distill, n_groups=n_groups, embed_dim=5, attention_dim=4)
    model.attention.score.weight.data.mul_(10)  # far from uniform, so that it decides which tiles stand out
    return model.double().eval()


def tiles(n, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(model, output, *labels):
    return sum(model.loss(output, torch.tensor(labels)).values())


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def groups_of(order, n_groups):
    """Tiles of each group of one bag: ranked by `order`, dealt round."""
    ranked = np.argsort(order, kind="stable")
    return [ranked[g::n_groups] for g in range(min(n_groups, len(ranked)))]


def closed_form(model, features, order=None):
    """Class scores of the groups (G, C) and of the bag (C,), group by group in numpy."""
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attend(x, name):
        hidden = np.tanh(linear(x, f"{name}.tanh")) * expit(linear(x, f"{name}.gate"))
        return linear(hidden, f"{name}.score")[:, 0]

    embeddings = np.maximum(features.numpy() @ w["projection.0.weight"].T, 0)
    attention = attend(embeddings, "attention")
    group_logits, distilled = [], []
    for group in groups_of(-attention if order is None else order, model.n_groups):
        weighted = softmax(attention[group])[:, None] * embeddings[group]
        group_logits.append(linear(weighted.sum(0), "classifier"))
        probabilities = softmax(weighted @ w["classifier.weight"].T, axis=1)
        score = probabilities[:, 1] if model.n_classes == 2 else probabilities.max(1)
        highest, lowest = embeddings[group[score.argmax()]], embeddings[group[score.argmin()]]
        distilled += {"afs": [weighted.sum(0)], "maxs": [highest], "maxmins": [highest, lowest]}[
            model.distill
        ]
    distilled = np.stack(distilled)
    bag = softmax(attend(distilled, "bag_attention")) @ distilled
    return np.stack(group_logits), linear(bag, "bag_classifier")


# Scores


@pytest.mark.parametrize("n", [1, 9])
def test_one_group_of_afs_agrees_with_torchmil(n):
    """torchmil scores one class and its attention has no gate and no bias: the gate is put in.

    It splits with numpy's global generator, hence one group, and its "max" and "maxmin" are no oracle: they
    fail without a mask, keep every tile of a group, and leave the attention out of the activation.
    """
    model, features = make(n_classes=1, n_groups=1), tiles(n)
    oracle = DTFDMIL((5,), att_dim=4, n_groups=1, distill_mode="afs").double()
    oracle.feat_ext = torch.nn.Sequential(*model.projection)
    for name, attention in (("attention_pool", model.attention), ("u_attention_pool", model.bag_attention)):
        pool = AttentionPool(5, 4, gated=True).double()
        pool.fc1.module.load_state_dict(attention.tanh.state_dict())
        pool.fc_gated.module.load_state_dict(attention.gate.state_dict())
        pool.fc2.weight.data.copy_(attention.score.weight)
        setattr(oracle, name, pool)
    oracle.classifier.module.load_state_dict(model.classifier.state_dict())
    oracle.u_classifier.module.load_state_dict(model.bag_classifier.state_dict())
    score, group_score = oracle(features[None], return_pseudo_pred=True)
    output = model(features)
    torch.testing.assert_close(output.logits[:, 0], score, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.group_logits, group_score, rtol=1e-12, atol=1e-12)


@DISTILLATIONS
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("n", [1, 3, 4, 23])
@pytest.mark.parametrize("training", [False, True])
def test_scores_and_loss_terms_by_the_closed_form(distill, n_classes, n, training):
    model, features = make(n_classes, distill).train(training), tiles(n)
    order = torch.rand(n, generator=generator()).numpy() if training else None
    group_logits, logits = closed_form(model, features, order)
    output = model(features, generator=generator())
    assert output.attention.shape == (n, 1)
    np.testing.assert_allclose(output.group_logits.detach(), group_logits, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(output.logits.detach(), logits[None], rtol=1e-10, atol=1e-12)
    terms = model.loss(output, torch.tensor([1]))
    assert list(terms) == ["tier_1", "tier_2"]
    tiers = -log_softmax(group_logits, axis=1)[:, 1].mean(), -log_softmax(logits)[1]
    assert (terms["tier_1"].item(), terms["tier_2"].item()) == pytest.approx(tiers, rel=1e-9)
    assert sum(terms.values()).item() == pytest.approx(sum(tiers), rel=1e-9)


# Groups


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 99))
def test_dealing_is_a_partition_of_each_bag_into_groups_of_equal_size(lengths, n_groups, seed):
    order = torch.rand(sum(lengths), generator=generator(seed)).mul(8).round()  # with equals
    segments = Segments(lengths)
    numbers, group_tiles = deal(order, segments, n_groups)
    dealt = [group.tolist() for group in numbers.split(group_tiles.lengths)]
    expected = []
    for start, bag in zip(segments.offsets[:-1].tolist(), order.split(lengths), strict=True):
        expected += [(start + group).tolist() for group in groups_of(bag.numpy(), n_groups)]
    assert dealt == expected
    assert group_tiles.offsets.diff().tolist() == [len(group) for group in expected]
    assert sorted(numbers.tolist()) == list(range(sum(lengths)))


@DISTILLATIONS
def test_in_training_the_split_is_drawn_anew(distill):
    model, features = make(distill=distill).train(), tiles(30)
    first, second, again = (model(features, generator=generator(seed)).group_logits for seed in (1, 2, 1))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.manual_seed(1)
    torch.testing.assert_close(model(features).group_logits, first, rtol=0, atol=0)


@DISTILLATIONS
@pytest.mark.parametrize("n_classes", [2, 3])
def test_in_evaluation_the_order_of_tiles_does_not_matter(distill, n_classes):
    """Groups follow from the attention, so their scores are the same too, group by group."""
    model, features, order = make(n_classes, distill), tiles(30), torch.randperm(30)
    straight, shuffled = model(features), model(features[order])
    torch.testing.assert_close(shuffled.logits, straight.logits)
    torch.testing.assert_close(shuffled.group_logits, straight.group_logits)
    torch.testing.assert_close(shuffled.attention, straight.attention[order])


def test_in_training_an_order_of_tiles_does_not_matter_if_the_split_follows_it(monkeypatch):
    model, features, order = make().train(), tiles(30), torch.randperm(30)
    drawn = torch.rand(30)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: drawn)
    straight = model(features).logits
    monkeypatch.setattr(torch, "rand", lambda *_, **__: drawn[order])
    torch.testing.assert_close(model(features[order]).logits, straight)


# Learning


@DISTILLATIONS
@pytest.mark.parametrize("training", [False, True])
def test_bags_together_have_the_mean_gradient_of_bags_one_by_one(distill, training):
    """Also of a random split: one generator gives it to all bags together or to one after another."""
    model = make(3, distill).train(training)
    bags, labels = [tiles(n, seed=n) for n in (1, 30, 3, 18)], (2, 0, 1, 1)

    def gradients(total):
        return torch.autograd.grad(total, list(model.parameters()))

    output = model(torch.cat(bags), Segments([len(bag) for bag in bags]), generator=generator())
    together = gradients(loss(model, output, *labels))
    one_by_one = generator()
    singles = [model(bag, generator=one_by_one) for bag in bags]
    torch.testing.assert_close(output.logits, torch.cat([single.logits for single in singles]))
    torch.testing.assert_close(output.group_logits, torch.cat([single.group_logits for single in singles]))
    each = [loss(model, single, label) for single, label in zip(singles, labels, strict=True)]
    torch.testing.assert_close(together, gradients(sum(each) / 4), rtol=1e-5, atol=1e-12)


@DISTILLATIONS
def test_each_tier_learns_from_its_own_loss(distill):
    model = make(distill=distill).train()
    first, second = (group["params"] for group in model.param_groups())
    assert {*map(id, first), *map(id, second)} == {*map(id, model.parameters())}
    terms = model.loss(model(tiles(30)), torch.tensor([1]))
    for term, own, other in ((terms["tier_1"], first, second), (terms["tier_2"], second, first)):
        reached = torch.autograd.grad(term, [*own, *other], allow_unused=True, retain_graph=True)
        assert all(gradient is not None for gradient in reached[: len(own)])
        assert all(gradient is None for gradient in reached[len(own) :])


@DISTILLATIONS
@pytest.mark.parametrize("n", [1, 2, 40])
def test_gradients_are_finite(distill, n):
    model = make(3, distill).train()
    loss(model, model(tiles(n)), 2).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    learns_attention = bool(gradients["attention.tanh.weight"].any())
    assert learns_attention == (n > 4), "a group of one tile has no attention to learn"


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="distill is 'mas', expected one of afs, maxs, maxmins"):
        make(distill="mas")
    with pytest.raises(ValueError, match="n_groups is 0, expected 1"):
        make(n_groups=0)
