"""DMIN and LIPN fine-tuned together: better on kept tiles, resumable to the bit, blind to the test part."""

import copy
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import DIM, make_bags, make_split
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from hdmil_lib.errors import CheckpointError
from hdmil_lib.models import LIPN, build_model
from hdmil_lib.training import joint, trainer
from hdmil_lib.training.joint import fine_tune
from hdmil_lib.training.losses import lipn_loss
from hdmil_lib.batches import RaggedBags
from hdmil_lib.training.fit import TrainSettings, predict_two_stage, train_lipn, train_model
from hdmil_lib.training.two_stage import calibrate_thresholds, lipn_mask

SHORT = TrainSettings(learning_rate=1e-3, epochs=4, min_epochs=4, patience=4, seed=3, batch_size=2)
SMALL_DMIN = {"embed_dim": 16, "attention_dim": 8, "degree": 4}
FILES = ("model.safetensors", "lipn.safetensors")


@pytest.fixture(scope="module")
def data():
    bags, labels = make_bags()
    return bags, make_split(bags), labels


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A DMIN and a LIPN trained for a few epochs, and the thresholds of the latter."""
    bags, split, labels = data
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    dmin, lipn = build_model("dmin", DIM, 2, **SMALL_DMIN), LIPN(2)
    train_model(dmin, bags, split, labels, SHORT, folder / "dmin")
    with torch.no_grad():  # so short a training selects no tile: let each branch select half of all
        tiles = torch.cat([torch.from_numpy(bag.features).float() for bag in bags.values()])
        dmin.attention.score.bias -= dmin(tiles).attention.median(0).values
    train_lipn(lipn, dmin, bags, split, labels, SHORT, folder / "lipn")
    return dmin, lipn, json.loads((folder / "lipn" / "config.json").read_text())["thresholds"]


def tune(trained, data, folder, settings=SHORT, **options):
    """Fine-tune copies; returns them, the thresholds and the history."""
    dmin, lipn, thresholds = copy.deepcopy(trained)
    history = fine_tune(dmin, lipn, thresholds, *data, settings, folder, **options)
    return dmin, lipn, json.loads((folder / "config.json").read_text())["thresholds"], history


def validation_loss(dmin, lipn, thresholds, data):
    bags, split, labels = data
    held = RaggedBags(bags, split.val, ("features", "patches"))
    logits, kept = predict_two_stage(dmin, lipn, held, split.val, thresholds)
    return float(cross_entropy(logits, torch.tensor([labels[s] for s in split.val]))), float(kept.mean())


def test_fine_tuning_lowers_the_two_stage_loss_and_reports_it(trained, data, tmp_path):
    before, _ = validation_loss(*trained, data)
    *result, history = tune(trained, data, tmp_path, replace(SHORT, epochs=8))
    after, kept = validation_loss(*result, data)
    best = history.loc[history["val_loss"].idxmin()]
    assert after < before == pytest.approx(history["val_loss"].iloc[0], rel=1e-6)
    assert after == pytest.approx(best["val_loss"], rel=1e-6)
    assert kept == pytest.approx(best["keep_ratio"], rel=1e-6)


def test_both_networks_learn_and_all_that_inference_needs_is_left(trained, data, tmp_path):
    dmin, lipn, thresholds, history = tune(trained, data, tmp_path)
    assert not dmin.training and not lipn.training
    names = {*FILES, "config.json", "history.csv"}
    assert {p.name for p in tmp_path.iterdir()} == names
    for network, old, name in zip((dmin, lipn), trained, FILES, strict=False):
        stored = load_file(tmp_path / name)
        assert all(torch.equal(stored[key], value) for key, value in network.state_dict().items())
        assert any(not torch.equal(a, b) for a, b in zip(network.parameters(), old.parameters(), strict=True))
    terms = {"teacher", "clustering", "embedding", "prediction", "rate", "lipn_mask", "lipn_rate", "loss"}
    assert {f"train_{t}" for t in terms} | {"epoch", "val_loss", "val_auc", "keep_ratio"} == set(history)
    patches = [torch.from_numpy(data[0][s].patches) for s in data[1].val]
    assert thresholds == calibrate_thresholds(lipn, patches, dmin.settings.keep_ratio)


def test_dmin_learns_from_kept_tiles_alone_and_lipn_from_all(trained, data, tmp_path):
    """Other features of the tiles that LIPN drops leave DMIN's terms of the loss as they are."""
    bags, split, labels = data
    _, lipn, thresholds = trained
    changed = {}
    for slide_id, bag in bags.items():
        with torch.inference_mode():
            kept = lipn_mask(lipn(torch.from_numpy(bag.patches)), thresholds).any(1).numpy()
        changed[slide_id] = replace(bag, features=np.where(kept[:, None], bag.features, 3 - bag.features))
    one_step = replace(SHORT, epochs=2, batch_size=len(split.train))
    first, second = (
        tune(trained, (each, split, labels), tmp_path / name, one_step)[3].iloc[1]
        for name, each in (("as_is", bags), ("changed", changed))
    )
    terms = [f"train_{t}" for t in ("teacher", "clustering", "embedding", "prediction", "rate")]
    np.testing.assert_allclose(first[terms], second[terms], rtol=1e-5, atol=1e-7)  # float32
    assert first["train_lipn_mask"] != pytest.approx(second["train_lipn_mask"], rel=1e-3)


