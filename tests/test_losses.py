"""Each loss term against its closed form in float64, and every decision of the specification."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logsumexp
from scipy.stats import entropy

from hdmil_lib.kernels import gumbel_mask
from hdmil_lib.models import DMIN, DMINSettings, MeanPooling, MILOutput
from hdmil_lib.models.clustering import instance_clustering_loss, smooth_top1_svm
from hdmil_lib.training.losses import (
    LIPNLossWeights,
    LossWeights,
    bag_loss,
    dmin_loss,
    lipn_loss,
)

SETTINGS = DMINSettings(in_dim=6, embed_dim=5, attention_dim=4, dropout=0.0, keep_ratio=0.3)
LN1000 = math.log(1000)


def forward(n=20, seed=0, training=True, **changes):
    """A float64 model and its output on a bag of n tiles."""
    torch.manual_seed(seed)
    model = DMIN(dataclasses.replace(SETTINGS, **changes)).double().train(training)
    return model, model(torch.randn(n, 6, dtype=torch.float64))


def svm(true, other):
    """Smooth top-1 SVM as a log-sum-exp over margins, the hinge where one class is far ahead."""
    if abs(other - true) > LN1000:
        return max(0.0, 1 + other - true)
    return logsumexp([true, other + 1]) - true


# Smooth top-1 SVM


@settings(max_examples=50, deadline=None)
@given(st.floats(-30, 30), st.floats(-30, 30), st.integers(0, 1))
def test_svm_closed_form(first, second, label):
    scores = (first, second)
    loss = smooth_top1_svm(torch.tensor([scores], dtype=torch.float64), torch.tensor([label]))
    assert loss.item() == pytest.approx(svm(scores[label], scores[1 - label]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("sign", [-1, 1])
def test_svm_switches_to_the_hinge_beyond_ln_1000(sign):
    """Just before, log(1 + e^(1+z)); just after, max(0, 1+z), which is smaller by e^-(1+z) or so."""

    def loss(gap):
        return smooth_top1_svm(
            torch.tensor([[0.0, sign * gap]], dtype=torch.float64), torch.tensor([0])
        ).item()

    before, after = LN1000 - 1e-9, LN1000 + 1e-9
    assert loss(before) == pytest.approx(math.log1p(math.exp(1 + sign * before)), rel=1e-12)
    assert loss(after) == pytest.approx(max(0.0, 1 + sign * after), rel=1e-12)
    assert loss(before) - loss(after) > 1e-4


def test_svm_is_one_loss_an_instance():
    logits = torch.tensor([[1.0, 2], [3, -1], [0, 0]], dtype=torch.float64)
    loss = smooth_top1_svm(logits, torch.tensor([0, 1, 0]))
    assert loss.tolist() == pytest.approx([svm(1, 2), svm(-1, 3), svm(0, 0)])


# Instance clustering


def clustering(model, output, label, k=32, subtyping=False):
    args = output.embeddings, output.attention, torch.tensor([label]), output.cu_seqlens
    return instance_clustering_loss(model.instance_heads, *args, k=k, subtyping=subtyping)


def clustering_by_loops(model, output, label, k, subtyping):
    k = max(1, min(k, len(output.embeddings) // 2))
    branches = []
    for branch, head in enumerate(model.instance_heads):
        order = np.argsort(output.attention[:, branch].detach().numpy())
        if branch == label:
            labelled = [(j, 1) for j in order[-k:]] + [(j, 0) for j in order[:k]]
        elif subtyping:
            labelled = [(j, 0) for j in order[-k:]]
        else:
            continue
        scores = head(output.embeddings).detach().numpy()
        branches.append(np.mean([svm(scores[j, y], scores[j, 1 - y]) for j, y in labelled]))
    return np.mean(branches)


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(("n", "k"), [(20, 3), (20, 32), (7, 8), (3, 2), (2, 32), (1, 32)])
def test_clustering_labels_both_ends_of_the_attention(n, k, n_classes, subtyping):
    """k is at most half the bag and at least 1, where the released code stops with an error."""
    model, output = forward(n, n_classes=n_classes)
    for label in range(n_classes):
        loss = clustering(model, output, label, k, subtyping)
        expected = clustering_by_loops(model, output, label, k, subtyping)
        assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_clustering_trains_the_heads_that_take_part():
    for subtyping, reached in ((False, [False, True, False]), (True, [True, True, True])):
        model, output = forward(n_classes=3)
        clustering(model, output, 1, subtyping=subtyping).backward()
        assert [head.coefficients.grad is not None for head in model.instance_heads] == reached


# DMIN


def test_dmin_loss_is_the_weighted_sum_of_its_five_terms():
    model, output = forward()
    label = 1
    total, terms = dmin_loss(model, output, label, k=4)
    teacher, student = (v.detach().numpy() for v in (output.teacher_logits, output.logits))
    p_teacher, p_student = (np.exp(v - logsumexp(v)) for v in (teacher, student))
    bags = (output.bag_student - output.bag_teacher).detach().numpy()
    union = output.mask.detach().numpy().max(1).mean()
    expected = {
        "teacher": -np.log(p_teacher[label]),
        "clustering": clustering_by_loops(model, output, label, 4, False),
        "embedding": np.mean(bags**2),
        "prediction": entropy(p_teacher, p_student),
        "rate": (union - 0.3) ** 2,
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9, abs=1e-14), name
        assert not terms[name].requires_grad
    published = {"teacher": 0.7, "clustering": 0.3, "embedding": 0.5, "prediction": 0.5, "rate": 2.0}
    assert dataclasses.asdict(LossWeights()) == published
    assert total.item() == pytest.approx(sum(published[name] * expected[name] for name in published))


def test_the_divergence_is_that_of_the_student_from_the_teacher():
    """sum p_tea log(p_tea / p_stu): the other order has another value."""
    model, output = forward()
    apart = dataclasses.replace(
        output,
        logits=torch.tensor([2.0, -1.0], dtype=torch.float64),
        teacher_logits=torch.tensor([0.0, 0.5], dtype=torch.float64),
    )
    p_student, p_teacher = expit(3.0), expit(-0.5)
    expected = entropy([p_teacher, 1 - p_teacher], [p_student, 1 - p_student])
    reverse = entropy([p_student, 1 - p_student], [p_teacher, 1 - p_teacher])
    assert abs(expected - reverse) > 0.01
    assert dmin_loss(model, apart, 0)[1]["prediction"].item() == pytest.approx(expected)


@pytest.mark.parametrize("detach_teacher", [False, True])
def test_distillation_moves_the_teacher_unless_detached(detach_teacher):
    model, output = forward()
    output.teacher_logits.retain_grad()
    output.bag_teacher.retain_grad()
    only = LossWeights(teacher=0.0, clustering=0.0, rate=0.0)
    dmin_loss(model, output, 0, only, detach_teacher=detach_teacher)[0].backward()
    moved = [v.grad is not None and bool(v.grad.any()) for v in (output.teacher_logits, output.bag_teacher)]
    assert moved == [not detach_teacher] * 2
    assert model.heads[0].coefficients.grad.any()


def test_detaching_changes_gradients_but_not_values():
    model, output = forward()
    free, _ = dmin_loss(model, output, 0)
    detached, _ = dmin_loss(model, output, 0, detach_teacher=True)
    assert free.item() == detached.item()


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_rate_term_measures_the_union_of_all_branches(n_classes):
    """A tile kept by the last branch alone counts, also when there are three."""
    model, output = forward(n_classes=n_classes, training=False)
    attention = output.attention.clone()
    attention[:, :-1] = -1.0
    attention[:, -1] -= attention[:, -1].median()
    mask, keep_ratio = gumbel_mask(attention)
    output = dataclasses.replace(output, attention=attention, mask=mask, keep_ratio=keep_ratio)
    kept = (output.attention[:, -1] > 0).double().mean().item()
    assert 0 < kept < 1
    assert dmin_loss(model, output, 0)[1]["rate"].item() == pytest.approx((kept - 0.3) ** 2)


def test_the_rate_term_drives_the_noisy_keep_ratio_to_its_target():
    """On a fixed bag, in training mode: from about 0.75 of the tiles to r = 0.3."""
    torch.manual_seed(0)
    model = DMIN(SETTINGS)
    features = torch.randn(300, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    only = LossWeights(teacher=0.0, clustering=0.0, embedding=0.0, prediction=0.0)
    before = model(features).keep_ratio.item()
    for _ in range(150):
        optimizer.zero_grad()
        dmin_loss(model, model(features), 0, only)[0].backward()
        optimizer.step()
    after = np.mean([model(features).keep_ratio.item() for _ in range(10)])
    assert before > 0.6
    # The share of 300 draws at 0.3 has a standard error of 0.026, its mean over ten 0.008.
    assert after == pytest.approx(0.3, abs=0.05)


def test_without_self_distillation_only_the_teacher_terms_remain():
    model, output = forward(self_distillation=False)
    total, terms = dmin_loss(model, output, 0)
    assert list(terms) == ["teacher", "clustering"]
    assert total.item() == pytest.approx((0.7 * terms["teacher"] + 0.3 * terms["clustering"]).item())


def test_all_terms_are_finite_on_a_bag_of_one_tile():
    model, output = forward(1)
    total, terms = dmin_loss(model, output, 1, subtyping=True)
    total.backward()
    assert all(t.isfinite() for t in terms.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert terms["embedding"] == 0  # one tile: teacher and student pool the same


# LIPN


def lipn_case(n=30, n_classes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.rand(n, n_classes, generator=generator) > 0.6


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_lipn_loss_compares_masks_and_rates(n_classes, threshold):
    logits, target = lipn_case(n_classes=n_classes)
    total, terms = lipn_loss(logits, target, 0.6, LIPNLossWeights(mask=3.0, rate=5.0), threshold=threshold)
    kept = expit(logits.detach().numpy()) > threshold
    differ = np.mean([np.mean(kept[:, c] != target[:, c].numpy()) for c in range(n_classes)])
    rate = (kept.any(1).mean() - 0.6) ** 2
    assert terms["mask"].item() == pytest.approx(differ)
    assert terms["rate"].item() == pytest.approx(rate)
    assert total.item() == pytest.approx(3 * differ + 5 * rate)


def test_lipn_loss_moves_logits_toward_the_target_through_the_sigmoid():
    """d/dP of |M - T| is sign(M - T) sigmoid'(P) where the masks differ and 0 where they agree."""
    logits, target = lipn_case()
    lipn_loss(logits, target, 0.6, LIPNLossWeights(rate=0.0))[0].backward()
    soft = expit(logits.detach().numpy())
    expected = np.sign((soft > 0.5) - target.double().numpy()) * soft * (1 - soft) / target.numel()
    np.testing.assert_allclose(logits.grad, expected, rtol=1e-10, atol=1e-14)


