"""The tables against cases worked by hand and against figures printed in the paper."""

import numpy as np
import pandas as pd
import pytest
from bag_factory import make_bags, make_cohort

from hdmil_lib.bags import write_bag
from hdmil_lib.errors import CohortError
from hdmil_lib.reproduce import tables
from hdmil_lib.reproduce.paper import PAPER_TABLE1, PAPER_TABLE2, PAPER_TABLE3
from hdmil_lib.reproduce.tables import add_mask_scores, save_table, table1, table2, table3, to_markdown
from hdmil_lib.training.crossval import cross_validate
from hdmil_lib.training.fit import TrainSettings
from hdmil_lib.training.recipes import Recipe


def predictions(methods, folds=2, **columns):
    """Folds of four slides; fold 0 ranks them right, fold 1 exchanges one pair: AUC 1 and 0.75."""
    rows = []
    for method in methods:
        for fold in range(folds):
            for slide, (label, p) in enumerate([(0, 0.1), (0, 0.6 if fold else 0.2), (1, 0.55), (1, 0.9)]):
                rows.append(
                    {"method": method, "fold": fold, "slide_id": f"{fold}-{slide}", "label": label}
                    | {"p_0": 1 - p, "p_1": p, "keep_ratio": 0.5 if method == "hdmil" else 1.0}
                    | columns
                )
    return pd.DataFrame(rows)


def timings(**totals):
    """Two slides, three repeats; slide b takes twice as long, and one repeat was disturbed."""
    rows = []
    for method, total in totals.items():
        for slide, scale in (("a", 1), ("b", 2)):
            for repeat, disturbance in enumerate((0, 100, 0)):
                seconds = scale * total + disturbance
                rows.append(
                    {"method": method.replace("_dagger", "†"), "slide_id": slide, "repeat": repeat}
                    | {"n_tiles": 2000 * scale, "keep_ratio": 1.0 if "dagger" in method else 0.5}
                    | {"thumbnail": 0.0, "lipn": 0.0, "crop": 0.0, "features": seconds, "dmin": 0.0}
                    | {"total": seconds}
                )
    return pd.DataFrame(rows)


def test_table1_prints_mean_and_sd_over_folds_beside_the_paper():
    table = table1(predictions(["hdmil", "max"]))
    assert list(table.index) == ["Max-Pooling", "HDMIL"]  # the paper's order, not the order of training
    # AUC 1 and 0.75, ACC 1 and 0.75: mean 87.5, sd 12.5 * sqrt(2)
    assert table.loc["HDMIL", ["AUC", "ACC"]].tolist() == ["87.50 (17.68)", "87.50 (17.68)"]
    assert table.loc["HDMIL", "tiles read"] == 50
    assert table.loc["HDMIL", "paper AUC"] == "90.88 (2.75)"
    assert table.loc["Max-Pooling", "paper s/slide"] == 23.46


def test_table1_has_a_row_for_the_random_control_that_the_paper_lacks():
    table = table1(predictions(["hdmil", "random"]))
    row = table.loc["Random tiles, as many as HDMIL"]
    assert row["AUC"] == "87.50 (17.68)"
    assert pd.isna(row["paper AUC"])


def test_table1_gives_methods_that_read_all_tiles_the_time_of_all_tiles():
    table = table1(predictions(["max", "hdmil_dagger", "hdmil"]), timings(HDMIL_dagger=10, HDMIL=6))
    assert table["s/slide"].tolist() == [15, 15, 9]  # mean of 10 and 20; of 6 and 12


def test_table1_averages_tumor_recall_over_slides_with_tumor():
    table = predictions(["hdmil"])
    table["tumor_recall"] = np.where(table["label"] == 1, 0.8, np.nan)
    assert table1(table).loc["HDMIL", "tumor recall"] == pytest.approx(80)


def test_table1_refuses_a_fold_without_a_class():
    with pytest.raises(CohortError, match="class 1"):
        table1(predictions(["max"]).query("label == 0"))


def test_table2_takes_medians_over_repeats_and_means_over_slides():
    table = table2(timings(HDMIL_dagger=10, HDMIL=6))
    ours = table.loc["here"]
    assert ours.loc["HDMIL†", "total"] == 15
    assert ours.loc["HDMIL", ["total", "keep_ratio", "time_ratio"]].tolist() == [9, 0.5, 0.6]
    assert ours.loc["HDMIL", "saved"] == pytest.approx(40)


def test_table2_repeats_the_savings_that_the_paper_states():
    saved = table2(timings(HDMIL_dagger=10, HDMIL=6))["saved"].xs("HDMIL", level="method")
    assert saved[["Camelyon16", "NSCLC", "BRCA"]].round(1).tolist() == [28.6, 21.8, 7.2]


