"""Training learns, stops, resumes to the bit, and refuses what does not fit."""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import DIM, make_bags, make_data, make_split
from safetensors.torch import load_file

from hdmil_lib.batches import BagDataset
from hdmil_lib.errors import BagError, CheckpointError, CohortError, HDMILError
from hdmil_lib.models import HDMIL, LIPN, MODELS, create_model
from hdmil_lib.splits import Split
from hdmil_lib.training import fit as loop
from hdmil_lib.training.fit import TrainSettings, fit, make_optimizer
from hdmil_lib.training.lipn import fit_lipn

SHORT = TrainSettings(learning_rate=3e-3, epochs=4, min_epochs=4, patience=4, seed=3)
SMALL = {"embed_dim": 16}
SMALL_DMIN = {"embed_dim": 16, "attention_dim": 8, "degree": 4}


def small_model(name="dmin", seed=0):
    torch.manual_seed(seed)
    return create_model(name, DIM, 2, **(SMALL_DMIN if name == "dmin" else SMALL))


def small_lipn(seed=0):
    torch.manual_seed(seed)
    return LIPN(2)


@pytest.fixture(scope="module")
def case():
    data = make_data()
    return data, make_split(data.slide_ids)


def test_training_learns_and_keeps_the_best_epoch(case, tmp_path):
    data, split = case
    model = small_model("abmil")
    history = fit(model, data, split, replace(SHORT, epochs=15), out=tmp_path)
    assert history["val_auc"].max() == 1.0
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert not model.training
    with torch.inference_mode():
        logits = torch.cat([model(data.batch([s]).features).logits for s in split.val])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([data.labels[s] for s in split.val]))
    assert float(loss) == pytest.approx(history["val_loss"].min(), rel=1e-6)


def test_instance_dropout_trains_on_a_share_of_the_tiles_and_validates_on_all(case, tmp_path):
    data, split = case
    model, seen = small_model("abmil"), []
    forward = model.classify

    def watched(features, segments, rows=None):
        seen.append((model.training, segments.lengths))
        return forward(features, segments, rows)

    model.classify = watched
    settings = replace(SHORT, instance_dropout=0.75)
    fit(model, data, split, settings, out=tmp_path)
    sizes = {data.length(slide_id) for slide_id in split.train}
    trained = [length for training, lengths in seen if training for length in lengths]
    assert trained
    assert {*trained} <= {max(1, round(0.25 * n)) for n in sizes}
    validated = [length for training, lengths in seen if not training for length in lengths]
    assert {*validated} == {data.length(slide_id) for slide_id in split.val}


def test_history_has_the_terms_of_the_loss_and_files_are_left(case, tmp_path):
    data, split = case
    history = fit(small_model(), data, split, SHORT, out=tmp_path)
    terms = [f"train_{t}" for t in ("teacher", "clustering", "embedding", "prediction", "rate")]
    assert {*terms, "train_loss", "epoch", "val_loss", "val_auc", "keep_ratio"} == set(history)
    np.testing.assert_allclose(history[terms].sum(axis=1), history["train_loss"], rtol=1e-5)  # float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "history.csv", "model.safetensors"]
    pd.testing.assert_frame_equal(history, pd.read_csv(tmp_path / "history.csv"))
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["seed"] == 3


def test_early_stopping_waits_for_patience_and_min_epochs(case, tmp_path):
    data, split = case
    stubborn = TrainSettings(learning_rate=0.0, weight_decay=0.0, epochs=9, min_epochs=0, patience=2)
    assert len(fit(small_model(), data, split, stubborn, out=tmp_path / "a")) == 3
    waiting = replace(stubborn, min_epochs=5)
    assert len(fit(small_model(), data, split, waiting, out=tmp_path / "b")) == 5
    ended = replace(stubborn, patience=20)
    assert len(fit(small_model(), data, split, ended, out=tmp_path / "c")) == 9


