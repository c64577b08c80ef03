"""Cross-validation predicts every slide once per method, resumes, and leaves the models it predicted with."""

import json
import multiprocessing
import time
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import DIM, ENCODER, make_bags, make_cohort
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.cohort import make_splits
from hdmil_lib.errors import BagError, CheckpointError, CohortError, HDMILError
from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.evaluation.statistics import score_table
from hdmil_lib.inference.prediction import Prediction
from hdmil_lib.methods import METHODS, title
from hdmil_lib.models import HDMIL, MODELS, MILModel
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.splits import Split, read_splits, write_splits
from hdmil_lib.training import crossval
from hdmil_lib.training.crossval import cross_validate, waves_of
from hdmil_lib.training.fit import TrainSettings, predict_slides
from hdmil_lib.training.lipn import predict_screened
from hdmil_lib.training.recipes import recipe_for
from hdmil_lib.training.runs import runs_table
from hdmil_lib.training.trained import CrossValidation

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
QUIET = {"folds": 3, "recipe": RECIPE, "workers": 1, "progress": False}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    bags, labels = make_bags(18, n_tiles=8)
    bags = {slide_id: replace(bag, looks={64: bag.features}) for slide_id, bag in bags.items()}
    return make_cohort(tmp_path_factory.mktemp("cohort"), bags, labels)


@pytest.fixture(scope="module")
def cv(cohort, tmp_path_factory):
    """All methods on three folds."""
    return cross_validate(cohort, list(METHODS), out=tmp_path_factory.mktemp("runs"), **QUIET)


@pytest.fixture(scope="module")
def data(cohort):
    return crossval.BagDataset(cohort.load_bags(), cohort.label_of)


def rows_of(cv, method, fold):
    rows = cv.predictions
    return rows[(rows["method"] == method) & (rows["fold"] == fold)]


# Predictions


def test_each_method_predicts_each_slide_once_from_another_fold(cohort, cv):
    assert cv.predictions["method"].unique().tolist() == list(METHODS)
    for _, part in cv.predictions.groupby("method"):
        assert sorted(part["slide_id"]) == sorted(cohort.slide_ids)
    for row in cv.predictions.itertuples():
        assert row.slide_id in cv.splits[row.fold].test
    assert (cv.predictions["label"] == cv.predictions["slide_id"].map(cohort.label_of)).all()
    np.testing.assert_allclose(cv.predictions["p_0"] + cv.predictions["p_1"], 1, atol=1e-12)


def test_screens_read_fewer_tiles_and_random_as_many_as_hdmil(cv):
    kept = cv.predictions.pivot(index="slide_id", columns="method", values="keep_ratio")
    assert (kept[["mean", "max", "abmil", "hdmil_dagger"]] == 1).all(axis=None)
    assert (kept["random"] == kept["hdmil"]).all()
    assert kept["hdmil"].mean() < 1


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].screen != "random"])
def test_predictions_are_those_of_the_models_that_are_left(cv, data, method):
    for fold, split in enumerate(cv.splits):
        model = cv.model(method, fold)
        assert isinstance(model, MILModel if METHODS[method].screen is None else HDMIL)
        assert not model.training
        predict = predict_slides if isinstance(model, MILModel) else predict_screened
        logits, kept = predict(model, data, split.test)
        rows = rows_of(cv, method, fold)
        assert rows["slide_id"].tolist() == list(split.test)
        # the same float32 computation, written with 17 digits
        np.testing.assert_allclose(rows["p_1"], logits.double().softmax(1)[:, 1], rtol=1e-12)
        if isinstance(model, HDMIL) or not model.reads_all:
            assert rows["keep_ratio"].tolist() == kept.tolist()


def test_a_model_of_hdmil_knows_what_it_was_trained_for(cohort, cv):
    model = cv.hdmil(1)
    assert model.classes == ("normal", "tumor")
    assert (model.info.encoder, model.info.encoder_weights) == (ENCODER.name, ENCODER.weights_hash)
    assert model.info.cohort == cohort.root.name
    assert set(model.info.metrics) >= {"test AUC, mean (sd) over folds", "share of tiles read"}
    stored = json.loads((cv.folder / "hdmil" / "fold1" / "config.json").read_text())["thresholds"]
    assert torch.equal(model.thresholds, torch.tensor(stored))


