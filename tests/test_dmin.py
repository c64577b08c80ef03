"""DMIN: each equation of the forward pass against float64 numpy, and the modes around them."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from hdmil_lib.errors import BagError
from hdmil_lib.kernels.random import draw_seed, logistic
from hdmil_lib.models import DMIN, PAPER_PRESETS, DMINSettings
from hdmil_lib.training.losses import bag_loss

SMALL = DMINSettings(in_dim=6, embed_dim=5, attention_dim=4, degree=12, dropout=0.0)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return DMIN(dataclasses.replace(SMALL, **changes)).double()


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
        "keep_ratio": m.any(1).mean(),
        "bag_teacher": np.stack(teacher),
        "bag_student": np.stack(student),
        "teacher_logits": np.array(y_teacher),
        "logits": np.array(y_student),
    }


def assert_equal(output, expected):
    for name, value in expected.items():
        # arccos of tanh loses about half of the digits where tanh is near 1.
        np.testing.assert_allclose(getattr(output, name).detach(), value, rtol=1e-7, atol=1e-8, err_msg=name)


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
    assert torch.equal(first.bag_student[0], second.bag_student[0])
    assert not torch.equal(first.bag_student[1], second.bag_student[1])


def test_a_given_mask_replaces_the_selection():
    """Two-stage inference: branch c pools the tiles that LIPN kept for it."""
    model, features = make().eval(), bag(8)
    mask = torch.rand(8, 2, generator=torch.Generator().manual_seed(3)) > 0.5
    output = model(features, mask=mask)
    f, a = output.embeddings.detach().numpy(), output.attention.detach().numpy()
    for c in range(2):
        kept = mask[:, c].numpy()
        expected = softmax(a[kept, c]) @ f[kept]
        np.testing.assert_allclose(output.bag_student[c].detach(), expected, rtol=1e-12)
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
    torch.testing.assert_close(output.bag_student, output.embeddings[best])
    bag_loss(model, output, 1)[0].backward()
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
    expected = [output.bag_student[c] @ model.heads[c].weight[0] + model.heads[c].bias[0] for c in range(2)]
    torch.testing.assert_close(output.logits, torch.stack(expected))
    assert isinstance(model.instance_heads[0], torch.nn.Linear)


def test_linear_start_reaches_all_heads():
    model = make(linear_start=True)
    for head in (*model.heads, *model.instance_heads):
        assert head.coefficients[..., 1].count_nonzero() > 0
        assert head.coefficients.count_nonzero() == head.coefficients[..., 1].count_nonzero()


def test_training_reaches_every_parameter():
    model, features = make(dropout=0.25).train(), bag(60)
    bag_loss(model, model(features), 0, subtyping=True)[0].backward()
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
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is "):
        DMIN(dataclasses.replace(SMALL, **wrong))


def test_defaults_and_presets_are_those_of_the_paper():
    default = DMINSettings()
    assert (default.in_dim, default.embed_dim, default.attention_dim, default.dropout) == (
        1024,
        512,
        256,
        0.25,
    )
    assert (default.temperature, default.threshold, default.n_classes) == (0.7, 0.5, 2)
    assert {
        name: (p.settings.degree, p.settings.keep_ratio, p.learning_rate, p.subtyping)
        for name, p in PAPER_PRESETS.items()
    } == {
        "camelyon16": (12, 0.6, 3e-4, False),
        "nsclc": (16, 0.7, 3e-5, True),
        "brca": (12, 0.7, 3e-4, True),
    }
    model = DMIN(default)
    assert model.heads[0].coefficients.shape == (512, 1, 13)
    assert model.instance_heads[1].coefficients.shape == (512, 2, 13)
