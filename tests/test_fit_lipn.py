"""Evidence that DMIN finds in single tiles, as a target for LIPN: formula by loops, loss, learning."""

import json
from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from bag_factory import DIM, make_bag, make_bags, make_data, make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from hdmil_lib.batches import BagDataset
from hdmil_lib.errors import BagError, CheckpointError
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import LIPN, create_model
from hdmil_lib.models.lipn import thresholds_for_keep_ratio
from hdmil_lib.training.fit import TrainSettings, fit
from hdmil_lib.training.lipn import (
    LIPNLossWeights,
    evidence_loss,
    evidence_targets,
    fit_lipn,
    lipn_loss,
    lipn_targets,
    turn_patches,
)

SMALL_DMIN = {"embed_dim": 16, "attention_dim": 8, "degree": 4}
SHORT = TrainSettings(learning_rate=3e-3, epochs=4, min_epochs=4, patience=4, batch_size=4)


def small_dmin(n_classes=2, seed=0, **options):
    torch.manual_seed(seed)
    return create_model("dmin", DIM, n_classes, **SMALL_DMIN, **options).eval()


def small_lipn(n_classes=2):
    torch.manual_seed(0)
    return LIPN(n_classes)


@pytest.fixture(scope="module")
def case():
    data = make_data()
    return data, make_split(data.slide_ids)


@pytest.fixture(scope="module")
def trained_dmin(case, tmp_path_factory):
    dmin = small_dmin(linear_start=True, keep_ratio=0.3, k=4)
    longer = replace(SHORT, epochs=15, min_epochs=15)
    fit(dmin, *case, longer, out=tmp_path_factory.mktemp("dmin"))
    return dmin


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("self_distillation", [True, False])
def test_evidence_is_that_of_tiles_asked_one_by_one(n_classes, self_distillation):
    dmin = small_dmin(n_classes, self_distillation=self_distillation).double()
    bags = {f"s{i}": make_bag(f"s{i}", i % 2, n) for i, n in enumerate((5, 1, 9))}
    labels = {s: i % n_classes for i, s in enumerate(bags)}
    found = evidence_targets(dmin, BagDataset(bags, labels), list(bags))
    alone, attention = {}, {}
    with torch.inference_mode():
        for s, bag in bags.items():
            outputs = [dmin(tile[None]) for tile in torch.from_numpy(bag.features).double()]
            alone[s] = [output.logits[0].softmax(0).numpy() for output in outputs]
            attention[s] = [float(output.attention.max().sigmoid()) for output in outputs]
    q = np.mean([np.mean(tiles, axis=0) for tiles in alone.values()], axis=0)
    for s, y in labels.items():
        expected = []
        for p, a in zip(alone[s], attention[s], strict=True):
            divergence = sum(p[c] * np.log(p[c] / q[c]) for c in range(n_classes)) / max(-np.log(q))
            expected.append(a * divergence if p[y] > q[y] else 0.0)
        # features reach the networks as float32 numbers, exactly; the rest is double
        np.testing.assert_allclose(found[s], expected, rtol=1e-6, atol=1e-12)
        assert found[s].ge(0).all()
        assert found[s].le(1).all()


def test_evidence_does_not_turn_on_the_names_of_the_classes():
    bags = {f"s{i}": make_bag(f"s{i}", i % 2, 6) for i in range(4)}
    labels = {s: i % 3 for i, s in enumerate(bags)}
    dmin = small_dmin(3)
    reference = evidence_targets(dmin, BagDataset(bags, labels), list(bags))
    for order in permutations(range(3)):
        renamed = small_dmin(3)
        renamed.load_state_dict(dmin.state_dict())
        renamed.heads = torch.nn.ModuleList(dmin.heads[c] for c in order)
        renamed.attention.score.weight.data = dmin.attention.score.weight[list(order)]
        renamed.attention.score.bias.data = dmin.attention.score.bias[list(order)]
        data = BagDataset(bags, {s: order.index(y) for s, y in labels.items()})
        found = evidence_targets(renamed, data, list(bags))
        for s in bags:
            torch.testing.assert_close(found[s], reference[s])


