"""Evidence that DMIN finds in single tiles, as a target for LIPN: formula by loops, loss, learning."""

import json
from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from bag_factory import DIM, make_bag, make_bags, make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hdmil_lib.errors import CheckpointError
from hdmil_lib.models import LIPN, build_model
from hdmil_lib.models.ragged import cumulative
from hdmil_lib.training.lipn import (
    evidence_loss,
    evidence_targets,
    lipn_targets,
    turn_patches,
)
from hdmil_lib.batches import RaggedBags
from hdmil_lib.training.fit import TrainSettings, train_lipn, train_model

SMALL_DMIN = {"embed_dim": 16, "attention_dim": 8, "degree": 4}
SHORT = TrainSettings(learning_rate=3e-3, epochs=4, min_epochs=4, patience=4, batch_size=4)


def small_dmin(n_classes=2, seed=0, **options):
    torch.manual_seed(seed)
    return build_model("dmin", DIM, n_classes, **SMALL_DMIN, **options).eval()


def small_lipn(n_classes=2):
    torch.manual_seed(0)
    return LIPN(n_classes)


@pytest.fixture(scope="module")
def data():
    bags, labels = make_bags()
    return bags, make_split(bags), labels


@pytest.fixture(scope="module")
def trained_dmin(data, tmp_path_factory):
    dmin = small_dmin(linear_start=True, keep_ratio=0.3)
    longer = replace(SHORT, epochs=15, min_epochs=15)
    train_model(dmin, *data, longer, tmp_path_factory.mktemp("dmin"), loss_options={"k": 4})
    return dmin


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("self_distillation", [True, False])
def test_evidence_is_that_of_tiles_asked_one_by_one(n_classes, self_distillation):
    dmin = small_dmin(n_classes, self_distillation=self_distillation).double()
    bags = {f"s{i}": make_bag(f"s{i}", i % 2, n) for i, n in enumerate((5, 1, 9))}
    labels = {s: i % n_classes for i, s in enumerate(bags)}
    found = evidence_targets(dmin, RaggedBags(bags, list(bags)), list(bags), labels)
    alone, attention = {}, {}
    with torch.inference_mode():
        for s, bag in bags.items():
            outputs = [dmin(tile[None]) for tile in torch.from_numpy(bag.features).double()]
            alone[s] = [output.logits.softmax(0).numpy() for output in outputs]
            attention[s] = [float(output.attention.max().sigmoid()) for output in outputs]
    q = np.mean([np.mean(tiles, axis=0) for tiles in alone.values()], axis=0)
    for s, y in labels.items():
        expected = []
        for p, a in zip(alone[s], attention[s], strict=True):
            divergence = sum(p[c] * np.log(p[c] / q[c]) for c in range(n_classes)) / max(-np.log(q))
            expected.append(a * divergence if p[y] > q[y] else 0.0)
        # features reach the networks as float32 numbers, exactly; the rest is double
        np.testing.assert_allclose(found[s], expected, rtol=1e-6, atol=1e-12)
        assert found[s].ge(0).all() and found[s].le(1).all()


def test_evidence_does_not_turn_on_the_names_of_the_classes():
    bags = {f"s{i}": make_bag(f"s{i}", i % 2, 6) for i in range(4)}
    data, labels = RaggedBags(bags, list(bags)), {s: i % 3 for i, s in enumerate(bags)}
    dmin = small_dmin(3)
    reference = evidence_targets(dmin, data, list(bags), labels)
    for order in permutations(range(3)):
        renamed = small_dmin(3)
        renamed.load_state_dict(dmin.state_dict())
        renamed.heads = torch.nn.ModuleList(dmin.heads[c] for c in order)
        renamed.attention.score.weight.data = dmin.attention.score.weight[list(order)]
        renamed.attention.score.bias.data = dmin.attention.score.bias[list(order)]
        found = evidence_targets(renamed, data, list(bags), {s: order.index(y) for s, y in labels.items()})
        for s in bags:
            torch.testing.assert_close(found[s], reference[s])


def test_evidence_of_a_trained_dmin_finds_the_tumor_and_little_in_normal_slides(data, trained_dmin):
    bags, split, labels = data
    found = evidence_targets(trained_dmin, RaggedBags(bags, split.train), split.train, labels)
    values = torch.cat(list(found.values()))
    tumor = np.array([labels[s] and i < 4 for s in split.train for i in range(12)], bool)
    assert roc_auc_score(tumor, values) > 0.95
    normal = np.repeat([labels[s] == 0 for s in split.train], 12)
    assert values[torch.from_numpy(tumor)].mean() > 3 * values[torch.from_numpy(normal)].mean()


