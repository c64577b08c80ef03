"""DSMIL against torchmil and closed forms in float64."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import nn
from torchmil.models.dsmil import DSMIL as Oracle

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.dsmil import DSMIL


def make(n_classes=2):
    torch.manual_seed(0)
    return DSMIL(6, n_classes, attention_dim=4).double()


def tiles(n, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(model, output, *labels):
    return sum(model.loss(output, torch.tensor(labels)).values())


def closed_form(model, features):
    """Scores of the critical tiles (C,), attention (N, C) and class scores (C,) of one bag, in numpy."""
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    features = features.numpy()

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    scores = linear(features, "instance_classifier")
    query = np.tanh(linear(np.maximum(linear(features, "query.0"), 0), "query.2"))
    kernel = w["classifier.weight"].reshape(
        model.n_classes, model.n_classes, -1
    )  # the weight of a Conv1d(C, C, D)
    attention, logits = [], w["classifier.bias"].copy()
    for c in range(model.n_classes):
        attention.append(query @ query[scores[:, c].argmax()] / np.sqrt(query.shape[1]))
        logits += kernel[:, c] @ (softmax(attention[-1]) @ features)
    return scores.max(0), np.stack(attention, 1), logits


@pytest.mark.parametrize("n", [1, 9])
def test_one_class_agrees_with_torchmil(n):
    """torchmil knows one class; its attention comes after the softmax."""
    model, features = make(n_classes=1), tiles(n)
    oracle = Oracle((6,), att_dim=4, nonlinear_q=True).double()
    oracle.q_nn.load_state_dict(model.query.state_dict())
    oracle.inst_classifier.load_state_dict(model.instance_classifier.state_dict())
    oracle.bag_classifier.load_state_dict(model.classifier.state_dict())
    score, attention, scores = oracle(features[None], return_att=True, return_inst_pred=True)
    output = model(features)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(output.logits[:, 0], score, **exact)
    torch.testing.assert_close(output.attention.softmax(0), attention[0], **exact)
    torch.testing.assert_close(output.critical_logits[:, 0], scores.max(1).values, **exact)


def test_the_bag_classifier_is_a_convolution_as_long_as_the_features():
    model = make(n_classes=3)
    convolution = nn.Conv1d(3, 3, 6).double()
    convolution.weight.data.copy_(model.classifier.weight.reshape(3, 3, 6))
    convolution.bias.data.copy_(model.classifier.bias)
    bags = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(model.classifier(bags.flatten(1)), convolution(bags).squeeze(2))


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("n", [1, 9])
def test_scores_and_losses_by_the_closed_form(n_classes, n):
    model, features = make(n_classes), tiles(n)
    critical, attention, logits = closed_form(model, features)
    output = model(features)
    np.testing.assert_allclose(output.attention.detach(), attention, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(output.logits.detach(), logits[None], rtol=1e-10, atol=1e-12)
    for label in range(n_classes):
        terms = model.loss(output, torch.tensor([label]))
        assert list(terms) == ["bag", "critical"]
        bag, tile = -0.5 * log_softmax(logits)[label], -0.5 * log_softmax(critical)[label]
        assert terms["bag"].item() == pytest.approx(bag, rel=1e-9)
        assert terms["critical"].item() == pytest.approx(tile, rel=1e-9)
        assert sum(terms.values()).item() == pytest.approx(bag + tile, rel=1e-9)


def test_weights_begin_orthogonal():
    for name, weight in make(n_classes=3).named_parameters():
        if name.endswith("bias"):
            assert not weight.any()
        else:
            wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
            identity = torch.eye(len(wide), dtype=wide.dtype)
            torch.testing.assert_close(wide @ wide.T, identity, rtol=0, atol=1e-6)  # drawn in float32


def test_bags_together_have_the_mean_gradient_of_bags_one_by_one():
    model = make(n_classes=3)
    bags, labels = [tiles(n, seed=n) for n in (1, 30, 7)], (2, 0, 1)

    def gradients(total):
        return torch.autograd.grad(total, list(model.parameters()))

    output = model(torch.cat(bags), Segments([len(bag) for bag in bags]))
    together = gradients(loss(model, output, *labels))
    singles = [model(bag) for bag in bags]
    torch.testing.assert_close(output.logits, torch.cat([single.logits for single in singles]))
    torch.testing.assert_close(output.attention, torch.cat([single.attention for single in singles]))
    each = [loss(model, single, label) for single, label in zip(singles, labels, strict=True)]
    torch.testing.assert_close(together, gradients(sum(each) / 3), rtol=1e-5, atol=1e-12)


def test_the_order_of_tiles_does_not_matter():
    model, features, order = make(), tiles(30), torch.randperm(30)
    straight, shuffled = model(features), model(features[order])
    torch.testing.assert_close(shuffled.logits, straight.logits)
    torch.testing.assert_close(shuffled.critical_logits, straight.critical_logits)
    torch.testing.assert_close(shuffled.attention, straight.attention[order])


@pytest.mark.parametrize("n", [1, 2, 40])
def test_training_reaches_every_weight_with_finite_gradients(n):
    model = make(n_classes=3).train()
    loss(model, model(tiles(n)), 1).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert bool(gradients["query.0.weight"].any()) == (n > 1), "the softmax over one tile has no gradient"
