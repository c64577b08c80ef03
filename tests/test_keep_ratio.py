"""Budgets of tiles: who is kept, what DMIN says of them, held against loops over slides and tiles."""

import inspect
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import DIM, make_bag, make_cohort
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.bags import read_tile_labels, write_bag
from hdmil_lib.batches import BagDataset
from hdmil_lib.errors import CohortError
from hdmil_lib.evaluation.metrics import auc, tumor_recall
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import HDMIL, LIPN, create_model
from hdmil_lib.reproduce.keep_ratio import (
    KEEP_RATIOS,
    attention_scores,
    lipn_scores,
    n_kept,
    place_in_bag,
    probabilities,
    score_by_keep_ratio,
    score_rankings,
    tile_evidence,
    tile_tumor_shares,
    within_slide_auc,
)
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.storage import read_json, save_weights
from hdmil_lib.training.crossval import cross_validate

LENGTHS = (12, 7, 15, 9, 1, 20)


@pytest.fixture(scope="module")
def bags():
    return {f"s{i}": make_bag(f"s{i}", i % 2, n) for i, n in enumerate(LENGTHS)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HDMIL(create_model("dmin", DIM, 2, embed_dim=16, attention_dim=8, degree=4), LIPN(2))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    labels = {f"s{i:02d}": i % 2 for i in range(15)}
    bags = {s: make_bag(s, label, 9 + i) for i, (s, label) in enumerate(labels.items())}
    cohort = make_cohort(tmp_path_factory.mktemp("cohort"), bags, labels)
    for s, bag in bags.items():
        n_tumor = max(1, len(bag.features) // 3) if labels[s] else 0
        shares = np.where(np.arange(len(bag.features)) < n_tumor, 0.5, 0.1 * labels[s])
        write_bag(cohort.bag_path(s), bag, shares.astype(np.float32))
    return cohort, bags


@pytest.fixture(scope="module")
def cv(cohort, tmp_path_factory):
    """A cross-validation whose networks are put in place of what so short a training leaves.

    Every machine then has the same networks, and LIPN, normalized by the statistics of the patches, tells
    patches apart by far more than rounding.
    """
    cohort, bags = cohort
    folder = tmp_path_factory.mktemp("run")
    recipe = RECIPES["camelyon-mini"].shorter(epochs=1)
    options = {"folds": 3, "recipe": recipe, "out": folder, "workers": 1, "progress": False}
    cv = cross_validate(cohort, ["hdmil"], bags=bags, **options)
    patches = torch.cat([torch.from_numpy(bag.patches) for bag in bags.values()])
    for fold in range(3):
        torch.manual_seed(fold)
        dmin = create_model(**read_json(folder / "hdmil_dagger" / f"fold{fold}" / "model.json"))
        save_weights(dmin, folder / "hdmil_dagger" / f"fold{fold}" / "model.safetensors")
        lipn = LIPN(2)
        for module in lipn.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        lipn.train()(patches)
        save_weights(lipn, folder / "hdmil" / f"fold{fold}" / "model.safetensors")
    return cv


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_places_are_those_of_each_bag_sorted_alone(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (sum(lengths),), generator=generator).float()
    places = place_in_bag(scores, Segments(lengths), generator)
    for own, score in zip(places.split(lengths), scores.split(lengths), strict=True):
        assert sorted(own.tolist()) == list(range(len(own)))
        assert score[own.argsort()].tolist() == sorted(score.tolist(), reverse=True)


def test_equal_tiles_come_in_any_order():
    generator = torch.Generator().manual_seed(0)
    firsts = [place_in_bag(torch.zeros(4), Segments([4]), generator).argmin() for _ in range(400)]
    # four standard deviations of a binomial count of 400 draws with probability 1/4
    assert np.bincount(firsts, minlength=4) == pytest.approx(100, abs=4 * np.sqrt(400 * 3 / 16))


def test_a_bag_keeps_its_share_and_at_least_one_tile():
    assert n_kept(Segments([10, 3, 1, 130]), 0.3).tolist() == [3, 1, 1, 39]
    assert n_kept(Segments([10, 3, 1, 130]), 0.05).tolist() == [1, 1, 1, 6]


def test_dmin_sees_the_kept_tiles_alone(bags, model, monkeypatch):
    monkeypatch.setattr(BagDataset.batches, "__defaults__", (20,))  # several batches of several bags
    dmin, slide_ids = model.dmin, list(bags)
    kept = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(1)) < 0.5
    kept[Segments(LENGTHS).offsets[:-1]] = True
    found = probabilities(dmin, BagDataset(bags), slide_ids, kept)
    with torch.inference_mode():
        for slide_id, mask, row in zip(slide_ids, kept.split(LENGTHS), found, strict=True):
            alone = dmin(torch.from_numpy(bags[slide_id].features).float()[mask])
            np.testing.assert_allclose(row, alone.logits[0].double().softmax(0), atol=1e-6)  # float32 sums


def test_scores_are_the_highest_over_branches(bags, model):
    slide_ids, data = list(bags)[::-1], BagDataset(bags)
    attention, scores = attention_scores(model.dmin, data, slide_ids), lipn_scores(model, data, slide_ids)
    lengths = [len(bags[s]) for s in slide_ids]
    with torch.inference_mode():
        for s, a, p in zip(slide_ids, attention.split(lengths), scores.split(lengths), strict=True):
            batch = data.batch([s])
            torch.testing.assert_close(a, model.dmin(batch.features).attention.amax(1))
            torch.testing.assert_close(p, model.lipn(batch.patches).amax(1))


def smallest_gap(values):
    return np.diff(np.sort(values)).min(initial=np.inf)


def test_the_table_agrees_with_loops_over_slides(cohort, cv):
    """Scores of tiles and of slides lie too far apart for rounding to change their order."""
    cohort, bags = cohort
    table = score_by_keep_ratio(cv, cohort, bags, n_draws=2)
    assert list(table) == ["source", "fold", "keep_ratio", "auc", "tumor_recall"]
    assert len(table) == 4 * 3 * len(KEEP_RATIOS)
    data = BagDataset(bags, cohort.label_of)
    for fold, split in enumerate(cv.splits):
        model = cv.hdmil(fold)
        lengths = [len(bags[s]) for s in split.test]
        rankings = {
            "DMIN attention": attention_scores(model.dmin, data, split.test).split(lengths),
            "LIPN": lipn_scores(model, data, split.test).split(lengths),
        }
        for source, ratio in product(rankings, KEEP_RATIOS):
            scores, recalls = [], []
            for s, score in zip(split.test, rankings[source], strict=True):
                assert smallest_gap(score.numpy()) > 1e-5
                kept = score.argsort(descending=True)[: max(1, round(ratio * len(score)))]
                with torch.inference_mode():
                    logits = model.dmin(data.batch([s]).features[kept]).logits
                scores.append(logits[0].double().softmax(0).numpy())
                mask = np.isin(np.arange(len(score)), kept)
                recalls.append(tumor_recall(mask, read_tile_labels(cohort.bag_path(s))))
            assert smallest_gap(np.array(scores)[:, 1]) > 1e-4
            row = table.query("source == @source and fold == @fold and keep_ratio == @ratio").iloc[0]
            labels = [data.labels[s] for s in split.test]
            assert row["auc"] == pytest.approx(auc(labels, np.array(scores)))
            assert row["tumor_recall"] == pytest.approx(np.nanmean(recalls))


def test_all_sources_agree_on_all_tiles_and_truth_finds_the_tumor_first(cohort, cv):
    table = score_by_keep_ratio(cv, *cohort, n_draws=20)
    whole = table[table["keep_ratio"] == 1]
    assert (whole["tumor_recall"] == 1).all()
    auc_by_fold = whole.groupby("fold")["auc"]
    assert (auc_by_fold.max() - auc_by_fold.min() < 1e-12).all()  # a mean of equal draws rounds
    recall = table.pivot_table(index="source", columns="keep_ratio", values="tumor_recall")
    assert recall.loc["ground truth", [0.6]].item() == 1  # a third of the tiles is tumor
    # 20 draws of some 12 tiles on 7 slides: a standard error of about 0.02
    assert recall.loc["random", 0.6] == pytest.approx(0.6, abs=0.08)
    assert recall.loc["ground truth", 0.05] > recall.loc["random", 0.05]


def test_the_same_seed_gives_the_same_table(cohort, cv):
    first, second = (score_by_keep_ratio(cv, *cohort, n_draws=2, seed=4) for _ in range(2))
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_only_test_slides_can_be_scored(cohort, cv):
    """Over all folds the validation slides are test slides: a choice by them has seen every one."""
    assert "part" not in inspect.signature(score_by_keep_ratio).parameters
    with pytest.raises(TypeError, match="part"):
        score_by_keep_ratio(cv, *cohort, part="val")


def test_without_tile_labels_there_is_no_ground_truth(bags, model):
    slide_ids = list(bags)
    table = score_rankings(
        model.dmin,
        BagDataset(bags, {s: i % 2 for i, s in enumerate(slide_ids)}),
        slide_ids,
        {"first": -torch.arange(sum(LENGTHS)).float()},
        None,
        keep_ratios=(0.5,),
        n_draws=1,
        generator=torch.Generator(),
    )
    assert table["source"].tolist() == ["first", "random"]
    assert table["tumor_recall"].isna().all()


def test_tile_labels_are_all_or_none(cohort, tmp_path):
    cohort, bags = cohort
    assert len(tile_tumor_shares(cohort, ["s00", "s01"])) == 9 + 10
    labels = {s: int(s == "s01") for s in ("s00", "s01")}
    unlabeled = make_cohort(tmp_path, {s: bags[s] for s in labels}, labels)
    assert tile_tumor_shares(unlabeled, ["s00", "s01"]) is None


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.2])
def test_impossible_ratios_are_named(cohort, cv, ratio):
    with pytest.raises(ValueError, match=f"keep_ratios has {ratio}"):
        score_by_keep_ratio(cv, *cohort, keep_ratios=(0.5, ratio))