def test_same_seed_same_weights_other_seed_other_weights(case, tmp_path):
    data, split = case
    models = [small_model() for _ in range(3)]
    for i, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True)):
        torch.rand(i)  # the caller's generator has no say
        fit(model, data, split, replace(SHORT, seed=seed), out=tmp_path / str(i))
    first, same, other = (m.state_dict()["projection.0.weight"] for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_training_leaves_the_callers_generator_alone(case, tmp_path):
    data, split = case
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = small_model()
    torch.manual_seed(5)
    fit(model, data, split, SHORT, out=tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_class_is_drawn_as_often_as_the_other():
    ids = [f"s{i}" for i in range(1000)]
    labels = {s: int(i < 100) for i, s in enumerate(ids)}
    torch.manual_seed(0)
    drawn = loop.balanced_draw(ids, labels)
    assert len(drawn) == 1000
    # 0.5 +- 4 standard errors of 1000 fair draws; unbalanced drawing would give 0.1
    assert np.mean([labels[s] for s in drawn]) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(1000))


def test_with_class_weights_every_bag_is_drawn_once(case, tmp_path):
    ids = [f"s{i}" for i in range(50)]
    drawn = loop.draw(ids, dict.fromkeys(ids, 0), replace(SHORT, balance="loss"))
    assert sorted(drawn) == sorted(ids)
    assert drawn != ids


def test_class_weights_make_the_loss_the_mean_over_classes():
    model, rng = small_model(), np.random.default_rng(0)
    labels = torch.tensor([0] * 9 + [1])
    logits = torch.tensor(rng.normal(size=(10, 2)))
    data = SimpleNamespace(labels={f"s{i}": int(label) for i, label in enumerate(labels)})
    split = Split(tuple(data.labels), (), ())
    losses = -torch.log_softmax(logits, 1)[torch.arange(10), labels]
    with loop.weighted(model, data, split, replace(SHORT, balance="loss")):
        assert model.class_weights.tolist() == pytest.approx([10 / 18, 10 / 2])
        # The mean over all bags is that over classes, also when each step has one bag.
        expected = (losses[:9].mean() + losses[9]) / 2
        steps = [model.cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(10)]
        assert model.cross_entropy(logits, labels).item() == pytest.approx(expected.item())
        assert torch.stack(steps).mean().item() == pytest.approx(expected.item())
    assert model.class_weights is None
    assert model.cross_entropy(logits, labels).item() == pytest.approx(losses.mean().item())


@pytest.mark.parametrize("name", ["clam_mb", "dsmil", "dtfd_afs", "smt", "dmin", "mean"])
def test_every_loss_takes_with_class_weights(case, tmp_path, name):
    data, split = case
    model = create_model(name, data.dim, 2)
    fit(model, data, split, replace(SHORT, epochs=1, min_epochs=0, balance="loss"), out=tmp_path)
    assert not any("class_weights" in key for key in model.state_dict())


@pytest.mark.parametrize("kind", ["model", "lookahead", "lipn"])
@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(case, tmp_path, monkeypatch, kind, after):
    data, split = case
    dmin = small_model(seed=7)

    def train(folder):
        if kind == "model":
            return fit(small_model(), data, split, SHORT, out=folder)
        if kind == "lookahead":  # it moves its slow weights every sixth step
            settings = replace(SHORT, optimizer="lookahead_radam", batch_size=5)
            return fit(small_model(), data, split, settings, out=folder)
        return fit_lipn(small_lipn(), dmin, data, split, SHORT, out=folder)

    whole = train(tmp_path / "whole")
    save_state, saved = loop.save_state, []

    def cut_off(*args):
        save_state(*args)
        saved.append(1)
        if len(saved) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut")
    assert not (tmp_path / "cut" / "history.csv").exists()
    pd.testing.assert_frame_equal(train(tmp_path / "cut"), whole, check_exact=True)
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_killed_process_resumes_to_the_same_weights(case, tmp_path):
    data, split = case
    fit(small_model(), data, split, SHORT, out=tmp_path / "whole")
    child = os.fork()
    if child == 0:
        save_state = loop.save_state
        loop.save_state = lambda *args: (save_state(*args), os.kill(os.getpid(), signal.SIGKILL))
        fit(small_model(), data, split, SHORT, out=tmp_path / "cut")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (tmp_path / "cut" / "state.safetensors").exists()
    fit(small_model(), data, split, SHORT, out=tmp_path / "cut")
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_run_is_loaded_not_repeated(case, tmp_path, monkeypatch):
    data, split = case
    first = small_model()
    history = fit(first, data, split, SHORT, out=tmp_path)
    monkeypatch.setattr(loop, "train_epoch", None)
    second = small_model()
    pd.testing.assert_frame_equal(fit(second, data, split, SHORT, out=tmp_path), history, check_exact=True)
    assert torch.equal(first.heads[0].coefficients, second.heads[0].coefficients)


def test_a_checkpoint_of_another_configuration_names_both(case, tmp_path):
    data, split = case
    fit(small_model(), data, split, SHORT, out=tmp_path)
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.003, not 0\.5"):
        fit(small_model(), data, split, replace(SHORT, learning_rate=0.5), out=tmp_path)
    with pytest.raises(CheckpointError, match="model DMIN, not ABMIL"):
        fit(small_model("abmil"), data, split, SHORT, out=tmp_path)
    with pytest.raises(CheckpointError, match="split"):
        fit(small_model(), data, replace(split, train=split.train[2:]), SHORT, out=tmp_path)


def test_a_damaged_checkpoint_says_so(case, tmp_path):
    data, split = case
    fit(small_model(), data, split, SHORT, out=tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        fit(small_model(), data, split, SHORT, out=tmp_path)


def test_a_slide_without_a_bag_is_named(case, tmp_path):
    _, split = case
    bags, labels = make_bags()
    del bags["s00"]
    without = BagDataset(bags, labels)
    with pytest.raises(BagError, match="s00"):
        fit(small_model(), without, split, SHORT, out=tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_slide_without_a_label_is_named(case, tmp_path):
    _, split = case
    bags, labels = make_bags()
    del labels[split.val[1]]
    with pytest.raises(CohortError, match=f"slide '{split.val[1]}' has no label"):
        fit(small_model(), BagDataset(bags, labels), split, SHORT, out=tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_test_part_needs_neither_bags_nor_labels(case, tmp_path):
    data, split = case
    bags, labels = make_bags()
    seen = [*split.train, *split.val]
    blind = BagDataset({s: bags[s] for s in seen}, {s: labels[s] for s in seen})
    whole = fit(small_model(), data, split, SHORT, out=tmp_path / "whole")
    history = fit(small_model(), blind, split, SHORT, out=tmp_path / "blind")
    pd.testing.assert_frame_equal(history, whole, check_exact=True)


def test_divergence_is_an_error_not_a_result(case, tmp_path):
    data, split = case
    with pytest.raises(HDMILError, match="learning rate"):
        fit(small_model("mean"), data, split, replace(SHORT, learning_rate=1e30), out=tmp_path)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_of_one_class_trains_and_says_that_it_has_no_auc(case, tmp_path, part):
    data, split = case
    split = replace(split, **{part: [s for s in getattr(split, part) if data.labels[s] == 0]})
    history = fit(small_model(), data, split, SHORT, out=tmp_path)
    assert np.isfinite(history["val_loss"]).all()
    assert history["val_auc"].isna().all() == (part == "val")


@pytest.mark.parametrize("name", ["mean", "max", "abmil", "dmin"])
def test_bags_of_one_tile_train_and_predict(name, tmp_path):
    data = make_data(12, n_tiles=1)
    split = make_split(data.slide_ids)
    model = small_model(name)
    history = fit(model, data, split, replace(SHORT, epochs=2), out=tmp_path / "model")
    assert np.isfinite(history["val_loss"]).all()
    if name == "dmin":
        lipn = small_lipn()
        fit_lipn(lipn, model, data, split, replace(SHORT, epochs=2), out=tmp_path / "lipn")
        hdmil = HDMIL(model, lipn, thresholds=0.999)
        output = hdmil(**data.batch(split.test[:1]).inputs_for(hdmil))
        assert output.logits.isfinite().all()
        assert output.keep_ratio.tolist() == [1.0]


def test_features_are_standardized_by_the_training_slides_alone(case, tmp_path):
    data, split = case
    model = small_model("abmil")
    fit(model, data, split, replace(SHORT, epochs=1, standardize=True), out=tmp_path / "on")
    tiles = data.batch(split.train).features.numpy()
    np.testing.assert_allclose(model.feature_mean, tiles.mean(0), atol=1e-5)
    np.testing.assert_allclose(model.feature_std, tiles.std(0), atol=1e-5)
    plain = small_model("abmil")
    fit(plain, data, split, replace(SHORT, epochs=1), out=tmp_path / "off")
    assert plain.feature_mean.eq(0).all()
    assert plain.feature_std.eq(1).all()


def test_the_learning_rate_drops_to_a_fifth_where_it_is_told_to(case, tmp_path):
    """Adam's first step is as long as the learning rate: it is a fifth as long after the drop."""
    settings = replace(SHORT, learning_rate=1e-3, drop_epoch=3)
    assert [settings.rate_at(epoch) for epoch in (0, 2, 3, 9)] == [1e-3, 1e-3, 2e-4, 2e-4]
    assert SHORT.rate_at(100) == SHORT.learning_rate
    moved = {}
    data, split = case
    for drop_epoch in (None, 0):
        model = small_model("abmil")
        before = model.classifier.bias.detach().clone()
        once = replace(settings, epochs=1, batch_size=len(split.train), weight_decay=0.0)
        fit(model, data, split, replace(once, drop_epoch=drop_epoch), out=tmp_path / str(drop_epoch))
        moved[drop_epoch] = (model.classifier.bias - before).detach().abs()
    torch.testing.assert_close(moved[0], moved[None] / 5, rtol=1e-3, atol=1e-7)


def test_gradients_are_clipped_group_by_group(case, tmp_path):
    """After a step the gradients of each group together have the largest norm that is allowed."""
    data, split = case
    for name, n_groups in (("abmil", 1), ("dtfd_afs", 2)):
        model = small_model(name)
        objective = loop.Classification(model, data)
        settings = replace(SHORT, clip=1e-3)
        optimizer = make_optimizer(objective.param_groups(), settings)
        loop.train_epoch(objective, optimizer, data, split.train[:1], settings)
        norms = [
            torch.stack([p.grad.norm() for p in group["params"]]).norm() for group in optimizer.param_groups
        ]
        assert len(norms) == n_groups
        torch.testing.assert_close(torch.stack(norms), torch.full((n_groups,), 1e-3), rtol=1e-3, atol=0)


def test_a_device_that_is_not_there_is_named(case, tmp_path):
    with pytest.raises(HDMILError, match="There is no device 'cuda:77' here"):
        fit(small_model(), *case, SHORT, out=tmp_path, device="cuda:77")


@pytest.mark.parametrize(
    ("batch_size", "remedy"), [(2, "lower batch_size, which is 2, or"), (1, "tiles: set")]
)
def test_a_step_without_enough_memory_says_what_to_lower_and_keeps_the_epochs(
    case, tmp_path, monkeypatch, batch_size, remedy
):
    settings = replace(SHORT, batch_size=batch_size)
    step, calls = loop.train_step, []
    n_steps = -(-len(case[1].train) // batch_size)

    def full(*arguments):
        calls.append(1)
        if len(calls) > 2 * n_steps:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", full)
        with pytest.raises(HDMILError, match=rf"too little memory for a step on .*{remedy}.*epochs are kept"):
            fit(small_model(), *case, settings, out=tmp_path / "again")
    interrupted = fit(small_model(), *case, settings, out=tmp_path / "again")
    pd.testing.assert_frame_equal(interrupted, fit(small_model(), *case, settings, out=tmp_path / "once"))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_in_bfloat16_with_weights_in_float32(case, tmp_path, name):
    torch.manual_seed(0)
    model = create_model(name, DIM, 2)
    history = fit(model, *case, replace(SHORT, epochs=2, precision="bf16"), out=tmp_path)
    assert np.isfinite(history.drop(columns="val_auc")).all(axis=None)
    assert all(p.dtype == torch.float32 for p in model.parameters())