def test_inference_as_published_is_at_gamma_and_pools_by_lipn(cv):
    model, own = cv.hdmil(0, "hdmil_published"), cv.hdmil(0)
    assert (model.pooling, own.pooling) == ("lipn", "dmin")
    assert model.thresholds.tolist() == [0.5, 0.5]
    assert torch.equal(model.trained_thresholds, own.thresholds)
    assert torch.equal(model.lipn.classifier.weight, own.lipn.classifier.weight)


@pytest.mark.parametrize("method", ["abmil", "hdmil", "ahdmil"])
def test_the_best_model_is_that_of_the_lowest_validation_loss(cv, method):
    losses = [
        pd.read_csv(cv.folder / method / f"fold{fold}" / "history.csv")["val_loss"].min() for fold in range(3)
    ]
    best = int(np.argmin(losses))
    assert cv.best_fold(method) == best
    found, expected = cv.best(method).state_dict(), cv.model(method, best).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_method_without_training_of_its_own_is_best_where_its_networks_are(cv):
    assert cv.best_fold("random") == cv.best_fold("hdmil_published") == cv.best_fold("hdmil")


def test_the_best_hdmil_predicts_a_bag(cohort, cv):
    model = cv.best("hdmil")
    bag = cohort.load_bags()["s03"]
    prediction = model.predict(bag)
    assert isinstance(prediction, Prediction)
    assert prediction.slide_id == "s03"
    assert prediction.n_tiles == 8
    assert 1 <= prediction.n_read <= 8
    output = model(torch.from_numpy(bag.features).float(), torch.from_numpy(bag.patches))
    expected = output.logits.detach().double().softmax(1)[0]
    np.testing.assert_allclose(prediction.probabilities, expected, rtol=1e-6)
    assert model.predict(bag, all_tiles=True).n_read == 8


def test_the_table_has_one_row_per_method(cv):
    table = cv.table()
    assert table.index.tolist() == [title(method) for method in METHODS]
    means = cv.predictions.groupby("method")["keep_ratio"].mean()
    assert table.loc[title("hdmil"), "tiles read"] == pytest.approx(100 * means["hdmil"])
    assert (table["AUC low"] <= table["AUC high"]).all()


def test_every_run_has_its_seed_settings_and_commit(cv):
    table = runs_table(cv.folder)
    own = [name for name in METHODS if METHODS[name].screen not in ("random", "published")]
    assert set(table["method"]) == set(own)
    assert table.groupby("method")["fold"].nunique().eq(3).all()
    assert set(table["seed"]) == {0}
    network = json.loads(table[table["method"] == "dmin_linear"]["configuration"].iloc[0])["network"]
    assert network["head"] == "linear"


# A folder opened again


def test_a_folder_is_opened_again(cohort, cv):
    again = CrossValidation(cv.folder)
    pd.testing.assert_frame_equal(again.predictions, cv.predictions, check_exact=True)
    assert again.splits == cv.splits == make_splits(cohort, 3, 0)
    assert again.cases == cohort.case_of
    assert again.classes == cohort.classes
    assert again.n_folds == 3
    some = CrossValidation(str(cv.folder), ["hdmil", "abmil"])
    assert some.predictions["method"].unique().tolist() == ["hdmil", "abmil"]


