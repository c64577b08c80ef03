"""CLAM against torchmil (bag path of one branch) and closed forms in float64 (branches, instance loss)."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, logsumexp, softmax
from torch import nn
from torchmil.models.clam import CLAM_SB

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.clam import CLAM

BRANCHES = pytest.mark.parametrize("multi_branch", [False, True])


def make(n_classes=2, **settings):
    torch.manual_seed(0)
    return CLAM(6, n_classes, embed_dim=5, attention_dim=4, **{"dropout": 0.0} | settings).double()


def tiles(n, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(model, output, *labels):
    return sum(model.loss(output, torch.tensor(labels)).values())


def closed_form(model, features):
    """Embeddings (N, E), attention (N, A) and class scores (C,) of one bag, in numpy."""
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    embeddings = np.maximum(linear(features.numpy(), "projection.0"), 0)
    hidden = np.tanh(linear(embeddings, "attention.tanh")) * expit(linear(embeddings, "attention.gate"))
    attention = linear(hidden, "attention.score")
    logits = []
    for c in range(model.n_classes):
        branch = attention[:, c if attention.shape[1] > 1 else 0]
        bag = softmax(branch) @ embeddings
        logits.append(bag @ w["classifier.weight"][c] + w["classifier.bias"][c])
    return embeddings, attention, np.array(logits)


def instance_loss(model, embeddings, attention, label, k, subtyping):
    """The clustering loss of one bag, tile by tile, each by the definition of the smooth top-1 SVM."""
    k = max(1, min(k, len(embeddings) // 2))
    branches = []
    for c, head in enumerate(model.instance_heads):
        order = np.argsort(attention[:, c if attention.shape[1] > 1 else 0])
        labeled = [(j, int(c == label)) for j in order[-k:]]
        labeled += [(j, 0) for j in order[:k]] if c == label else []
        if c != label and not subtyping:
            continue
        scores = embeddings @ head.weight.detach().numpy().T + head.bias.detach().numpy()
        margins = [(scores[j, y], scores[j, 1 - y]) for j, y in labeled]
        assert all(abs(true - other) < math.log(1000) for true, other in margins), "the hinge is not tested"
        branches.append(np.mean([logsumexp([true, other + 1]) - true for true, other in margins]))
    return np.mean(branches)


def test_bag_path_of_one_branch_agrees_with_torchmil():
    """torchmil scores one class: each of ours in turn.

    Its instance loss is no oracle: its SVM takes labels as a column alone, and then gives another value than
    its definition; tiles of a bag of fewer than 2 k are at both ends; and the two branches are summed.
    """
    model, features = make(n_classes=3), tiles(9)
    oracle = CLAM_SB((5,), att_dim=4, gated=True).double()
    oracle.feat_ext = torch.nn.Sequential(*model.projection)
    oracle.pool.fc1.module.load_state_dict(model.attention.tanh.state_dict())
    oracle.pool.fc_gated.module.load_state_dict(model.attention.gate.state_dict())
    oracle.pool.fc2.weight.data.copy_(model.attention.score.weight)
    output = model(features)
    for c in range(3):
        oracle.classifier.module.weight.data.copy_(model.classifier.weight[c : c + 1])
        oracle.classifier.module.bias.data.copy_(model.classifier.bias[c : c + 1])
        score, attention = oracle(features[None], return_att=True)
        torch.testing.assert_close(output.logits[:, c], score, rtol=1e-12, atol=1e-12)
        shifted = attention[0] + model.attention.score.bias  # torchmil's score layer has no bias
        torch.testing.assert_close(output.attention[:, 0], shifted, rtol=1e-12, atol=1e-12)


@BRANCHES
@pytest.mark.parametrize("n_classes", [2, 4])
def test_scores_by_the_closed_form(multi_branch, n_classes):
    model, features = make(n_classes, multi_branch=multi_branch), tiles(9)
    _, attention, logits = closed_form(model, features)
    output = model(features)
    assert output.attention.shape == (9, n_classes if multi_branch else 1)
    np.testing.assert_allclose(output.attention.detach(), attention, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(output.logits.detach(), logits[None], rtol=1e-10, atol=1e-12)


@BRANCHES
@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize(("n", "k"), [(20, 3), (20, 8), (7, 8), (2, 8), (1, 8)])
def test_loss_by_the_closed_form_also_where_k_exceeds_the_bag(multi_branch, subtyping, n, k):
    model, features = make(3, multi_branch=multi_branch, subtyping=subtyping, k=k), tiles(n)
    embeddings, attention, logits = closed_form(model, features)
    for label in range(3):
        terms = model.loss(model(features), torch.tensor([label]))
        assert list(terms) == ["bag", "clustering"]
        bag = -0.7 * log_softmax(logits)[label]
        clustering = 0.3 * instance_loss(model, embeddings, attention, label, k, subtyping)
        assert terms["bag"].item() == pytest.approx(bag, rel=1e-9)
        assert terms["clustering"].item() == pytest.approx(clustering, rel=1e-9)
        assert sum(terms.values()).item() == pytest.approx(bag + clustering, rel=1e-9)


@BRANCHES
def test_bags_together_have_the_mean_gradient_of_bags_one_by_one(multi_branch):
    model = make(3, multi_branch=multi_branch, subtyping=True)
    bags, labels = [tiles(n, seed=n) for n in (1, 30, 7)], (2, 0, 1)

    def gradients(total):
        return torch.autograd.grad(total, list(model.parameters()))

    output = model(torch.cat(bags), Segments([len(bag) for bag in bags]))
    together = gradients(loss(model, output, *labels))
    singles = [model(bag) for bag in bags]
    torch.testing.assert_close(output.logits, torch.cat([single.logits for single in singles]))
    each = [loss(model, single, label) for single, label in zip(singles, labels, strict=True)]
    torch.testing.assert_close(together, gradients(sum(each) / 3), rtol=1e-5, atol=1e-12)


@BRANCHES
def test_the_order_of_tiles_does_not_matter(multi_branch):
    model, features, order = make(multi_branch=multi_branch), tiles(30), torch.randperm(30)
    straight, shuffled = model(features), model(features[order])
    torch.testing.assert_close(shuffled.logits, straight.logits)
    torch.testing.assert_close(shuffled.attention, straight.attention[order])
    for label in range(2):
        losses = [loss(model, output, label) for output in (straight, shuffled)]
        torch.testing.assert_close(*losses)


@BRANCHES
@pytest.mark.parametrize("n", [1, 2, 40])
def test_training_reaches_every_weight_with_finite_gradients(multi_branch, n):
    model = make(3, multi_branch=multi_branch, subtyping=True, dropout=0.25).train()
    for bias in (layer.bias for layer in model.modules() if isinstance(layer, nn.Linear)):
        nn.init.constant_(bias, 0.5)  # no embedding is dead
    output = model(tiles(n))
    loss(model, output, 1).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    learns_attention = bool(gradients["attention.tanh.weight"].any())
    assert learns_attention == (n > 1), "the softmax over one tile has no gradient"


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="k is 0, expected 1"):
        make(k=0)
    with pytest.raises(ValueError, match="bag_weight is 1.5, expected a share"):
        make(bag_weight=1.5)