def test_evidence_of_a_trained_dmin_finds_the_tumor_and_little_in_normal_slides(case, trained_dmin):
    data, split = case
    found = evidence_targets(trained_dmin, data, split.train)
    values = torch.cat(list(found.values()))
    tumor = np.array([data.labels[s] and i < 4 for s in split.train for i in range(12)], bool)
    assert roc_auc_score(tumor, values) > 0.95
    normal = np.repeat([data.labels[s] == 0 for s in split.train], 12)
    assert values[torch.from_numpy(tumor)].mean() > 3 * values[torch.from_numpy(normal)].mean()


def test_masks_are_those_of_the_model_in_evaluation(case):
    data, split = case
    dmin = small_dmin()
    found = lipn_targets("mask", dmin, data, split.train)
    for s in split.train:
        with torch.inference_mode():
            expected = dmin(data.batch([s]).features).mask
        assert torch.equal(found[s], expected)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), n_classes=st.integers(2, 4))
def test_loss_is_the_mean_cross_entropy_of_bags(lengths, n_classes):
    generator = torch.Generator().manual_seed(sum(lengths))
    logits = 3 * torch.randn(sum(lengths), n_classes, generator=generator, dtype=torch.float64)
    target = torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    terms = evidence_loss(logits, target, Segments(lengths))
    expected, first = [], 0
    for n in lengths:
        errors = []
        for j in range(first, first + n):
            for p in (1 / (1 + np.exp(-logits[j].numpy()))).tolist():
                errors.append(-target[j] * np.log(p) - (1 - target[j]) * np.log(1 - p))
        expected.append(np.mean(errors))
        first += n
    assert list(terms) == ["evidence"]
    assert float(terms["evidence"]) == pytest.approx(np.mean(expected), rel=1e-9)


def test_loss_is_least_where_every_branch_says_the_target():
    target = torch.tensor([0.1, 0.5, 0.9])
    logits = target.logit()[:, None].repeat(1, 2).requires_grad_()
    evidence_loss(logits, target, Segments([3]))["evidence"].backward()
    torch.testing.assert_close(logits.grad, torch.zeros(3, 2), atol=1e-7, rtol=0)


def test_patches_take_all_positions_of_a_square_and_no_other():
    square = torch.arange(16 * 16 * 3).view(1, 16, 16, 3).to(torch.int16)
    torch.manual_seed(0)
    turned = turn_patches(square.repeat(400, 1, 1, 1))
    positions = {
        transformed.numpy().tobytes()
        for turn in range(4)
        for transformed in (torch.rot90(square[0], turn), torch.rot90(square[0], turn).flip(1))
    }
    counts = Counter(patch.numpy().tobytes() for patch in turned)
    assert len(positions) == 8
    assert set(counts) == positions
    # four standard deviations of a binomial count of 400 draws with probability 1/8
    assert list(counts.values()) == pytest.approx([50] * 8, abs=4 * np.sqrt(400 * 7 / 64))


def test_lipn_learns_evidence_and_stores_its_thresholds(case, trained_dmin, tmp_path):
    data, split = case
    lipn = small_lipn()
    longer = replace(SHORT, epochs=15, min_epochs=15)
    options = {"target": "evidence", "augment": True}
    history = fit_lipn(lipn, trained_dmin, *case, longer, out=tmp_path, **options)
    assert {"train_evidence", "train_loss", "val_loss", "val_auc", "keep_ratio"} <= set(history)
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    with torch.inference_mode():
        scores = torch.cat([lipn(data.batch([s]).patches) for s in split.test])
    tumor = [data.labels[s] and i < 4 for s in split.test for i in range(12)]
    assert all(roc_auc_score(tumor, branch) > 0.95 for branch in scores.T)
    assert len(json.loads((tmp_path / "config.json").read_text())["thresholds"]) == 2
    # validated at thresholds that keep the target ratio, but for a tile of each branch
    assert history["keep_ratio"].iloc[-1] == pytest.approx(0.3, abs=2 / 12)


