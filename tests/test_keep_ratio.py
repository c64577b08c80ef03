"""Budgets of tiles: who is kept, what DMIN says of them, held against loops over slides and tiles."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import DIM, make_bag, make_cohort
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.cohort import read_splits
from hdmil_lib.errors import CohortError
from hdmil_lib.reproduce.keep_ratio import (
    KEEP_RATIOS,
    attention_scores,
    lipn_scores,
    n_kept,
    place_in_bag,
    probabilities,
    score_by_keep_ratio,
    score_rankings,
    tumor_share,
)
from hdmil_lib.evaluation.metrics import auc, tumor_recall
from hdmil_lib.bags import read_tile_labels, write_bag
from hdmil_lib.models import LIPN, build_model
from hdmil_lib.models.ragged import cumulative
from hdmil_lib.training.crossval import load_fold, run_crossval
from hdmil_lib.batches import RaggedBags
from hdmil_lib.training.recipes import RECIPES

LENGTHS = (12, 7, 15, 9, 1, 20)


@pytest.fixture(scope="module")
def bags():
    return {f"s{i}": make_bag(f"s{i}", i % 2, n) for i, n in enumerate(LENGTHS)}


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return build_model("dmin", DIM, 2, embed_dim=16, attention_dim=8, degree=4).eval(), LIPN(2).eval()


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
def run_dir(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = RECIPES["camelyon-mini"].shorter(epochs=2)
    run_crossval(*cohort, ["hdmil"], 3, 0, recipe, folder, workers=1, progress=False)
    return folder


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_places_are_those_of_each_bag_sorted_alone(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (sum(lengths),), generator=generator).float()
    places = place_in_bag(scores, cumulative(lengths), generator)
    for own, score in zip(places.split(lengths), scores.split(lengths), strict=True):
        assert sorted(own.tolist()) == list(range(len(own)))
        assert score[own.argsort()].tolist() == sorted(score.tolist(), reverse=True)


def test_equal_tiles_come_in_any_order():
    generator = torch.Generator().manual_seed(0)
    firsts = [place_in_bag(torch.zeros(4), torch.tensor([0, 4]), generator).argmin() for _ in range(400)]
    # four standard deviations of a binomial count of 400 draws with probability 1/4
    assert np.bincount(firsts, minlength=4) == pytest.approx(100, abs=4 * np.sqrt(400 * 3 / 16))


def test_a_bag_keeps_its_share_and_at_least_one_tile():
    assert n_kept(cumulative([10, 3, 1, 130]), 0.3).tolist() == [3, 1, 1, 39]
    assert n_kept(cumulative([10, 3, 1, 130]), 0.05).tolist() == [1, 1, 1, 6]


def test_dmin_sees_the_kept_tiles_alone(bags, networks, monkeypatch):
    monkeypatch.setattr(RaggedBags.chunks, "__defaults__", (20,))  # several bags a chunk, several chunks
    dmin, slide_ids = networks[0], list(bags)
    kept = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(1)) < 0.5
    kept[cumulative(LENGTHS)[:-1]] = True
    found = probabilities(dmin, RaggedBags(bags, slide_ids), slide_ids, kept)
    with torch.inference_mode():
        for slide_id, mask, row in zip(slide_ids, kept.split(LENGTHS), found, strict=True):
            alone = dmin(torch.from_numpy(bags[slide_id].features).float()[mask])
            np.testing.assert_allclose(row, alone.logits.double().softmax(0), atol=1e-6)  # float32 sums


def test_scores_are_the_highest_over_branches(bags, networks):
    dmin, lipn = networks
    slide_ids = list(bags)[::-1]
    data = RaggedBags(bags, list(bags), ("features", "patches"))
    attention, scores = attention_scores(dmin, data, slide_ids), lipn_scores(lipn, data, slide_ids)
    lengths = [len(bags[s].features) for s in slide_ids]
    with torch.inference_mode():
        for s, a, p in zip(slide_ids, attention.split(lengths), scores.split(lengths), strict=True):
            torch.testing.assert_close(a, dmin(torch.from_numpy(bags[s].features).float()).attention.amax(1))
            torch.testing.assert_close(p, lipn(torch.from_numpy(bags[s].patches)).amax(1))


def test_the_table_agrees_with_loops_over_slides(cohort, run_dir):
    cohort, bags = cohort
    table = score_by_keep_ratio(cohort, bags, run_dir, part="val", n_draws=2)
    assert list(table) == ["source", "fold", "keep_ratio", "auc", "tumor_recall"]
    assert len(table) == 4 * 3 * len(KEEP_RATIOS)
    labels = dict(zip(cohort.slide_ids, cohort.labels.tolist(), strict=True))
    for fold, split in enumerate(read_splits(run_dir / "splits")):
        dmin, lipn, _ = load_fold(run_dir, fold)
        data = RaggedBags(bags, split.val, ("features", "patches"))
        lengths = [len(bags[s].features) for s in split.val]
        rankings = {
            "DMIN attention": attention_scores(dmin, data, split.val).split(lengths),
            "LIPN": lipn_scores(lipn, data, split.val).split(lengths),
        }
        for source, ratio in product(rankings, KEEP_RATIOS):
            scores, recalls = [], []
            for s, score in zip(split.val, rankings[source], strict=True):
                kept = score.argsort(descending=True)[: max(1, round(ratio * len(score)))]
                with torch.inference_mode():
                    logits = dmin(torch.from_numpy(bags[s].features).float()[kept]).logits
                scores.append(logits.double().softmax(0).numpy())
                mask = np.isin(np.arange(len(score)), kept)
                recalls.append(tumor_recall(mask, read_tile_labels(cohort.bag_path(s))))
            row = table.query("source == @source and fold == @fold and keep_ratio == @ratio").iloc[0]
            # float32 sums differ in the last bits, which no ranking of these slides turns on
            assert row["auc"] == pytest.approx(auc([labels[s] for s in split.val], np.array(scores)))
            assert row["tumor_recall"] == pytest.approx(np.nanmean(recalls))


def test_all_sources_agree_on_all_tiles_and_truth_finds_the_tumor_first(cohort, run_dir):
    cohort, bags = cohort
    table = score_by_keep_ratio(cohort, bags, run_dir, n_draws=20)
    whole = table[table["keep_ratio"] == 1]
    assert (whole["tumor_recall"] == 1).all()
    assert (whole.groupby("fold")["auc"].nunique() == 1).all()
    recall = table.pivot_table(index="source", columns="keep_ratio", values="tumor_recall")
    assert recall.loc["ground truth", [0.6]].item() == 1  # a third of the tiles is tumor
    # 20 draws of some 12 tiles on 7 slides: a standard error of about 0.02
    assert recall.loc["random", 0.6] == pytest.approx(0.6, abs=0.08)
    assert recall.loc["ground truth", 0.05] > recall.loc["random", 0.05]


def test_the_same_seed_gives_the_same_table(cohort, run_dir):
    first, second = (score_by_keep_ratio(*cohort, run_dir, n_draws=2, seed=4) for _ in range(2))
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_without_tile_labels_there_is_no_ground_truth(bags, networks):
    slide_ids = list(bags)
    table = score_rankings(
        networks[0],
        RaggedBags(bags, slide_ids),
        slide_ids,
        {s: i % 2 for i, s in enumerate(slide_ids)},
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
    assert len(tumor_share(cohort, ["s00", "s01"])) == 9 + 10
    labels = {s: int(s == "s01") for s in ("s00", "s01")}
    unlabelled = make_cohort(tmp_path, {s: bags[s] for s in labels}, labels)
    assert tumor_share(unlabelled, ["s00", "s01"]) is None


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.2])
def test_impossible_ratios_are_named(cohort, run_dir, ratio):
    with pytest.raises(ValueError, match=f"keep_ratios has {ratio}"):
        score_by_keep_ratio(*cohort, run_dir, keep_ratios=(0.5, ratio))


def test_slides_of_one_class_have_no_auc(bags, networks):
    with pytest.raises(CohortError, match="no AUC"):
        score_rankings(
            networks[0],
            RaggedBags(bags, ["s0", "s2"]),
            ["s0", "s2"],
            {"s0": 0, "s2": 0},
            {},
            None,
            keep_ratios=(1.0,),
            n_draws=1,
            generator=torch.Generator(),
        )