def test_slides_of_one_class_have_no_auc(bags, model):
    with pytest.raises(CohortError, match="no AUC"):
        score_rankings(
            model.dmin,
            BagDataset(bags, {"s0": 0, "s2": 0}),
            ["s0", "s2"],
            {},
            None,
            keep_ratios=(1.0,),
            n_draws=1,
            generator=torch.Generator(),
        )


def test_evidence_is_the_log_odds_of_a_tile_as_a_bag(bags, model):
    data = BagDataset(bags)
    found = tile_evidence(model.dmin.eval(), data, data.slide_ids)
    with torch.inference_mode():
        alone = [
            model.dmin(torch.from_numpy(tile[None]).float()).logits[0]
            for bag in bags.values()
            for tile in bag.features
        ]
    expected = torch.stack([logits.softmax(0)[1].logit() for logits in alone])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # logit of a rounded probability


def test_within_slides_clear_tiles_are_compared():
    segments = Segments([4, 3, 2])
    share = torch.tensor([0.0, 1.0, 0.2, 0.6, 0.0, 0.0, 0.0, 1.0, 1.0])
    scores = torch.tensor([0.5, 0.9, 9.0, 0.1, 1.0, 2.0, 3.0, 1.0, 2.0])
    # In the first slide one of the two tumor tiles is above the normal one; the others lack a class.
    assert within_slide_auc(scores, share, segments).tolist() == [0.5]
