"""Training learns, stops, resumes to the bit, and refuses what does not fit."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import DIM, make_bag, make_bags, make_split
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from hdmil_lib.errors import BagError, CheckpointError, HDMILError
from hdmil_lib.models import LIPN, build_model
from hdmil_lib.training import trainer
from hdmil_lib.training.losses import LIPNLossWeights
from hdmil_lib.training.fit import TrainSettings, train_lipn, train_model
from hdmil_lib.training.two_stage import calibrate_thresholds, two_stage

SHORT = TrainSettings(learning_rate=3e-3, epochs=4, min_epochs=4, patience=4, seed=3)
SMALL = {"embed_dim": 16}
SMALL_DMIN = {"embed_dim": 16, "attention_dim": 8, "degree": 4}


def small_model(name="dmin", seed=0):
    torch.manual_seed(seed)
    return build_model(name, DIM, 2, **(SMALL_DMIN if name == "dmin" else SMALL))


def small_lipn(seed=0):
    torch.manual_seed(seed)
    return LIPN(2)


@pytest.fixture(scope="module")
def data():
    bags, labels = make_bags()
    return bags, make_split(bags), labels


def test_training_learns_and_keeps_the_best_epoch(data, tmp_path):
    bags, split, labels = data
    model = small_model("abmil")
    history = train_model(model, bags, split, labels, replace(SHORT, epochs=15), tmp_path)
    assert history["val_auc"].max() == 1.0
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert not model.training
    with torch.inference_mode():
        logits = torch.stack([model(torch.from_numpy(bags[s].features).float()).logits for s in split.val])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([labels[s] for s in split.val]))
    assert float(loss) == pytest.approx(history["val_loss"].min(), rel=1e-6)


def test_history_has_the_terms_of_the_loss_and_files_are_left(data, tmp_path):
    bags, split, labels = data
    history = train_model(small_model(), bags, split, labels, SHORT, tmp_path)
    terms = {f"train_{t}" for t in ("teacher", "clustering", "embedding", "prediction", "rate", "loss")}
    assert terms | {"epoch", "val_loss", "val_auc", "keep_ratio"} == set(history)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "history.csv", "model.safetensors"]
    pd.testing.assert_frame_equal(history, pd.read_csv(tmp_path / "history.csv"))
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["seed"] == 3


def test_early_stopping_waits_for_patience_and_min_epochs(data, tmp_path):
    bags, split, labels = data
    stubborn = TrainSettings(learning_rate=0.0, weight_decay=0.0, epochs=9, min_epochs=0, patience=2)
    assert len(train_model(small_model(), bags, split, labels, stubborn, tmp_path / "a")) == 3
    waiting = replace(stubborn, min_epochs=5)
    assert len(train_model(small_model(), bags, split, labels, waiting, tmp_path / "b")) == 5
    ended = replace(stubborn, patience=20)
    assert len(train_model(small_model(), bags, split, labels, ended, tmp_path / "c")) == 9


def test_same_seed_same_weights_other_seed_other_weights(data, tmp_path):
    bags, split, labels = data
    models = [small_model() for _ in range(3)]
    for i, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True)):
        torch.rand(i)  # the caller's generator has no say
        train_model(model, bags, split, labels, replace(SHORT, seed=seed), tmp_path / str(i))
    first, same, other = (m.state_dict()["projection.0.weight"] for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_training_leaves_the_callers_generator_alone(data, tmp_path):
    bags, split, labels = data
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = small_model()
    torch.manual_seed(5)
    train_model(model, bags, split, labels, SHORT, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_class_is_drawn_as_often_as_the_other():
    ids = [f"s{i}" for i in range(1000)]
    labels = {s: int(i < 100) for i, s in enumerate(ids)}
    torch.manual_seed(0)
    drawn = trainer._balanced_draw(ids, labels)
    assert len(drawn) == 1000
    # 0.5 +- 4 standard errors of 1000 fair draws; unbalanced drawing would give 0.1
    assert np.mean([labels[s] for s in drawn]) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(1000))


@pytest.mark.parametrize("kind", ["model", "lipn"])
@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(data, tmp_path, monkeypatch, kind, after):
    bags, split, labels = data
    dmin = small_model(seed=7)

    def train(folder):
        if kind == "model":
            return train_model(small_model(), bags, split, labels, SHORT, folder)
        return train_lipn(small_lipn(), dmin, bags, split, labels, SHORT, folder)

    whole = train(tmp_path / "whole")
    save_state, saved = trainer.save_state, []

    def cut_off(*args):
        save_state(*args)
        saved.append(1)
        if len(saved) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "save_state", cut_off)
        train(tmp_path / "cut")
    assert not (tmp_path / "cut" / "history.csv").exists()
    pd.testing.assert_frame_equal(train(tmp_path / "cut"), whole, check_exact=True)
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_killed_process_resumes_to_the_same_weights(data, tmp_path):
    bags, split, labels = data
    train_model(small_model(), bags, split, labels, SHORT, tmp_path / "whole")
    child = os.fork()
    if child == 0:
        save_state = trainer.save_state
        trainer.save_state = lambda *args: (save_state(*args), os.kill(os.getpid(), signal.SIGKILL))
        train_model(small_model(), bags, split, labels, SHORT, tmp_path / "cut")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (tmp_path / "cut" / "state.safetensors").exists()
    train_model(small_model(), bags, split, labels, SHORT, tmp_path / "cut")
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_run_is_loaded_not_repeated(data, tmp_path, monkeypatch):
    bags, split, labels = data
    first = small_model()
    history = train_model(first, bags, split, labels, SHORT, tmp_path)
    monkeypatch.setattr(trainer, "_train_epoch", None)
    second = small_model()
    pd.testing.assert_frame_equal(
        train_model(second, bags, split, labels, SHORT, tmp_path), history, check_exact=True
    )
    assert torch.equal(first.heads[0].coefficients, second.heads[0].coefficients)


def test_a_checkpoint_of_another_configuration_names_both(data, tmp_path):
    bags, split, labels = data
    train_model(small_model(), bags, split, labels, SHORT, tmp_path)
    with pytest.raises(CheckpointError, match=r"'learning_rate': 0\.003.*'learning_rate': 0\.5"):
        train_model(small_model(), bags, split, labels, replace(SHORT, learning_rate=0.5), tmp_path)
    with pytest.raises(CheckpointError, match="'DMIN'.*'ABMIL'"):
        train_model(small_model("abmil"), bags, split, labels, SHORT, tmp_path)
    with pytest.raises(CheckpointError, match="split"):
        train_model(small_model(), bags, replace(split, train=split.train[2:]), labels, SHORT, tmp_path)


def test_a_damaged_checkpoint_says_so(data, tmp_path):
    bags, split, labels = data
    train_model(small_model(), bags, split, labels, SHORT, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        train_model(small_model(), bags, split, labels, SHORT, tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_name_the_bag(data, tmp_path, value):
    bags, split, labels = data
    bad = make_bag("s03", 1)
    bad.features[2, 5] = value
    with pytest.raises(BagError, match="s03"):
        train_model(small_model(), bags | {"s03": bad}, split, labels, SHORT, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_slide_without_a_bag_is_named(data, tmp_path):
    bags, split, labels = data
    with pytest.raises(BagError, match="s00"):
        train_model(
            small_model(), {s: b for s, b in bags.items() if s != "s00"}, split, labels, SHORT, tmp_path
        )


def test_divergence_is_an_error_not_a_result(data, tmp_path):
    bags, split, labels = data
    with pytest.raises(HDMILError, match="learning rate"):
        train_model(small_model("mean"), bags, split, labels, replace(SHORT, learning_rate=1e30), tmp_path)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_of_one_class_trains_and_says_that_it_has_no_auc(data, tmp_path, part):
    bags, split, labels = data
    split = replace(split, **{part: [s for s in getattr(split, part) if labels[s] == 0]})
    history = train_model(small_model(), bags, split, labels, SHORT, tmp_path)
    assert np.isfinite(history["val_loss"]).all()
    assert history["val_auc"].isna().all() == (part == "val")


@pytest.mark.parametrize("name", ["mean", "max", "abmil", "dmin"])
def test_bags_of_one_tile_train_and_predict(name, tmp_path):
    bags, labels = make_bags(12, n_tiles=1)
    split = make_split(bags)
    model = small_model(name)
    history = train_model(model, bags, split, labels, replace(SHORT, epochs=2), tmp_path / "model")
    assert np.isfinite(history["val_loss"]).all()
    if name == "dmin":
        lipn = small_lipn()
        train_lipn(lipn, model, bags, split, labels, replace(SHORT, epochs=2), tmp_path / "lipn")
        bag = bags[split.test[0]]
        features, patches = torch.from_numpy(bag.features).float(), torch.from_numpy(bag.patches)
        output, kept = two_stage(model, lipn, features, patches, 0.999)
        assert output.logits.isfinite().all() and kept == 1.0


def tumor_selector():
    """A DMIN whose branches both select a tile where the mean of its first features exceeds 1.5."""
    dmin = small_model()
    with torch.no_grad():
        for parameter in dmin.parameters():
            parameter.zero_()
        dmin.projection[0].weight[0, : DIM // 2] = 2 / DIM
        dmin.attention.tanh.weight[0, 0], dmin.attention.tanh.bias[0] = 2.0, -3.0
        dmin.attention.score.weight[:, 0] = 10.0
        dmin.heads[1].coefficients[0, 0, :2] = torch.tensor([-3.0, 6.0])
    return dmin


def test_lipn_learns_what_dmin_selects_and_stores_its_thresholds(data, tmp_path):
    bags, split, labels = data
    dmin, lipn = tumor_selector(), small_lipn()
    before = {name: tensor.clone() for name, tensor in dmin.state_dict().items()}
    only_masks = LIPNLossWeights(rate=0.0)
    longer = replace(SHORT, epochs=8, min_epochs=8)
    train_lipn(lipn, dmin, bags, split, labels, longer, tmp_path, weights=only_masks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dmin.state_dict().items())
    with torch.inference_mode():
        scores = torch.cat([lipn(torch.from_numpy(bags[s].patches)).amin(1) for s in split.test])
    selected = [bool(labels[s]) and i < 4 for s in split.test for i in range(12)]
    assert roc_auc_score(selected, scores) > 0.95
    thresholds = json.loads((tmp_path / "config.json").read_text())["thresholds"]
    assert thresholds == calibrate_thresholds(
        lipn, [torch.from_numpy(bags[s].patches) for s in split.val], dmin.settings.keep_ratio
    )


def test_gradients_of_lipn_are_clipped(data, tmp_path):
    bags, split, labels = data
    torch.manual_seed(0)
    dmin, weights = small_model(), []
    for clip in (None, 1e-3):
        torch.manual_seed(1)
        lipn = small_lipn()
        train_lipn(lipn, dmin, bags, split, labels, replace(SHORT, epochs=1, clip=clip), tmp_path / str(clip))
        weights.append(lipn.classifier.weight.detach())
    assert not torch.equal(*weights)


def test_lipn_of_another_dmin_is_refused(data, tmp_path):
    bags, split, labels = data
    short = replace(SHORT, epochs=1)
    train_lipn(small_lipn(), small_model(seed=1), bags, split, labels, short, tmp_path)
    with pytest.raises(CheckpointError, match="dmin"):
        train_lipn(small_lipn(), small_model(seed=2), bags, split, labels, short, tmp_path)


def test_lipn_needs_a_dmin_that_selects(data, tmp_path):
    bags, split, labels = data
    model = build_model("dmin", DIM, 2, **SMALL_DMIN, self_distillation=False)
    with pytest.raises(ValueError, match="selects no tiles"):
        train_lipn(small_lipn(), model, bags, split, labels, SHORT, tmp_path)


def test_features_are_standardized_by_the_training_slides_alone(data, tmp_path):
    bags, split, labels = data
    model = small_model("abmil")
    train_model(model, bags, split, labels, replace(SHORT, epochs=1, standardize=True), tmp_path / "on")
    tiles = np.concatenate([np.asarray(bags[s].features, np.float32) for s in split.train])
    np.testing.assert_allclose(model.feature_mean, tiles.mean(0), atol=1e-5)
    np.testing.assert_allclose(model.feature_std, tiles.std(0), atol=1e-5)
    plain = small_model("abmil")
    train_model(plain, bags, split, labels, replace(SHORT, epochs=1), tmp_path / "off")
    assert plain.feature_mean.eq(0).all() and plain.feature_std.eq(1).all()


def test_chebyshev_coefficients_take_their_own_share_of_the_learning_rate(data, tmp_path):
    bags, split, labels = data
    moved = {}
    for share in (1.0, 0.0):
        model = small_model("dmin")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        settings = replace(SHORT, epochs=1, weight_decay=0.0, kan_rate=share)
        train_model(model, bags, split, labels, settings, tmp_path / str(share))
        moved[share] = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert moved[1.0] - moved[0.0] == {n for n in moved[1.0] if n.endswith("coefficients")} != set()