def test_what_was_not_run_is_missed(cohort, cv, tmp_path):
    with pytest.raises(CheckpointError, match="fold7"):
        cv.hdmil(7)
    with pytest.raises(CheckpointError, match="fold7"):
        cv.model("abmil", 7)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        CrossValidation(tmp_path)
    few = cross_validate(cohort, ["mean"], out=tmp_path / "few", **QUIET)
    for ask in (few.best, few.best_fold, lambda name: CrossValidation(few.folder, [name])):
        with pytest.raises(CheckpointError, match="abmil.fold0: was not run to its end"):
            ask("abmil")
    (few.folder / "hdmil" / "fold0").mkdir(parents=True)
    (few.folder / "hdmil" / "fold0" / "config.json").write_text(json.dumps({"model": "LIPN", "settings": {}}))
    with pytest.raises(CheckpointError, match="not trained to its end"):
        few.hdmil(0)
    with pytest.raises(CheckpointError, match="hdmil.fold0: was not run to its end"):
        CrossValidation(few.folder)


def test_unknown_methods_name_the_nearest(cohort, cv, tmp_path):
    for ask in (
        lambda name: cross_validate(cohort, [name], out=tmp_path, **QUIET),
        lambda name: cv.model(name, 0),
        cv.best,
        cv.best_fold,
        lambda name: CrossValidation(cv.folder, [name]),
    ):
        with pytest.raises(
            HDMILError, match=r"no method 'abmill' \(did you mean 'abmil'\?\); choose from max"
        ):
            ask("abmill")
    with pytest.raises(HDMILError, match="no method 'xyz'; choose from max, mean, .*ahdmil"):
        cross_validate(cohort, ["mean", "xyz"], out=tmp_path, **QUIET)
    assert not any(tmp_path.iterdir())


# Running, resuming, failing


def test_a_second_call_trains_nothing_and_a_lost_job_is_made_again(cohort, cv, monkeypatch):
    lost = cv.folder / "hdmil" / "fold2" / "predictions.csv"
    lost.unlink()
    jobs = []
    run_job = crossval.run_job
    monkeypatch.setattr(crossval, "run_job", lambda job, data: (jobs.append(job), run_job(job, data)))
    again = cross_validate(cohort, list(METHODS), out=cv.folder, **QUIET)
    assert [(job.method, job.fold) for job in jobs] == [("hdmil", 2)]
    pd.testing.assert_frame_equal(again.predictions, cv.predictions, check_exact=True)


def test_bags_in_memory_are_not_read_again(cohort, cv, monkeypatch):
    bags, _ = make_bags(18, n_tiles=8)
    extra, _ = make_bags(20, n_tiles=3)
    bags["s19"] = extra["s19"]  # not of this cohort
    monkeypatch.setattr(type(cohort), "load_bags", None)
    again = cross_validate(cohort, ["mean"], bags=bags, out=cv.folder, **QUIET)
    expected = cv.predictions[cv.predictions["method"] == "mean"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again.predictions, expected, check_exact=True)
    del bags["s04"]
    with pytest.raises(BagError, match="s04"):
        cross_validate(cohort, ["mean"], bags=bags, out=cv.folder, **QUIET)


def test_worker_processes_give_the_same_predictions(cohort, cv, tmp_path):
    """Up to rounding: products round by where their operands lie in memory, and training adds that up."""
    methods = ["mean", "hdmil_dagger"]
    parallel = cross_validate(cohort, methods, out=tmp_path, **QUIET | {"workers": 2})
    expected = pd.concat(
        [cv.predictions[cv.predictions["method"] == method] for method in methods], ignore_index=True
    )
    pd.testing.assert_frame_equal(parallel.predictions, expected, rtol=1e-4)


