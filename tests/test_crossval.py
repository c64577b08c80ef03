"""Cross-validation predicts every slide once a method, resumes, and gives what training by hand gives."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import make_bags, make_cohort
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.cohort import read_splits
from hdmil_lib.errors import BagError, CheckpointError, CohortError, HDMILError
from hdmil_lib.models import MODELS
from hdmil_lib.training import crossval
from hdmil_lib.training.crossval import load_dmin, load_fold, run_crossval, run_dir
from hdmil_lib.methods import METHODS
from hdmil_lib.training.recipes import RECIPES
from hdmil_lib.training.fit import TrainSettings
from hdmil_lib.training.two_stage import two_stage

FEW = TrainSettings(learning_rate=3e-3, epochs=2, min_epochs=0)
RECIPE = replace(
    RECIPES["camelyon-mini"],
    training=FEW,
    lipn_training=FEW,
    joint_training=FEW,
    models={
        **{name: {"embed_dim": 16} for name in MODELS if name not in ("dsmil", "dmin")},
        "dmin": {"embed_dim": 16, "attention_dim": 8, "degree": 3, "keep_ratio": 0.5},
    },
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    bags, labels = make_bags(18, n_tiles=8)
    return make_cohort(tmp_path_factory.mktemp("cohort"), bags, labels), bags


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """All methods on three folds: (predictions, folder)."""
    folder = tmp_path_factory.mktemp("runs")
    return run_crossval(*data, list(METHODS), 3, 0, RECIPE, folder, workers=1, progress=False), folder


def test_each_method_predicts_each_slide_once_from_another_fold(data, run):
    cohort, _ = data
    predictions, folder = run
    splits = read_splits(folder / "splits")
    assert predictions["method"].unique().tolist() == list(METHODS)
    for _, part in predictions.groupby("method"):
        assert sorted(part["slide_id"]) == sorted(cohort.slide_ids)
    for row in predictions.itertuples():
        assert row.slide_id in splits[row.fold].test
    truth = dict(zip(cohort.slide_ids, cohort.labels, strict=True))
    assert (predictions["label"] == predictions["slide_id"].map(truth)).all()
    np.testing.assert_allclose(predictions["p_0"] + predictions["p_1"], 1, atol=1e-12)


def test_screens_read_fewer_tiles_and_random_as_many_as_hdmil(run):
    predictions, _ = run
    kept = predictions.pivot(index="slide_id", columns="method", values="keep_ratio")
    assert (kept[["mean", "max", "abmil", "hdmil_dagger"]] == 1).all(axis=None)
    assert (kept["random"] == kept["hdmil"]).all()
    assert kept["hdmil"].mean() < 1


def test_predictions_are_those_of_the_networks_that_are_left(data, run):
    _, bags = data
    predictions, folder = run
    dmin, lipn, thresholds = load_fold(folder, 1)
    part = predictions[(predictions["fold"] == 1) & (predictions["method"] == "hdmil")]
    for row in part.itertuples():
        bag = bags[row.slide_id]
        features, patches = torch.from_numpy(bag.features).float(), torch.from_numpy(bag.patches)
        output, kept = two_stage(dmin, lipn, features, patches, thresholds)
        # the same float32 computation, written with 17 digits
        assert row.p_1 == pytest.approx(float(output.logits.double().softmax(0)[1]), rel=1e-12)
        assert row.keep_ratio == float(kept)


def test_a_second_call_trains_nothing_and_a_lost_job_is_made_again(data, run, monkeypatch):
    predictions, folder = run
    lost = folder / "hdmil" / "fold2" / "predictions.csv"
    lost.unlink()
    jobs = []
    run_job = crossval._run_job
    monkeypatch.setattr(crossval, "_run_job", lambda job, bags: (jobs.append(job), run_job(job, bags)))
    again = run_crossval(*data, list(METHODS), 3, 0, RECIPE, folder, workers=1, progress=False)
    assert [(job.method, job.fold) for job in jobs] == [("hdmil", 2)]
    pd.testing.assert_frame_equal(again, predictions, check_exact=True)


def test_worker_processes_give_the_same_predictions(data, run, tmp_path):
    """Up to rounding: products round by where their operands lie in memory, and training adds that up."""
    predictions, _ = run
    methods = ["mean", "hdmil_dagger"]
    parallel = run_crossval(*data, methods, 3, 0, RECIPE, tmp_path, workers=2, progress=False)
    expected = predictions[predictions["method"].isin(methods)]
    expected = pd.concat([expected[expected["method"] == m] for m in methods], ignore_index=True)
    pd.testing.assert_frame_equal(parallel, expected, rtol=1e-4)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_ends_the_run_with_its_error(data, tmp_path, workers):
    cohort, bags = data
    bad = cohort.slide_ids[0]
    features = bags[bad].features.copy()
    features[1, 2] = np.nan
    bags = bags | {bad: replace(bags[bad], features=features)}
    with pytest.raises(BagError, match=f"bag '{bad}': features with nan"):
        run_crossval(cohort, bags, ["mean"], 3, 0, RECIPE, tmp_path, workers=workers, progress=False)


def test_torch_gets_its_threads_back(data, tmp_path):
    before = torch.get_num_threads()
    run_crossval(*data, ["mean"], 3, 0, RECIPE, tmp_path, workers=2, progress=False)
    assert torch.get_num_threads() == before


def test_what_a_method_builds_on_is_trained_first_but_not_returned(data, tmp_path):
    predictions = run_crossval(*data, ["random"], 3, 0, RECIPE, tmp_path, workers=1, progress=False)
    assert predictions["method"].unique().tolist() == ["random"]
    assert (tmp_path / "hdmil" / "fold2" / "predictions.csv").exists()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(list(METHODS)), min_size=1, unique=True))
def test_waves_are_in_the_order_of_needs(methods):
    waves = crossval._waves(methods)
    order = [name for wave in waves for name in wave]
    assert set(methods) <= set(order) and len(order) == len(set(order))
    for index, wave in enumerate(waves):
        before = {name for earlier in waves[:index] for name in earlier}
        for name in wave:
            if METHODS[name].screen:
                assert "hdmil_dagger" in before
            if METHODS[name].screen not in (None, "lipn"):
                assert "hdmil" in before


def test_a_folder_of_another_configuration_is_refused(data, run):
    _, folder = run
    with pytest.raises(CheckpointError, match="'seed': 0.*'seed': 1"):
        run_crossval(*data, ["mean"], 3, 1, RECIPE, folder, workers=1, progress=False)


def test_the_default_folder_is_in_the_cache_and_tells_runs_apart(data, tmp_path):
    cohort, bags = data
    first = run_dir(cohort, bags, 3, 0, RECIPE)
    assert first.parent == tmp_path / "cache" / "runs" and first.name.startswith(cohort.root.name)
    others = [run_dir(cohort, bags, 4, 0, RECIPE), run_dir(cohort, bags, 3, 1, RECIPE)]
    others.append(run_dir(cohort, bags, 3, 0, replace(RECIPE, models={})))
    assert len({first, *others}) == 4
    assert first == run_dir(cohort, bags, 3, 0, RECIPE)


def test_unknown_methods_and_too_few_cases(data, tmp_path):
    with pytest.raises(HDMILError, match="no method nonsense"):
        run_crossval(*data, ["nonsense"], 3, 0, RECIPE, tmp_path)
    with pytest.raises(CohortError, match="fewer than the 10 folds"):
        run_crossval(*data, ["mean"], 10, 0, RECIPE, tmp_path)
    assert not any(tmp_path.iterdir())


def test_networks_that_were_not_trained_are_missed(run, tmp_path):
    _, folder = run
    with pytest.raises(CheckpointError, match="fold7"):
        load_fold(folder, 7)
    assert load_dmin(folder, 0, "dmin_linear").settings.head == "linear"
    unfinished = tmp_path / "hdmil" / "fold0"
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text(json.dumps({"model": "LIPN"}))
    with pytest.raises(CheckpointError, match="not trained to its end"):
        load_fold(tmp_path, 0)