def test_lipn_rate_target_may_be_the_rate_of_the_bag():
    logits, target = lipn_case()
    union = target.any(1).double().mean().item()
    own = lipn_loss(logits, target, None)[1]["rate"].item()
    assert own == pytest.approx(lipn_loss(logits, target, union)[1]["rate"].item())
    assert own != pytest.approx(lipn_loss(logits, target, 0.1)[1]["rate"].item())


def test_lipn_loss_leaves_dmin_alone():
    logits, _ = lipn_case()
    target = torch.rand(30, 2, requires_grad=True)
    lipn_loss(logits, target, None)[0].backward()
    assert target.grad is None


def test_lipn_loss_of_a_perfect_mask_at_the_target_rate_is_zero():
    logits, _ = lipn_case()
    total, _ = lipn_loss(logits, logits > 0, None)
    assert total.item() == pytest.approx(0, abs=1e-20)


# Dispatch


def test_bag_loss_is_cross_entropy_for_plain_models():
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    model = MeanPooling(4, 3)
    total, terms = bag_loss(
        model, MILOutput(logits=logits, cu_seqlens=torch.tensor([0, 1])), 1, subtyping=True
    )
    assert total.item() == pytest.approx(logsumexp(logits.numpy()) + 1.0)
    assert terms["bag"].item() == total.item()


def test_bag_loss_is_dmin_loss_for_dmin_with_its_weights_and_options():
    model, output = forward()
    weights = LossWeights(clustering=3.0)
    total, terms = bag_loss(model, output, 1, weights, subtyping=True, k=2, detach_teacher=True)
    expected, _ = dmin_loss(model, output, 1, weights, subtyping=True, k=2, detach_teacher=True)
    assert total.item() == expected.item()
    assert terms["clustering"].item() == pytest.approx(clustering_by_loops(model, output, 1, 2, True))
