"""DMIN: each equation of the forward pass and of the loss against float64 numpy, and all modes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logsumexp, softmax
from scipy.stats import entropy

from hdmil_lib.errors import BagError
from hdmil_lib.kernels.random import draw_seed, logistic
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.kernels.self_distillation_pool import reference
from hdmil_lib.models import DMIN, LossWeights, create_model
from hdmil_lib.models.clustering import instance_clustering_loss, smooth_top1_svm
from hdmil_lib.reproduce.recipes import RECIPES

SMALL = {"embed_dim": 5, "attention_dim": 4, "degree": 12, "dropout": 0.0}
LN1000 = math.log(1000)
ONLY_RATE = LossWeights(teacher=0.0, clustering=0.0, embedding=0.0, prediction=0.0)


def make(seed=0, n_classes=2, **changes):
    torch.manual_seed(seed)
    return DMIN(6, n_classes, **SMALL | changes).double()


def bag(n=11, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def restate(model, features, noise=0.0, temperature=1.0):
    """The equations in the order of the paper, tile by tile and branch by branch, without torch."""
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    f = np.maximum(linear(features.numpy(), "projection.0"), 0)
    hidden = np.tanh(linear(f, "attention.tanh")) * expit(linear(f, "attention.gate"))
    a = linear(hidden, "attention.score")
    m = expit((a + noise) / temperature) > model.settings.threshold
    teacher, student, y_teacher, y_student = [], [], [], []
    for c in range(model.n_classes):
        teacher.append(softmax(a[:, c]) @ f)
        kept = m[:, c] if m[:, c].any() else a[:, c] == a[:, c].max()
        student.append(softmax(a[kept, c]) @ f[kept])
        omega = w[f"heads.{c}.coefficients"][:, 0]
        for pooled, answers in ((teacher[c], y_teacher), (student[c], y_student)):
            angles = np.arccos(np.tanh(pooled))
            answers.append(sum(np.cos(k * angles) @ omega[:, k] for k in range(omega.shape[1])))
    return {
        "embeddings": f,
        "attention": a,
        "mask": m,
        "keep_ratio": m.any(1).mean(keepdims=True),
        "bag_teacher": np.stack(teacher)[None],
        "bag_student": np.stack(student)[None],
        "teacher_logits": np.array(y_teacher)[None],
        "logits": np.array(y_student)[None],
    }


def assert_equal(output, expected):
    for name, value in expected.items():
        # arccos of tanh loses about half of the digits where tanh is near 1.
        found = getattr(output, name).detach()
        assert found.shape == value.shape, name
        np.testing.assert_allclose(found, value, rtol=1e-7, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("n", [1, 2, 40])
def test_evaluation_follows_the_equations_without_noise_or_temperature(n, n_classes):
    model, features = make(n_classes=n_classes, temperature=0.01, threshold=0.55).eval(), bag(n)
    assert_equal(model(features), restate(model, features))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_training_follows_the_equations_with_the_noise_of_the_generator(n_classes):
    model, features = make(n_classes=n_classes, temperature=0.7, threshold=0.6).train(), bag(40)
    output = model(features, generator=torch.Generator().manual_seed(5))
    noise = logistic(draw_seed(torch.Generator().manual_seed(5)), torch.empty(40, n_classes).double())
    assert_equal(output, restate(model, features, noise.numpy(), 0.7))


def test_selection_is_random_in_training_and_fixed_in_evaluation():
    model, features = make(), bag(200)
    first, second = model.train()(features).mask, model(features).mask
    assert not torch.equal(first, second)
    again = [model(features, generator=torch.Generator().manual_seed(1)).mask for _ in range(2)]
    assert torch.equal(*again)
    state = torch.get_rng_state()
    model.eval()
    assert torch.equal(model(features).mask, model(features).mask)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_reaches_embeddings_and_attention_in_training_alone():
    model, features = make(dropout=0.5), bag(30)
    first, second = model.train()(features), model(features)
    assert not torch.equal(first.embeddings, second.embeddings)
    assert_equal(model.eval()(features), restate(model, features))


def test_each_branch_pools_its_own_selection():
    """The student of branch c does not change with what branch 1 - c selects."""
    model, features = make().eval(), bag(6)
    mask = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0], [0, 0], [1, 0]], dtype=torch.bool)
    other = mask.clone()
    other[:, 1] = ~mask[:, 1]
    first, second = model(features, mask=mask), model(features, mask=other)
    assert torch.equal(first.bag_student[:, 0], second.bag_student[:, 0])
    assert not torch.equal(first.bag_student[:, 1], second.bag_student[:, 1])


def test_a_given_mask_replaces_the_selection():
    """Two-stage inference: branch c pools the tiles that LIPN kept for it."""
    model, features = make().eval(), bag(8)
    mask = torch.rand(8, 2, generator=torch.Generator().manual_seed(3)) > 0.5
    output = model(features, mask=mask)
    f, a = output.embeddings.detach().numpy(), output.attention.detach().numpy()
    for c in range(2):
        kept = mask[:, c].numpy()
        expected = softmax(a[kept, c]) @ f[kept]
        np.testing.assert_allclose(output.bag_student[0, c].detach(), expected, rtol=1e-12)
    assert output.keep_ratio.item() == pytest.approx(mask.any(1).double().mean().item())
    assert torch.equal(output.mask.bool(), mask)


def test_reading_only_the_kept_tiles_gives_the_same_answer_as_masking():
    """What makes the two-stage inference exact: tiles that no branch keeps leave no trace."""
    model, features = make().eval(), bag(20)
    mask = torch.rand(20, 2, generator=torch.Generator().manual_seed(4)) > 0.7
    kept = mask.any(1)
    assert 0 < kept.sum() < 20
    torch.testing.assert_close(
        model(features[kept], mask=mask[kept]).logits, model(features, mask=mask).logits
    )


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_selection_keeps_the_best_tile_of_the_branch(training):
    model, features = make().train(training), bag(9)
    with torch.no_grad():
        model.attention.score.bias.fill_(-100.0)  # no noise reaches the threshold from here
    output = model(features)
    assert output.mask.count_nonzero() == 0
    best = output.attention.argmax(0)
    torch.testing.assert_close(output.bag_student[0], output.embeddings[best])
    total_loss(model, output, 1).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_attention_of_any_size_stays_finite():
    model, features = make(), bag(9)
    with torch.no_grad():
        model.attention.score.weight.mul_(1e6)
    for training in (True, False):
        output = model.train(training)(features)
        assert output.attention.abs().max() > 1e4
        assert output.logits.isfinite().all()
        assert output.teacher_logits.isfinite().all()


def test_without_self_distillation_the_teacher_answers():
    model, features = make(self_distillation=False), bag()
    for training in (True, False):
        output = model.train(training)(features)
        assert output.mask is None
        assert output.keep_ratio is None
        assert torch.equal(output.logits, output.teacher_logits)
        assert torch.equal(output.bag_student, output.bag_teacher)


def test_linear_heads():
    model, features = make(head="linear").eval(), bag()
    output = model(features)
    expected = [
        output.bag_student[:, c] @ head.weight[0] + head.bias[0] for c, head in enumerate(model.heads)
    ]
    torch.testing.assert_close(output.logits, torch.stack(expected, 1))
    assert isinstance(model.instance_heads[0], torch.nn.Linear)


def test_linear_start_reaches_all_heads():
    model = make(linear_start=True)
    for head in (*model.heads, *model.instance_heads):
        assert head.coefficients[..., 1].count_nonzero() > 0
        assert head.coefficients.count_nonzero() == head.coefficients[..., 1].count_nonzero()


def test_training_reaches_every_parameter():
    model, features = make(dropout=0.25, subtyping=True).train(), bag(60)
    total_loss(model, model(features), 0).backward()
    untouched = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


def test_a_mask_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(BagError, match=r"shape \(7, 2\), expected \(8, 2\)"):
        make()(bag(8), mask=torch.ones(7, 2))
    with pytest.raises(BagError, match=r"shape \(8, 3\), expected \(8, 2\)"):
        make()(bag(8), mask=torch.ones(8, 3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_classes": 1},
        {"head": "mlp"},
        {"temperature": 0.0},
        {"threshold": 1.0},
        {"keep_ratio": 0.0},
        {"degree": 0},
        {"dropout": 1.0},
        {"embed_dim": -3},
        {"attention_dim": 2.5},
        {"k": 0},
        {"linear_start": "yes"},
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is "):
        make(**wrong)


def test_a_negative_weight_of_the_loss_is_refused_by_name():
    with pytest.raises(ValueError, match="rate"):
        LossWeights(rate=-1.0)


def test_settings_keep_all_arguments():
    weights = LossWeights(rate=3.0)
    model = make(n_classes=3, subtyping=True, k=5, detach_teacher=True, loss_weights=weights, threshold=0.4)
    found = model.settings
    assert (found.in_dim, found.n_classes, found.embed_dim, found.attention_dim) == (6, 3, 5, 4)
    assert (found.subtyping, found.k, found.detach_teacher, found.threshold) == (True, 5, True, 0.4)
    assert found.loss_weights == weights


def test_defaults_and_recipes_are_those_of_the_paper():
    default = DMIN(1024).settings
    assert (default.in_dim, default.embed_dim, default.attention_dim) == (1024, 512, 256)
    assert (default.dropout, default.temperature, default.threshold, default.n_classes) == (0.25, 0.7, 0.5, 2)
    assert (default.k, default.subtyping, default.detach_teacher) == (32, False, False)
    found = {}
    for name in ("camelyon16", "nsclc", "brca"):
        dmin = create_model("dmin", 1024, 2, **RECIPES[name].models["dmin"]).settings
        rate = RECIPES[name].training_of("dmin").learning_rate
        found[name] = (dmin.degree, dmin.keep_ratio, rate, dmin.subtyping)
        assert (dmin.embed_dim, dmin.attention_dim, dmin.k) == (512, 256, 32)
    assert found == {
        "camelyon16": (12, 0.6, 3e-4, False),
        "nsclc": (16, 0.7, 3e-5, True),
        "brca": (12, 0.7, 3e-4, True),
    }
    model = DMIN(1024)
    assert model.heads[0].coefficients.shape == (512, 1, 13)
    assert model.instance_heads[1].coefficients.shape == (512, 2, 13)


# The loss


def forward(n=20, seed=0, training=True, **changes):
    """A float64 model and its output on a bag of n tiles."""
    model = make(seed, keep_ratio=0.3, **changes).train(training)
    return model, model(torch.randn(n, 6, dtype=torch.float64))


def total_loss(model, output, *labels):
    return sum(model.loss(output, torch.tensor(labels)).values())


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


def test_svm_is_one_loss_per_instance():
    logits = torch.tensor([[1.0, 2], [3, -1], [0, 0]], dtype=torch.float64)
    loss = smooth_top1_svm(logits, torch.tensor([0, 1, 0]))
    assert loss.tolist() == pytest.approx([svm(1, 2), svm(-1, 3), svm(0, 0)])


# Instance clustering


def clustering(model, output, label, k=32, subtyping=False):
    args = output.embeddings.__getitem__, output.attention, torch.tensor([label]), output.segments
    return instance_clustering_loss(model.instance_heads, *args, k=k, subtyping=subtyping)


def clustering_by_loops(model, output, label, k, subtyping):
    k = max(1, min(k, len(output.embeddings) // 2))
    branches = []
    for branch, head in enumerate(model.instance_heads):
        order = np.argsort(output.attention[:, branch].detach().numpy())
        if branch == label:
            labeled = [(j, 1) for j in order[-k:]] + [(j, 0) for j in order[:k]]
        elif subtyping:
            labeled = [(j, 0) for j in order[-k:]]
        else:
            continue
        scores = head(output.embeddings).detach().numpy()
        branches.append(np.mean([svm(scores[j, y], scores[j, 1 - y]) for j, y in labeled]))
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


# The whole loss

PUBLISHED = {"teacher": 0.7, "clustering": 0.3, "embedding": 0.5, "prediction": 0.5, "rate": 2.0}


def terms_by_loops(model, output, label, k, subtyping=False):
    """The unweighted terms of one bag, from the output alone."""
    teacher, student = (v[0].detach().numpy() for v in (output.teacher_logits, output.logits))
    p_teacher, p_student = (np.exp(v - logsumexp(v)) for v in (teacher, student))
    bags = (output.bag_student - output.bag_teacher).detach().numpy()
    return {
        "teacher": -np.log(p_teacher[label]),
        "clustering": clustering_by_loops(model, output, label, k, subtyping),
        "embedding": np.mean(bags**2),
        "prediction": entropy(p_teacher, p_student),
        "rate": (output.mask.detach().numpy().max(1).mean() - 0.3) ** 2,
    }


@pytest.mark.parametrize(
    "weights", [PUBLISHED, dict(zip(PUBLISHED, (1.0, 3.0, 0.25, 2.0, 0.5), strict=True))]
)
@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("label", [0, 1])
def test_the_loss_is_the_weighted_sum_of_five_terms(label, subtyping, weights):
    model, output = forward(k=4, subtyping=subtyping, loss_weights=LossWeights(**weights))
    terms = model.loss(output, torch.tensor([label]))
    expected = terms_by_loops(model, output, label, 4, subtyping)
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(weights[name] * value, rel=1e-9, abs=1e-14), name
        assert terms[name].requires_grad
    total = sum(terms.values())
    assert total.item() == pytest.approx(sum(weights[name] * expected[name] for name in weights))


def test_the_weights_are_published_ones_unless_others_are_given():
    assert LossWeights().model_dump() == PUBLISHED
    assert make().settings.loss_weights == LossWeights()


def test_the_loss_of_bags_together_is_the_mean_of_single_bags():
    model = make(keep_ratio=0.3, k=4).eval()
    bags, labels = [bag(n, seed=n) for n in (9, 1, 30)], [1, 0, 1]
    together = model.loss(model(torch.cat(bags), Segments([9, 1, 30])), torch.tensor(labels))
    alone = [model.loss(model(one), torch.tensor([y])) for one, y in zip(bags, labels, strict=True)]
    for name, term in together.items():
        torch.testing.assert_close(term, torch.stack([terms[name] for terms in alone]).mean())


def test_the_divergence_is_that_of_the_student_from_the_teacher():
    """sum p_tea log(p_tea / p_stu): the other order has another value."""
    model, output = forward()
    apart = replace(
        output,
        logits=torch.tensor([[2.0, -1.0]], dtype=torch.float64),
        teacher_logits=torch.tensor([[0.0, 0.5]], dtype=torch.float64),
    )
    p_student, p_teacher = expit(3.0), expit(-0.5)
    expected = entropy([p_teacher, 1 - p_teacher], [p_student, 1 - p_student])
    reverse = entropy([p_student, 1 - p_student], [p_teacher, 1 - p_teacher])
    assert abs(expected - reverse) > 0.01
    assert model.loss(apart, torch.tensor([0]))["prediction"].item() == pytest.approx(0.5 * expected)


@pytest.mark.parametrize("detach_teacher", [False, True])
def test_distillation_moves_the_teacher_unless_detached(detach_teacher):
    only = LossWeights(teacher=0.0, clustering=0.0, rate=0.0)
    model, output = forward(loss_weights=only, detach_teacher=detach_teacher)
    output.teacher_logits.retain_grad()
    output.bag_teacher.retain_grad()
    total_loss(model, output, 0).backward()
    moved = [v.grad is not None and bool(v.grad.any()) for v in (output.teacher_logits, output.bag_teacher)]
    assert moved == [not detach_teacher] * 2
    assert model.heads[0].coefficients.grad.any()


def test_detaching_changes_gradients_but_not_values():
    results = []
    for detach_teacher in (False, True):
        model, output = forward(detach_teacher=detach_teacher)
        total = total_loss(model, output, 0)
        total.backward()
        results.append((total.item(), model.projection[0].weight.grad))
    (free, free_gradient), (detached, gradient) = results
    assert free == detached
    assert not torch.allclose(free_gradient, gradient)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_rate_term_measures_the_union_of_all_branches(n_classes, monkeypatch):
    """A tile kept by the last branch alone counts, also when there are three."""
    model, output = forward(n_classes=n_classes, training=False)
    attention = output.attention.detach().clone()
    attention[:, :-1] = -1.0
    attention[:, -1] -= attention[:, -1].median()
    monkeypatch.setattr(reference, "gated_attention", lambda *arguments: attention)
    output = model(bag(20))
    kept = (attention[:, -1] > 0).double().mean().item()
    assert 0 < kept < 1
    assert model.loss(output, torch.tensor([0]))["rate"].item() == pytest.approx(2 * (kept - 0.3) ** 2)


def test_the_rate_term_drives_the_noisy_keep_ratio_to_its_target():
    """On a fixed bag, in training mode: from about 0.75 of the tiles to r = 0.3."""
    torch.manual_seed(0)
    model = DMIN(6, **SMALL, keep_ratio=0.3, loss_weights=ONLY_RATE)
    features = torch.randn(300, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = model(features).keep_ratio.item()
    for _ in range(150):
        optimizer.zero_grad()
        total_loss(model, model(features), 0).backward()
        optimizer.step()
    after = np.mean([model(features).keep_ratio.item() for _ in range(10)])
    assert before > 0.6
    # The share of 300 draws at 0.3 has a standard error of 0.026, its mean over ten 0.008.
    assert after == pytest.approx(0.3, abs=0.05)


def test_without_self_distillation_only_the_teacher_terms_remain():
    model, output = forward(self_distillation=False)
    terms = model.loss(output, torch.tensor([0]))
    teacher = -output.teacher_logits.log_softmax(1)[0, 0].item()
    assert list(terms) == ["teacher", "clustering"]
    assert terms["teacher"].item() == pytest.approx(0.7 * teacher)
    assert terms["clustering"].item() == pytest.approx(0.3 * clustering_by_loops(model, output, 0, 32, False))


def test_all_terms_are_finite_on_a_bag_of_one_tile():
    model, output = forward(1, subtyping=True)
    terms = model.loss(output, torch.tensor([1]))
    sum(terms.values()).backward()
    assert all(t.isfinite() for t in terms.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert terms["embedding"] == 0  # one tile: teacher and student pool the same


@pytest.mark.parametrize("training", [False, True])
def test_forward_loss_and_backward_compile_without_a_break(training):
    """In evaluation nothing is random, and values and gradients are those of eager mode."""
    torch.manual_seed(0)
    settings = {"embed_dim": 16, "attention_dim": 8, "degree": 4}
    model, segments = create_model("dmin", 12, 2, **settings).train(training), Segments((9, 5))
    features, labels = torch.randn(14, 12), torch.tensor([0, 1])

    def step(features):
        return sum(model.loss(model(features, segments), labels).values())

    def results(function):
        loss = function(features)
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    compiled, eager = results(torch.compile(step, fullgraph=True)), results(step)
    assert all(t.isfinite().all() for t in compiled)
    if not training:
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