def test_augmentation_is_drawn_from_the_seed(case, tmp_path):
    lipns = [small_lipn() for _ in range(3)]
    for i, (lipn, augment) in enumerate(zip(lipns, (True, True, False), strict=True)):
        torch.rand(i)  # the caller's generator has no say
        fit_lipn(lipn, small_dmin(), *case, SHORT, out=tmp_path / str(i), augment=augment)
    first, same, other = (lipn.classifier.weight for lipn in lipns)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_evidence_needs_no_self_distillation_but_masks_do(case, tmp_path):
    dmin = small_dmin(self_distillation=False)
    short = replace(SHORT, epochs=1)
    fit_lipn(small_lipn(), dmin, *case, short, out=tmp_path / "evidence", target="evidence")
    with pytest.raises(ValueError, match="selects no tiles"):
        fit_lipn(small_lipn(), dmin, *case, short, out=tmp_path / "mask")


def test_a_run_with_another_target_is_refused(case, tmp_path):
    short = replace(SHORT, epochs=1)
    fit_lipn(small_lipn(), small_dmin(), *case, short, out=tmp_path)
    with pytest.raises(CheckpointError, match="target mask, not evidence"):
        fit_lipn(small_lipn(), small_dmin(), *case, short, out=tmp_path, target="evidence")


def test_an_unknown_target_is_named(case, tmp_path):
    with pytest.raises(ValueError, match="'rank', expected 'mask' or 'evidence'"):
        fit_lipn(small_lipn(), small_dmin(), *case, SHORT, out=tmp_path, target="rank")