def test_masks_are_those_of_the_model_in_evaluation(data):
    bags, split, labels = data
    dmin = small_dmin()
    found = lipn_targets("mask", dmin, RaggedBags(bags, split.train), split.train, labels)
    for s in split.train:
        with torch.inference_mode():
            expected = dmin(torch.from_numpy(bags[s].features).float()).mask
        assert torch.equal(found[s], expected)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), n_classes=st.integers(2, 4))
def test_loss_is_the_mean_cross_entropy_of_bags(lengths, n_classes):
    generator = torch.Generator().manual_seed(sum(lengths))
    logits = 3 * torch.randn(sum(lengths), n_classes, generator=generator, dtype=torch.float64)
    target = torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    loss, terms = evidence_loss(logits, target, cumulative(lengths))
    expected, first = [], 0
    for n in lengths:
        errors = []
        for j in range(first, first + n):
            for p in (1 / (1 + np.exp(-logits[j].numpy()))).tolist():
                errors.append(-target[j] * np.log(p) - (1 - target[j]) * np.log(1 - p))
        expected.append(np.mean(errors))
        first += n
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-9)
    assert float(terms["evidence"]) == float(loss)


def test_loss_is_least_where_every_branch_says_the_target():
    target = torch.tensor([0.1, 0.5, 0.9])
    logits = target.logit()[:, None].repeat(1, 2).requires_grad_()
    evidence_loss(logits, target, torch.tensor([0, 3]))[0].backward()
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
    assert len(positions) == 8 and set(counts) == positions
    # four standard deviations of a binomial count of 400 draws with probability 1/8
    assert list(counts.values()) == pytest.approx([50] * 8, abs=4 * np.sqrt(400 * 7 / 64))


def test_lipn_learns_evidence_and_stores_its_thresholds(data, trained_dmin, tmp_path):
    bags, split, labels = data
    lipn = small_lipn()
    longer = replace(SHORT, epochs=15, min_epochs=15)
    options = {"target": "evidence", "augment": True}
    history = train_lipn(lipn, trained_dmin, *data, longer, tmp_path, **options)
    assert {"train_evidence", "train_loss", "val_loss", "val_auc", "keep_ratio"} <= set(history)
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    with torch.inference_mode():
        scores = torch.cat([lipn(torch.from_numpy(bags[s].patches)) for s in split.test])
    tumor = [labels[s] and i < 4 for s in split.test for i in range(12)]
    assert all(roc_auc_score(tumor, branch) > 0.95 for branch in scores.T)
    assert len(json.loads((tmp_path / "config.json").read_text())["thresholds"]) == 2
    # validated at thresholds that keep the target ratio, but for a tile of each branch
    assert history["keep_ratio"].iloc[-1] == pytest.approx(0.3, abs=2 / 12)


def test_augmentation_is_drawn_from_the_seed(data, tmp_path):
    lipns = [small_lipn() for _ in range(3)]
    for i, (lipn, augment) in enumerate(zip(lipns, (True, True, False), strict=True)):
        torch.rand(i)  # the caller's generator has no say
        train_lipn(lipn, small_dmin(), *data, SHORT, tmp_path / str(i), augment=augment)
    first, same, other = (lipn.classifier.weight for lipn in lipns)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_evidence_needs_no_self_distillation_but_masks_do(data, tmp_path):
    dmin = small_dmin(self_distillation=False)
    short = replace(SHORT, epochs=1)
    train_lipn(small_lipn(), dmin, *data, short, tmp_path / "evidence", target="evidence")
    with pytest.raises(ValueError, match="selects no tiles"):
        train_lipn(small_lipn(), dmin, *data, short, tmp_path / "mask")


def test_a_run_with_another_target_is_refused(data, tmp_path):
    short = replace(SHORT, epochs=1)
    train_lipn(small_lipn(), small_dmin(), *data, short, tmp_path)
    with pytest.raises(CheckpointError, match=r"'target': 'mask'.*'target': 'evidence'"):
        train_lipn(small_lipn(), small_dmin(), *data, short, tmp_path, target="evidence")


def test_an_unknown_target_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="'rank', expected 'mask' or 'evidence'"):
        train_lipn(small_lipn(), small_dmin(), *data, SHORT, tmp_path, target="rank")
