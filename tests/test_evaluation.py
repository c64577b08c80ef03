"""A model on a labeled cohort: rows as single predictions are, patients as their slides are."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from bag_factory import make_bag
from model_factory import make_model

from hdmil_lib.bags import EncoderIdentity, write_bag
from hdmil_lib.cohort import Cohort
from hdmil_lib.errors import BagError, CohortError
from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.inference.evaluation import by_patient, evaluate, scores_of


@pytest.fixture
def case(tmp_path):
    rows = []
    for i in range(8):
        bag = make_bag(f"s{i}", i % 2, 6 + i, dim=6, seed=i)
        write_bag(tmp_path / f"s{i}.h5", replace(bag, encoder=EncoderIdentity("color", "c01")))
        rows.append({"slide_id": f"s{i}", "case_id": f"p{i // 2}", "label": ("class 0", "class 1")[i % 2]})
    return make_model(), Cohort(pd.DataFrame(rows), ("class 0", "class 1"), tmp_path, tmp_path)


@pytest.mark.parametrize("all_tiles", [False, True])
def test_rows_are_those_of_single_predictions(case, all_tiles):
    model, cohort = case
    table = evaluate(model, cohort, all_tiles=all_tiles, progress=False)
    assert table["slide_id"].tolist() == cohort.slide_ids
    bags = cohort.load_bags()
    for row in table.itertuples():
        prediction = model.predict(bags[row.slide_id], all_tiles=all_tiles)
        assert (row.p_0, row.p_1) == pytest.approx(tuple(prediction.probabilities))
        assert row.n_read == prediction.n_read <= row.n_tiles == len(bags[row.slide_id])
        assert row.label == cohort.label_of[row.slide_id]
    found = scores_of(table, n_resamples=50)
    assert found["AUC"] == auc(table["label"], table[["p_0", "p_1"]].to_numpy())
    assert found["AUC low"] <= found["AUC"] <= found["AUC high"]
    assert found["tiles read"] == pytest.approx(table["keep_ratio"].mean())


def test_a_patient_is_the_mean_of_the_slides_with_the_highest_class(case):
    table = evaluate(*case, progress=False)
    patients = by_patient(table)
    assert patients["case_id"].tolist() == ["p0", "p1", "p2", "p3"]
    assert patients["label"].tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(patients["p_1"], table["p_1"].to_numpy().reshape(4, 2).mean(1))
    assert patients["n_tiles"].sum() == table["n_tiles"].sum()
    assert np.isnan(scores_of(patients, n_resamples=20)["AUC"])  # no patient of class 0


def test_classes_are_matched_by_name(case):
    model, cohort = case
    only = cohort.select(cohort.slide_ids[1::2])
    renamed = Cohort(only.table, ("class 1",), only.root, only.bag_dir)
    assert evaluate(model, renamed, progress=False)["label"].tolist() == [1, 1, 1, 1]
    other = Cohort(
        cohort.table.replace("class 0", "benign"), ("benign", "class 1"), cohort.root, cohort.bag_dir
    )
    with pytest.raises(CohortError, match="does not know class 'benign'"):
        evaluate(model, other, progress=False)


@pytest.mark.parametrize(
    "tiles", [{"tile_mpp": 1.0, "patch_size": 256}, {"tile_mpp": 0.5, "patch_size": 512}]
)
def test_a_bag_of_other_tiles_than_those_of_the_model_is_refused(case, tiles):
    model, cohort = case
    bag = next(iter(cohort.load_bags().values()))
    with pytest.raises(
        BagError, match="the model was trained on 256 at 0.5; extract the slide with --tile-size"
    ):
        model.predict(replace(bag, attrs={**bag.attrs, **tiles}))
    model.predict(replace(bag, attrs={**bag.attrs, "tile_mpp": 0.5, "patch_size": 256}))