def tumor_selector():
    """A DMIN whose branches both select a tile where the mean of its first features exceeds 1.5."""
    dmin = small_dmin()
    with torch.no_grad():
        for parameter in dmin.parameters():
            parameter.zero_()
        dmin.projection[0].weight[0, : DIM // 2] = 2 / DIM
        dmin.attention.tanh.weight[0, 0], dmin.attention.tanh.bias[0] = 2.0, -3.0
        dmin.attention.score.weight[:, 0] = 10.0
        dmin.heads[1].coefficients[0, 0, :2] = torch.tensor([-3.0, 6.0])
    return dmin


def test_lipn_learns_what_dmin_selects_and_stores_its_thresholds(case, tmp_path):
    data, split = case
    dmin, lipn = tumor_selector(), small_lipn()
    before = {name: tensor.clone() for name, tensor in dmin.state_dict().items()}
    only_masks = LIPNLossWeights(rate=0.0)
    longer = replace(SHORT, epochs=8, min_epochs=8, batch_size=1, seed=3)
    fit_lipn(lipn, dmin, data, split, longer, out=tmp_path, weights=only_masks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dmin.state_dict().items())
    with torch.inference_mode():
        scores = torch.cat([lipn(data.batch([s]).patches).amin(1) for s in split.test])
        validation = [lipn(data.batch([s]).patches).sigmoid() for s in split.val]
    selected = [bool(data.labels[s]) and i < 4 for s in split.test for i in range(12)]
    assert roc_auc_score(selected, scores) > 0.95
    thresholds = json.loads((tmp_path / "config.json").read_text())["thresholds"]
    assert thresholds == thresholds_for_keep_ratio(validation, dmin.settings.keep_ratio).tolist()


def test_gradients_of_lipn_are_clipped(case, tmp_path):
    data, split = case
    torch.manual_seed(0)
    dmin, weights = small_dmin(), []
    for clip in (None, 1e-3):
        torch.manual_seed(1)
        lipn = small_lipn()
        fit_lipn(lipn, dmin, data, split, replace(SHORT, epochs=1, clip=clip), out=tmp_path / str(clip))
        weights.append(lipn.classifier.weight.detach())
    assert not torch.equal(*weights)


def test_lipn_of_another_dmin_is_refused(case, tmp_path):
    data, split = case
    short = replace(SHORT, epochs=1)
    fit_lipn(small_lipn(), small_dmin(seed=1), data, split, short, out=tmp_path)
    with pytest.raises(CheckpointError, match="dmin"):
        fit_lipn(small_lipn(), small_dmin(seed=2), data, split, short, out=tmp_path)


def test_bags_without_patches_are_refused(case, tmp_path):
    data, split = case
    bags, labels = make_bags()
    blind = BagDataset({s: replace(bag, patches=None) for s, bag in bags.items()}, labels)
    with pytest.raises(BagError, match="has no patches, which this model needs"):
        fit_lipn(small_lipn(), small_dmin(), blind, split, SHORT, out=tmp_path)


# The loss of LIPN on masks


def loss_case(n=30, n_classes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.rand(n, n_classes, generator=generator) > 0.6


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_loss_compares_masks_and_rates(n_classes, threshold):
    logits, target = loss_case(n_classes=n_classes)
    terms = lipn_loss(logits, target, 0.6, LIPNLossWeights(mask=3.0, rate=5.0), threshold=threshold)
    kept = expit(logits.detach().numpy()) > threshold
    differ = np.mean([np.mean(kept[:, c] != target[:, c].numpy()) for c in range(n_classes)])
    rate = (kept.any(1).mean() - 0.6) ** 2
    assert list(terms) == ["mask", "rate"]
    assert terms["mask"].item() == pytest.approx(3 * differ)
    assert terms["rate"].item() == pytest.approx(5 * rate)


def test_loss_weighs_the_rate_as_dmin_does_unless_told_otherwise():
    logits, target = loss_case()
    given_weights = lipn_loss(logits, target, 0.6, LIPNLossWeights(mask=1.0, rate=2.0))
    assert lipn_loss(logits, target, 0.6) == given_weights


def test_loss_of_bags_together_is_the_mean_of_single_bags():
    lengths = [3, 1, 17]
    logits, target = loss_case(sum(lengths))
    for keep_ratio in (0.6, None):
        together = lipn_loss(logits, target, keep_ratio, segments=Segments(lengths))
        parts = zip(logits.split(lengths), target.split(lengths), strict=True)
        alone = [lipn_loss(own, wanted, keep_ratio) for own, wanted in parts]
        for name, term in together.items():
            torch.testing.assert_close(term, torch.stack([terms[name] for terms in alone]).mean())


def test_loss_moves_logits_toward_the_target_through_the_sigmoid():
    """d/dP of |M - T| is sign(M - T) sigmoid'(P) where the masks differ and 0 where they agree."""
    logits, target = loss_case()
    sum(lipn_loss(logits, target, 0.6, LIPNLossWeights(rate=0.0)).values()).backward()
    soft = expit(logits.detach().numpy())
    expected = np.sign((soft > 0.5) - target.double().numpy()) * soft * (1 - soft) / target.numel()
    np.testing.assert_allclose(logits.grad, expected, rtol=1e-10, atol=1e-14)


def test_the_target_of_the_rate_may_be_the_rate_of_the_bag():
    logits, target = loss_case()
    share = target.any(1).double().mean().item()
    own = lipn_loss(logits, target, None)["rate"].item()
    assert own == pytest.approx(lipn_loss(logits, target, share)["rate"].item())
    assert own != pytest.approx(lipn_loss(logits, target, 0.1)["rate"].item())


def test_loss_leaves_dmin_alone():
    logits, _ = loss_case()
    target = torch.rand(30, 2, requires_grad=True)
    sum(lipn_loss(logits, target, None).values()).backward()
    assert target.grad is None


def test_loss_of_a_perfect_mask_at_the_target_rate_is_zero():
    logits, _ = loss_case()
    terms = lipn_loss(logits, logits > 0, None)
    assert sum(terms.values()).item() == pytest.approx(0, abs=1e-20)