def test_table3_orders_components_as_they_are_added():
    table = table3(
        predictions(["hdmil", "dmin_linear", "dmin_no_distillation", "hdmil_dagger"]), cohort="BRCA"
    )
    assert list(table.index) == ["none", "+CKA", "+SelfDist", "+LIPN"]
    assert table.loc["+SelfDist", "AUC"] == "87.50 (17.68)"
    assert table["paper AUC"].tolist() == [88.82, 91.22, 93.33, 93.27]


def test_the_papers_tables_are_complete():
    assert PAPER_TABLE1.shape == (39, 3)
    assert PAPER_TABLE1.notna().all(axis=None)
    assert PAPER_TABLE3.shape == (12, 2)
    assert PAPER_TABLE3.notna().all(axis=None)
    stages = PAPER_TABLE2.loc["Camelyon16", ["lipn", "crop", "features", "dmin"]].sum(axis=1)
    # the paper rounds every stage to 0.01 s
    np.testing.assert_allclose(stages, PAPER_TABLE2.loc["Camelyon16", "total"], atol=0.021)


def test_markdown_and_csv_say_the_same(tmp_path):
    table = table2(timings(HDMIL_dagger=10, HDMIL=6))
    save_table(table, tmp_path / "tables" / "table2")
    assert (tmp_path / "tables" / "table2.md").read_text() == to_markdown(table)
    assert "| here | HDMIL | 3000.00 | 0.50 |" in to_markdown(table)
    assert "| BRCA | HDMIL† | - | - |" in to_markdown(table)
    again = pd.read_csv(tmp_path / "tables" / "table2.csv", index_col=[0, 1])
    pd.testing.assert_frame_equal(again, table)


@pytest.fixture(scope="module")
def crossval(tmp_path_factory):
    """A short cross-validation on bags whose first third is tumor, with its cohort and bags."""
    folder = tmp_path_factory.mktemp("crossval")
    bags, labels = make_bags(12)
    cohort = make_cohort(folder, bags, labels)
    for slide_id, bag in bags.items():
        truth = np.where(np.arange(len(bag)) < len(bag) // 3, labels[slide_id], 0.0)
        write_bag(cohort.bag_path(slide_id), bag, truth)
    short = TrainSettings(epochs=2, min_epochs=0)
    models = {"dmin": {"embed_dim": 8, "attention_dim": 4, "degree": 3}}
    cv = cross_validate(
        cohort,
        ["max", "hdmil_dagger", "hdmil", "random"],
        folds=3,
        recipe=Recipe(short, short, short, models),
        out=folder / "runs",
        bags=bags,
        workers=1,
        progress=False,
    )
    return cv, cohort, bags


def test_masks_are_scored_by_the_networks_that_never_saw_the_slide(crossval):
    cv, _, bags = crossval
    scored = add_mask_scores(*crossval)
    pd.testing.assert_frame_equal(scored[cv.predictions.columns], cv.predictions)
    for row in scored[scored["method"].isin(["hdmil_dagger", "hdmil"])].itertuples():
        assert row.slide_id in cv.splits[row.fold].test
        model = cv.hdmil(row.fold)
        mask = model.predict(bags[row.slide_id], all_tiles=row.method == "hdmil_dagger").mask.any(axis=1)
        assert row.kept == mask.mean()
        assert np.isnan(row.tumor_recall) if row.label == 0 else row.tumor_recall == mask[:4].mean()


def test_masks_of_methods_that_have_none(crossval):
    scored = add_mask_scores(*crossval).set_index("method")
    assert scored.loc["max", ["kept", "tumor_recall"]].isna().all(axis=None)
    random = scored.loc["random"]
    assert (random["kept"] == random["keep_ratio"]).all()
    expected = random["keep_ratio"].where(random["label"] == 1)
    np.testing.assert_array_equal(random["tumor_recall"], expected)


def test_hdmil_keeps_what_it_reads_and_predicts_as_the_cross_validation_did(crossval):
    cv, _, bags = crossval
    scored = add_mask_scores(*crossval)
    hdmil = scored[scored["method"] == "hdmil"]
    np.testing.assert_allclose(hdmil["kept"], hdmil["keep_ratio"])
    for row in hdmil.itertuples():
        probabilities = cv.model("hdmil", row.fold).predict(bags[row.slide_id]).probabilities
        # the table was written with the shortest decimals that give back a float64
        np.testing.assert_allclose(probabilities, [row.p_0, row.p_1], atol=1e-6)


def test_a_method_that_opens_its_own_tiles_gets_the_seconds_of_that_share():
    medians = pd.DataFrame(
        {"keep_ratio": [1.0, 0.64, 0.3], "total": [22.0, 15.0, 7.0]}, ["HDMIL†", "HDMIL", "b"]
    )
    assert tables._seconds(None, 0.29, medians) == 7.0
    assert np.isnan(tables._seconds(None, 0.4, medians))
    assert np.isnan(tables._seconds("joint", 0.3, medians))
    assert tables._seconds(None, 1.0, medians) == 22.0
    assert tables._seconds("lipn", 0.3, medians) == 15.0