def children_that_stay(before, seconds=20.0):
    """Child processes, beyond those there were, that do not end within this time."""
    deadline = time.monotonic() + seconds
    while (left := set(multiprocessing.active_children()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.mark.parametrize(("workers", "fold"), [(1, 0), (2, 0), (2, 2)])
def test_a_job_that_fails_ends_the_run_with_its_error(cohort, tmp_path, workers, fold):
    """Of two workers the helper begins with the first fold and this process with the last one."""
    before, threads = set(multiprocessing.active_children()), torch.get_num_threads()
    blocked = tmp_path / "mean" / f"fold{fold}"
    blocked.mkdir(parents=True)
    (blocked / "config.json").write_text(json.dumps({"model": "something else"}))
    with pytest.raises(CheckpointError, match=f"mean.fold{fold}: holds a run with .*something else") as error:
        cross_validate(cohort, ["mean"], out=tmp_path, **QUIET | {"workers": workers})
    in_helper = "RemoteTraceback" in type(error.value.__cause__).__name__
    assert in_helper == (workers == 2 and fold == 0)
    assert not children_that_stay(before)
    assert torch.get_num_threads() == threads


def test_after_a_run_no_helper_stays_and_torch_has_its_threads_back(cohort, tmp_path):
    before, threads = set(multiprocessing.active_children()), torch.get_num_threads()
    cross_validate(cohort, ["mean"], out=tmp_path, **QUIET | {"workers": 2})
    assert torch.get_num_threads() == threads
    assert not children_that_stay(before, seconds=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_bag_ends_the_run_before_anything_is_written(cohort, tmp_path, workers):
    bags, _ = make_bags(18, n_tiles=8)
    bags["s00"].features[1, 2] = np.nan
    with pytest.raises(BagError, match="bag 's00': features with nan"):
        cross_validate(cohort, ["mean"], bags=bags, out=tmp_path, **QUIET | {"workers": workers})
    assert not any(tmp_path.iterdir())


def test_training_without_git_writes_predictions_without_a_commit(cohort, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    cv = cross_validate(cohort, ["mean"], out=tmp_path / "runs", **QUIET)
    assert sorted(cv.predictions["slide_id"]) == sorted(cohort.slide_ids)
    for fold in range(3):
        provenance = json.loads((cv.folder / "mean" / f"fold{fold}" / "provenance.json").read_text())
        assert provenance.keys() == {"commit", "changed", "seconds", "device"}
        assert provenance["commit"] is None
        assert provenance["changed"] is False
    assert runs_table(cv.folder)["commit"].isna().all()


def test_what_a_method_builds_on_is_trained_first_but_not_returned(cohort, tmp_path):
    cv = cross_validate(cohort, ["random"], out=tmp_path, **QUIET)
    assert cv.predictions["method"].unique().tolist() == ["random"]
    assert (tmp_path / "hdmil" / "fold2" / "predictions.csv").exists()
    everything = CrossValidation(tmp_path).predictions["method"].unique().tolist()
    assert everything == ["hdmil_dagger", "hdmil", "random"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(list(METHODS)), min_size=1, unique=True))
def test_waves_are_in_the_order_of_needs(methods):
    waves = waves_of(methods)
    order = [name for wave in waves for name in wave]
    assert set(methods) <= set(order)
    assert len(order) == len(set(order))
    for index, wave in enumerate(waves):
        before = {name for earlier in waves[:index] for name in earlier}
        for name in wave:
            if METHODS[name].screen:
                assert "hdmil_dagger" in before
            if METHODS[name].screen not in (None, "lipn"):
                assert METHODS[name].base in before


# Folders and configurations


def test_a_folder_of_another_configuration_is_refused(cohort, cv):
    with pytest.raises(CheckpointError, match="seed 0, not 1"):
        cross_validate(cohort, ["mean"], seed=1, out=cv.folder, **QUIET)
    shorter = QUIET | {"recipe": RECIPE.shorter(1)}
    with pytest.raises(CheckpointError, match="training.epochs 2, not 1"):
        cross_validate(cohort, ["mean"], out=cv.folder, **shorter)
    flipped = cohort.permuted(0)
    with pytest.raises(CheckpointError, match="with labels"):
        cross_validate(flipped, ["mean"], splits=cv.splits, out=cv.folder, **QUIET)


def test_the_default_folder_is_in_the_cache_and_tells_runs_apart(cohort, tmp_path):
    def folder(**changes):
        recipe = RECIPE.shorter(1)
        return cross_validate(cohort, ["mean"], **QUIET | {"recipe": recipe} | changes).folder

    first = folder()
    assert first.parent == tmp_path / "cache" / "runs"
    assert first.name.startswith(cohort.root.name)
    others = [folder(folds=4), folder(seed=1), folder(recipe=replace(RECIPE.shorter(1), models={}))]
    assert len({first, *others}) == 4
    assert first == folder()


def test_the_seed_goes_into_every_training(cohort, tmp_path):
    cross_validate(cohort, ["hdmil"], seed=5, out=tmp_path, **QUIET | {"recipe": RECIPE.shorter(1)})
    for method in ("hdmil_dagger", "hdmil"):
        config = json.loads((tmp_path / method / "fold0" / "config.json").read_text())
        assert config["settings"]["seed"] == 5


def test_without_a_recipe_it_follows_from_the_cohort(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(crossval, "recipe_for", lambda *args: recipe_for(*args).shorter(1))
    cross_validate(cohort, ["mean"], out=tmp_path, **QUIET | {"recipe": None})
    config = json.loads((tmp_path / "config.json").read_text())
    expected = asdict(recipe_for(18, DIM).shorter(1))
    assert config["recipe"] == json.loads(json.dumps(expected))


# Splits


def test_too_few_cases(cohort, tmp_path):
    with pytest.raises(CohortError, match="fewer than the 10 folds"):
        cross_validate(cohort, ["mean"], out=tmp_path, **QUIET | {"folds": 10})
    assert not any(tmp_path.iterdir())


def test_splits_are_given_as_a_list_or_as_a_folder(cohort, tmp_path):
    splits = make_splits(cohort, 3, seed=7)[:2]
    write_splits(splits, tmp_path / "own")
    by_list = cross_validate(cohort, ["mean"], splits=splits, out=tmp_path / "list", **QUIET)
    assert by_list.n_folds == 2
    assert by_list.splits == splits
    assert {tuple(part["slide_id"]) for _, part in by_list.predictions.groupby("fold")} == {
        split.test for split in splits
    }
    for folder in (tmp_path / "own", str(tmp_path / "own")):
        by_folder = cross_validate(cohort, ["mean"], splits=folder, out=tmp_path / "folder", **QUIET)
        assert by_folder.splits == splits
        pd.testing.assert_frame_equal(by_folder.predictions, by_list.predictions, check_exact=True)
    assert by_list.table()["AUC"].between(0, 100).all()


def test_other_splits_in_the_same_folder_are_refused(cohort, tmp_path):
    splits = make_splits(cohort, 3, seed=7)
    cross_validate(cohort, ["mean"], splits=splits, out=tmp_path, **QUIET)
    with pytest.raises(CheckpointError, match="holds a run with splits"):
        cross_validate(cohort, ["mean"], splits=splits[::-1], out=tmp_path, **QUIET)
    assert read_splits(tmp_path / "splits") == splits


def test_the_official_split_of_the_table_is_one_fold(cohort, tmp_path):
    parts = ["train"] * 10 + ["val"] * 4 + ["test"] * 4
    official = replace(cohort, table=cohort.table.assign(split=parts))
    ids = cohort.slide_ids
    cv = cross_validate(official, ["mean", "hdmil"], out=tmp_path / "official", **QUIET)
    assert cv.splits == [Split(tuple(ids[:10]), tuple(ids[10:14]), tuple(ids[14:]))]
    assert cv.predictions.groupby("method")["slide_id"].agg(list).tolist() == [ids[14:]] * 2
    assert len(cv.table()) == 2
    assert cv.best_fold("hdmil") == 0
    mine = make_splits(cohort, 3, 0)
    cv = cross_validate(official, ["mean"], splits=mine, out=tmp_path / "mine", **QUIET)
    assert cv.splits == mine  # splits that are given come before those of the table


def test_splits_that_leak_or_do_not_fit_are_refused(cohort, tmp_path):
    ids = cohort.slide_ids
    fine = make_splits(cohort, 3, 0)
    table = cohort.table.assign(case_id=["same", *cohort.table["case_id"][1:-1], "same"])
    leaking = replace(cohort, table=table)
    split = Split(tuple(ids[:10]), tuple(ids[10:14]), tuple(ids[14:]))
    parts = ["train"] * 10 + ["val"] * 4 + ["test"] * 4
    for refused, splits, message in (
        (cohort, [], "no splits"),
        (cohort, [replace(fine[0], test=("x",))], "not in the cohort: x"),
        (leaking, [split], r"several parts: same \(train and test\)"),
        (replace(leaking, table=table.assign(split=parts)), None, r"several parts: same \(train and test\)"),
        (cohort, tmp_path / "none", "no splits_0.csv"),
    ):
        with pytest.raises(CohortError, match=message):
            cross_validate(refused, ["mean"], splits=splits, out=tmp_path / "runs", **QUIET)
    assert not (tmp_path / "runs").exists()


def test_overlapping_test_parts_are_scored_as_repeated_draws(cohort, tmp_path):
    """Repeated Monte-Carlo splits: a slide may be tested in several folds, in others not at all."""
    rng = np.random.default_rng(0)
    splits = []
    for _ in range(4):
        normal, tumor = (rng.permutation(cohort.slide_ids[label::2]).tolist() for label in (0, 1))
        parts = ([*normal[a:b], *tumor[a:b]] for a, b in ((0, 5), (5, 7), (7, 9)))
        splits.append(Split(*map(tuple, parts)))
    cv = cross_validate(cohort, ["mean", "hdmil"], splits=splits, out=tmp_path, **QUIET)
    assert cv.predictions["slide_id"].value_counts().max() > 2
    table = cv.table()
    assert (table["AUC low"] <= table["AUC"]).all()
    rows = cv.predictions[cv.predictions["method"] == "mean"]
    aucs = [auc(part["label"], part[["p_0", "p_1"]].to_numpy()) for _, part in rows.groupby("fold")]
    assert table.loc["Mean-Pooling", "AUC"] == pytest.approx(100 * np.mean(aucs))
    scores = score_table(cv.predictions, cases=cv.cases, n_resamples=20)
    assert scores["p"].dropna().between(0, 1).all()


def test_the_rest_of_an_official_test_part_is_divided_into_folds(cohort, tmp_path):
    official = replace(cohort, table=cohort.table.assign(split=["train"] * 12 + ["test"] * 6))
    cv = cross_validate(official, ["mean"], out=tmp_path, **QUIET)
    assert cv.n_folds == 3
    assert {split.test for split in cv.splits} == {tuple(cohort.slide_ids[12:])}
    assert sorted(s for split in cv.splits for s in split.val) == cohort.slide_ids[:12]
    assert cv.table()["AUC"].between(0, 100).all()


def test_what_could_not_be_scored_is_refused_before_training(cohort, tmp_path):
    ids = cohort.slide_ids
    for split, message in (
        (Split(tuple(ids[:8]), tuple(ids[8:12]), tuple(ids[12::2])), "part test has class tumor"),
        (Split(tuple(ids[:8:2]), tuple(ids[8:12]), tuple(ids[12:])), "part train has class tumor"),
    ):
        with pytest.raises(CohortError, match=f"split 0: no slide of its {message}"):
            cross_validate(cohort, ["mean"], splits=[split], out=tmp_path / "runs", **QUIET)
    assert not (tmp_path / "runs").exists()


def test_a_run_remembers_which_tiles_the_bags_hold_and_refuses_bags_that_differ():
    bags, _ = make_bags(4)
    assert crossval._tiles(bags) == {}  # as by default, so that older runs stay the same runs
    made = {"tissue": "ihc", "min_tissue": 0.1, "tile_mpp": 1.0}
    bags = {name: replace(bag, attrs={**bag.attrs, **made, "patch_size": 512}) for name, bag in bags.items()}
    assert crossval._tiles(bags) == {"tiles": made | {"tile_size": 512}}
    for key, value, option in (("tissue", "tma", "tissue"), ("patch_size", 256, "tile-size")):
        differing = bags | {"s01": replace(bags["s01"], attrs={**bags["s01"].attrs, key: value})}
        with pytest.raises(BagError, match=f"bag s00 was made with .* bag s01 with .*--{option}"):
            crossval._tiles(differing)