def test_lipn_follows_the_current_dmin(trained, data, tmp_path, monkeypatch):
    bags, split, labels = data
    targets = []

    def recorded(logits, target, *args, **options):
        targets.append(target.clone())
        return lipn_loss(logits, target, *args, **options)

    monkeypatch.setattr(joint, "lipn_loss", recorded)
    one_slide = replace(split, train=("s01",))
    fast = replace(SHORT, learning_rate=3e-2, epochs=6, min_epochs=6)
    tune(trained, (bags, one_slide, labels), tmp_path, fast)
    with torch.inference_mode():
        before = trained[0](torch.from_numpy(bags["s01"].features).float()).mask
    assert torch.equal(targets[0], before)
    assert not torch.equal(targets[-1], before)


def test_fine_tuning_that_only_harms_changes_nothing(trained, data, tmp_path):
    bags, split, labels = data
    wrong = labels | {slide_id: 1 - labels[slide_id] for slide_id in split.val}
    dmin, lipn, thresholds, history = tune(trained, (bags, split, wrong), tmp_path)
    assert history["val_loss"].idxmin() == 0
    for network, old in zip((dmin, lipn), trained, strict=False):
        before = old.state_dict()
        assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert thresholds == trained[2]


@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(trained, data, tmp_path, monkeypatch, after):
    *_, thresholds, whole = tune(trained, data, tmp_path / "whole")
    save_state, saved = trainer.save_state, []

    def cut_off(*args):
        save_state(*args)
        saved.append(1)
        if len(saved) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "save_state", cut_off)
        tune(trained, data, tmp_path / "cut")
    assert not (tmp_path / "cut" / "history.csv").exists()
    *_, again, resumed = tune(trained, data, tmp_path / "cut")
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert again == thresholds
    for name in FILES:
        one, two = (load_file(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_finished_run_is_loaded_not_repeated(trained, data, tmp_path, monkeypatch):
    dmin, lipn, _, history = tune(trained, data, tmp_path)
    monkeypatch.setattr(trainer, "_train_epoch", None)
    again, lipn_again, _, loaded = tune(trained, data, tmp_path)
    pd.testing.assert_frame_equal(loaded, history, check_exact=True)
    for one, two in ((dmin, again), (lipn, lipn_again)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_same_seed_same_weights_other_seed_other_weights(trained, data, tmp_path):
    runs = []
    for i, seed in enumerate((1, 1, 2)):
        torch.rand(i)  # the caller's generator has no say
        runs.append(tune(trained, data, tmp_path / str(i), replace(SHORT, epochs=2, seed=seed)))
    for network in (0, 1):
        first, same, other = (torch.cat([p.flatten() for p in run[network].parameters()]) for run in runs)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


def test_the_test_part_is_not_looked_at(trained, data, tmp_path):
    bags, split, labels = data
    seen = {s: bags[s] for s in (*split.train, *split.val)}
    known = {s: labels[s] for s in seen}
    whole = tune(trained, data, tmp_path / "whole")[3]
    blind = tune(trained, (seen, split, known), tmp_path / "blind")[3]
    pd.testing.assert_frame_equal(blind, whole, check_exact=True)


def test_bags_of_one_tile_are_fine_tuned(trained, tmp_path):
    bags, labels = make_bags(12, n_tiles=1)
    history = tune(trained, (bags, make_split(bags), labels), tmp_path, replace(SHORT, epochs=2))[3]
    assert (history["keep_ratio"] == 1).all()
    assert history["val_loss"].notna().all()


def test_gradients_are_clipped_network_by_network(trained, data, tmp_path):
    clipped = tune(trained, data, tmp_path / "clipped", replace(SHORT, epochs=2, clip=1e-3))[0]
    free = tune(trained, data, tmp_path / "free", replace(SHORT, epochs=2))[0]
    assert any(not torch.equal(a, b) for a, b in zip(clipped.parameters(), free.parameters(), strict=True))


def test_a_run_of_other_networks_is_refused(trained, data, tmp_path):
    tune(trained, data, tmp_path, replace(SHORT, epochs=1))
    dmin, lipn, thresholds = trained
    for other, named in (((dmin, LIPN(2), thresholds), "lipn"), ((dmin, lipn, [0.5, 0.5]), "thresholds")):
        with pytest.raises(CheckpointError, match=named):
            tune(other, data, tmp_path, replace(SHORT, epochs=1))


def test_what_cannot_be_fine_tuned_is_refused(trained, data, tmp_path):
    dmin, lipn, thresholds = trained
    with pytest.raises(ValueError, match="1 threshold"):
        tune((dmin, lipn, thresholds[:1]), data, tmp_path)
    plain = build_model("dmin", DIM, 2, **SMALL_DMIN, self_distillation=False)
    with pytest.raises(ValueError, match="selects no tiles"):
        tune((plain, lipn, thresholds), data, tmp_path)
    assert not any(tmp_path.iterdir())
