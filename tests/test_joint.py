"""DMIN and LIPN fine-tuned together: better on kept tiles, resumable to the bit, blind to the test part."""

import copy
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import DIM, make_bags, make_data, make_split
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from hdmil_lib.batches import BagDataset
from hdmil_lib.errors import BagError, CheckpointError
from hdmil_lib.models import HDMIL, LIPN, create_model
from hdmil_lib.models.lipn import keep_mask, thresholds_for_keep_ratio
from hdmil_lib.splits import Split
from hdmil_lib.training import fit as loop
from hdmil_lib.training import joint
from hdmil_lib.training.fit import TrainSettings
from hdmil_lib.training.joint import fine_tune
from hdmil_lib.training.lipn import lipn_loss, predict_screened

SHORT = TrainSettings(learning_rate=1e-3, epochs=4, min_epochs=4, patience=4, seed=3, batch_size=2)
SMALL_DMIN = {"embed_dim": 16, "attention_dim": 8, "degree": 4}
FILES = ("model.safetensors", "lipn.safetensors")


@pytest.fixture(scope="module")
def case():
    data = make_data()
    return data, make_split(data.slide_ids)


@pytest.fixture(scope="module")
def start(case):
    """Networks that select the same tiles on every machine, with an error that training is certain to mend.

    LIPN is normalized by the statistics of the patches and each branch of DMIN selects half of all tiles, so
    that no score lies within rounding of its threshold. The first head is far too sure of its class.
    """
    data, split = case
    everything = data.batch(data.slide_ids)
    torch.manual_seed(0)
    dmin, lipn = create_model("dmin", DIM, 2, **SMALL_DMIN).eval(), LIPN(2)
    norms = [module for module in lipn.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        lipn.train()(everything.patches)
        for norm in norms:
            norm.momentum = 0.1
        dmin.attention.score.bias -= dmin(everything.features).attention.quantile(0.5, dim=0)
        dmin.heads[0].coefficients[..., 0] += 3 / SMALL_DMIN["embed_dim"]
        model = HDMIL(dmin, lipn)
        model = model.with_rules(thresholds=chosen_thresholds(model, data, split.val))
        for logits in (
            dmin(everything.features).attention,
            lipn(everything.patches) - model.thresholds.logit(),
        ):
            assert logits.abs().min() > 1e-5
    return model


def tune(model, case, folder, settings=SHORT, **options):
    """Fine-tune a copy; returns it, the thresholds that are stored, and the history."""
    model = copy.deepcopy(model)
    history = fine_tune(model, *case, settings, out=folder, **options)
    return model, json.loads((folder / "config.json").read_text())["thresholds"], history


def patches_of(data, slide_ids):
    return [data.batch([s]).patches for s in slide_ids]


@torch.inference_mode()
def chosen_thresholds(model, data, slide_ids):
    scores = [model.lipn(patches).sigmoid() for patches in patches_of(data, slide_ids)]
    return thresholds_for_keep_ratio(scores, model.dmin.settings.keep_ratio).tolist()


def validation_loss(model, case):
    data, split = case
    logits, kept = predict_screened(model, data, split.val)
    return float(cross_entropy(logits, torch.tensor([data.labels[s] for s in split.val]))), float(kept.mean())


def same_networks(one, other):
    return [
        all(torch.equal(a, b) for a, b in zip(*states, strict=True))
        for states in (
            (getattr(one, name).state_dict().values(), getattr(other, name).state_dict().values())
            for name in ("dmin", "lipn")
        )
    ]


def test_fine_tuning_lowers_the_two_stage_loss_and_reports_it(start, case, tmp_path):
    before, _ = validation_loss(start, case)
    model, thresholds, history = tune(start, case, tmp_path, replace(SHORT, epochs=8))
    after, kept = validation_loss(model, case)
    best = history.loc[history["val_loss"].idxmin()]
    assert after < before == pytest.approx(history["val_loss"].iloc[0], rel=1e-6)
    assert after == pytest.approx(best["val_loss"], rel=1e-6)
    assert kept == pytest.approx(best["keep_ratio"], rel=1e-6)
    stored = model.with_rules(thresholds=thresholds)
    assert validation_loss(stored, case) == (after, kept)


def test_both_networks_learn_and_all_that_inference_needs_is_left(start, case, tmp_path):
    model, thresholds, history = tune(start, case, tmp_path)
    data, split = case
    assert not any(network.training for network in (model, model.dmin, model.lipn))
    assert {p.name for p in tmp_path.iterdir()} == {*FILES, "config.json", "history.csv"}
    assert same_networks(model, start) == [False, False]
    for network, name in zip((model.dmin, model.lipn), FILES, strict=True):
        stored = load_file(tmp_path / name)
        assert all(torch.equal(stored[key], value) for key, value in network.state_dict().items())
    terms = {"teacher", "clustering", "embedding", "prediction", "rate", "lipn_mask", "lipn_rate", "loss"}
    assert {f"train_{t}" for t in terms} | {"epoch", "val_loss", "val_auc", "keep_ratio"} == set(history)
    assert history.filter(like="train_").iloc[0].isna().all()
    assert thresholds == chosen_thresholds(model, data, split.val)
    for buffer in (model.thresholds, model.trained_thresholds):
        assert torch.equal(buffer, torch.tensor(thresholds))


def test_dmin_learns_from_kept_tiles_alone_and_lipn_from_all(start, case, tmp_path):
    """Other features of the tiles that LIPN drops leave DMIN's terms of the loss as they are."""
    data, split = case
    bags, labels = make_bags()
    changed = {}
    for slide_id, bag in bags.items():
        batch = data.batch([slide_id])
        with torch.inference_mode():
            mask = keep_mask(start.lipn(batch.patches), start.thresholds, batch.segments)
        kept = mask.any(1).numpy()[:, None]
        changed[slide_id] = replace(bag, features=np.where(kept, bag.features, 3 - bag.features))
    one_step = replace(SHORT, epochs=2, batch_size=len(split.train))
    first, second = (
        tune(start, (BagDataset(each, labels), split), tmp_path / name, one_step)[2].iloc[1]
        for name, each in (("as_is", bags), ("changed", changed))
    )
    terms = [f"train_{t}" for t in ("teacher", "clustering", "embedding", "prediction", "rate")]
    np.testing.assert_allclose(first[terms], second[terms], rtol=1e-5, atol=1e-7)  # float32
    assert first["train_lipn_mask"] != pytest.approx(second["train_lipn_mask"], rel=1e-3)


def test_lipn_follows_the_current_dmin(start, case, tmp_path, monkeypatch):
    data, split = case
    targets = []

    def recorded(logits, target, *args, **options):
        targets.append(target.clone())
        return lipn_loss(logits, target, *args, **options)

    monkeypatch.setattr(joint, "lipn_loss", recorded)
    fast = replace(SHORT, learning_rate=3e-2, epochs=6, min_epochs=6)
    tune(start, (data, replace(split, train=("s01",))), tmp_path, fast)
    with torch.inference_mode():
        before = start.dmin(data.batch(["s01"]).features).mask
    assert torch.equal(targets[0], before)
    assert not torch.equal(targets[-1], before)


def test_fine_tuning_that_only_harms_changes_nothing(start, case, tmp_path):
    """The harm is certain: every validation slide comes twice, once under each label.

    Whatever is said of such a pair, its mean cross entropy is at least ln 2, and more unless both classes get
    the same logit. Heads of zeros give all slides equal logits; all that training teaches them does harm.
    """
    bags, labels = make_bags()
    _, split = case
    twins = {f"{s}-twin": s for s in split.val}
    bags |= {twin: replace(bags[s], slide_id=twin) for twin, s in twins.items()}
    labels |= {twin: 1 - labels[s] for twin, s in twins.items()}
    doubled = BagDataset(bags, labels), Split(split.train, (*split.val, *twins), split.test)

    undecided = copy.deepcopy(start)
    with torch.no_grad():
        for head in undecided.dmin.heads:
            head.coefficients.zero_()
    thresholds = chosen_thresholds(undecided, doubled[0], doubled[1].val)
    undecided = undecided.with_rules(thresholds=thresholds)
    fast = replace(SHORT, learning_rate=1e-2)
    model, stored, history = tune(undecided, doubled, tmp_path, fast)
    assert len(history) == fast.epochs
    assert history["val_loss"].iloc[0] == pytest.approx(np.log(2), rel=1e-6)
    assert (history["val_loss"].iloc[1:] > np.log(2) + 1e-3).all()  # far more than float32 rounds
    assert same_networks(model, undecided) == [True, True]
    assert stored == thresholds
    assert torch.equal(model.thresholds, undecided.thresholds)


@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(start, case, tmp_path, monkeypatch, after):
    whole, thresholds, history = tune(start, case, tmp_path / "whole")
    save_state, saved = loop.save_state, []

    def cut_off(*args):
        save_state(*args)
        saved.append(1)
        if len(saved) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", cut_off)
        with pytest.raises(KeyboardInterrupt):
            tune(start, case, tmp_path / "cut")
    assert not (tmp_path / "cut" / "history.csv").exists()
    resumed, again, resumed_history = tune(start, case, tmp_path / "cut")
    pd.testing.assert_frame_equal(resumed_history, history, check_exact=True)
    assert again == thresholds
    assert torch.equal(resumed.thresholds, whole.thresholds)
    for name in FILES:
        one, two = (load_file(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_finished_run_is_loaded_not_repeated(start, case, tmp_path, monkeypatch):
    model, thresholds, history = tune(start, case, tmp_path)
    monkeypatch.setattr(loop, "train_epoch", None)
    again, loaded_thresholds, loaded = tune(start, case, tmp_path)
    pd.testing.assert_frame_equal(loaded, history, check_exact=True)
    assert same_networks(model, again) == [True, True]
    assert loaded_thresholds == thresholds
    assert torch.equal(model.thresholds, again.thresholds)


def test_same_seed_same_weights_other_seed_other_weights(start, case, tmp_path):
    runs = []
    for i, seed in enumerate((1, 1, 2)):
        torch.rand(i)  # the caller's generator has no say
        runs.append(tune(start, case, tmp_path / str(i), replace(SHORT, epochs=2, seed=seed))[0])
    for network in ("dmin", "lipn"):
        first, same, other = (
            torch.cat([p.flatten() for p in getattr(run, network).parameters()]) for run in runs
        )
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


def test_the_test_part_is_not_looked_at(start, case, tmp_path):
    _, split = case
    bags, labels = make_bags()
    seen = (*split.train, *split.val)
    blind_data = BagDataset({s: bags[s] for s in seen}, {s: labels[s] for s in seen})
    whole = tune(start, case, tmp_path / "whole")[2]
    blind = tune(start, (blind_data, split), tmp_path / "blind")[2]
    pd.testing.assert_frame_equal(blind, whole, check_exact=True)


def test_bags_of_one_tile_are_fine_tuned(start, tmp_path):
    data = make_data(12, n_tiles=1)
    history = tune(start, (data, make_split(data.slide_ids)), tmp_path, replace(SHORT, epochs=2))[2]
    assert (history["keep_ratio"] == 1).all()
    assert history["val_loss"].notna().all()


def test_gradients_are_clipped_network_by_network(start, case):
    data, split = case
    model = copy.deepcopy(start)
    objective = joint.JointLearning(model, data, joint.LIPNLossWeights())
    optimizer = loop.make_optimizer(objective.param_groups(), SHORT)
    loop.train_epoch(objective, optimizer, data, split.train[:2], replace(SHORT, clip=1e-3))
    assert len(optimizer.param_groups) == 2
    for network, group in zip((model.dmin, model.lipn), optimizer.param_groups, strict=True):
        assert {*map(id, group["params"])} == {*map(id, network.parameters())}
        norm = torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_run_of_other_networks_is_refused(start, case, tmp_path):
    short = replace(SHORT, epochs=1)
    tune(start, case, tmp_path, short)
    other_lipn = HDMIL(start.dmin, LIPN(2), thresholds=start.thresholds)
    for other, named in ((other_lipn, "lipn"), (start.with_rules(thresholds=0.5), "thresholds")):
        with pytest.raises(CheckpointError, match=named):
            tune(other, case, tmp_path, short)


def test_what_cannot_be_fine_tuned_is_refused(start, case, tmp_path):
    plain = create_model("dmin", DIM, 2, **SMALL_DMIN, self_distillation=False)
    with pytest.raises(ValueError, match="selects no tiles"):
        tune(HDMIL(plain, start.lipn), case, tmp_path / "plain")
    assert not any(tmp_path.iterdir())
    bags, labels = make_bags()
    blind = BagDataset({s: replace(bag, patches=None) for s, bag in bags.items()}, labels)
    with pytest.raises(BagError, match="has no patches, which this model needs"):
        tune(start, (blind, case[1]), tmp_path / "blind")
