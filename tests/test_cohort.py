"""Cohorts are checked, and no case is split between the parts of a fold."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bag_factory import make_bag, make_bags, make_cohort
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.bags import write_bag
from hdmil_lib.cohort import (
    Cohort,
    load_bags,
    make_splits,
    read_splits,
    write_splits,
)
from hdmil_lib.errors import BagError, CohortError


def write_csv(folder: Path, text: str, slides=("a", "b", "c")) -> Path:
    for name in slides:
        (folder / f"{name}.tif").touch()
    path = folder / "labels.csv"
    path.write_text(text)
    return path


GOOD = "slide_id,case_id,label,path\na,1,tumor,a.tif\nb,1,tumor,b.tif\nc,2,normal,c.tif\n"


def test_labels_are_names_or_indices(tmp_path):
    by_name = Cohort.from_csv(write_csv(tmp_path, GOOD))
    assert by_name.classes == ("normal", "tumor")
    assert by_name.labels.tolist() == [1, 1, 0] and len(by_name) == 3
    assert by_name.slide_path("b") == tmp_path / "b.tif"
    numbers = GOOD.replace("tumor", "1").replace("normal", "0")
    assert Cohort.from_csv(write_csv(tmp_path, numbers), ["n", "t"]).table["label"].tolist() == [
        "t",
        "t",
        "n",
    ]
    assert Cohort.from_csv(write_csv(tmp_path, GOOD), ["tumor", "normal"]).labels.tolist() == [0, 0, 1]
    tens = GOOD.replace("tumor", "10").replace("normal", "9")
    assert Cohort.from_csv(write_csv(tmp_path, tens)).classes == ("9", "10")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("c.tif", "lost.tif"), "no slide file for c"),
        (GOOD.replace("case_id", "patient"), "no column case_id"),
        (GOOD.replace("b,1,tumor,b", "a,1,tumor,a"), "more than once: a"),
        (GOOD.replace("normal", "tumor"), "every slide is 'tumor'"),
        (GOOD.replace("b,1,tumor", "b,1,"), "no label for slide.* b"),
        (GOOD.replace("b,1,tumor", ",1,tumor"), "no slide_id"),
        (GOOD.splitlines()[0] + "\n", "no slides"),
    ],
)
def test_a_bad_label_file_gets_one_clear_error(tmp_path, text, message):
    path = write_csv(tmp_path, text)
    with pytest.raises(CohortError, match=message) as error:
        Cohort.from_csv(path)
    assert str(path) in str(error.value)


def test_unknown_labels_and_absent_files(tmp_path):
    with pytest.raises(CohortError, match="labels other than normal, benign for a, b"):
        Cohort.from_csv(write_csv(tmp_path, GOOD), ["normal", "benign"])
    with pytest.raises(CohortError, match="no such label file"):
        Cohort.from_csv(tmp_path / "none.csv")


def test_bags_and_rows_must_match(tmp_path):
    bags, labels = make_bags(4)
    cohort = make_cohort(tmp_path, bags, labels)
    again = partial(Cohort.from_csv, tmp_path / "cohort.csv", bag_dir=tmp_path / "bags")
    assert again().bag_path("s01") == tmp_path / "bags" / "s01.h5"
    with pytest.raises(CohortError, match="only a bag"):
        cohort.slide_path("s01")
    write_bag(tmp_path / "bags" / "extra.h5", make_bag("extra", 0))
    with pytest.raises(CohortError, match="no label for bags.* extra"):
        again()
    (tmp_path / "bags" / "extra.h5").unlink()
    (tmp_path / "bags" / "s02.h5").unlink()
    with pytest.raises(CohortError, match="no bag in .* s02"):
        again()


def test_a_cohort_survives_writing_and_selection(tmp_path):
    cohort = Cohort.from_csv(write_csv(tmp_path, GOOD))
    cohort.to_csv(tmp_path / "copy.csv")
    pd.testing.assert_frame_equal(Cohort.from_csv(tmp_path / "copy.csv").table, cohort.table)
    assert cohort.select(["c", "a"]).labels.tolist() == [0, 1]
    with pytest.raises(CohortError, match="no bags"):
        cohort.bag_path("a")


def cohort_of(slides_per_case: list[int], n_classes: int = 2) -> Cohort:
    rows = [
        {"slide_id": f"{case}-{i}", "case_id": f"c{case}", "label": f"class{case % n_classes}"}
        for case, n in enumerate(slides_per_case)
        for i in range(n)
    ]
    return Cohort(pd.DataFrame(rows), tuple(f"class{c}" for c in range(n_classes)), Path("."), None)


@settings(max_examples=30, deadline=None)
@given(
    slides_per_case=st.lists(st.integers(1, 4), min_size=20, max_size=60),
    n_folds=st.integers(3, 6),
    n_classes=st.integers(2, 3),
    seed=st.integers(0, 100),
)
def test_splits_keep_cases_together_and_classes_balanced(slides_per_case, n_folds, n_classes, seed):
    cohort = cohort_of(slides_per_case, n_classes)
    splits = make_splits(cohort, n_folds, seed)
    case_of = dict(zip(cohort.table["slide_id"], cohort.table["case_id"], strict=True))
    label_of = dict(zip(cohort.table["case_id"], cohort.table["label"], strict=True))
    tested = [s for split in splits for s in split.test]
    assert sorted(tested) == sorted(cohort.slide_ids)
    for k, split in enumerate(splits):
        parts = [{case_of[s] for s in part} for part in (split.train, split.val, split.test)]
        assert set.union(*parts) == set(case_of.values())
        assert sum(map(len, parts)) == len(label_of)
        assert split.val == splits[(k + 1) % n_folds].test
    for c in range(n_classes):  # cases of a class differ by one at most between folds
        counts = [len({case_of[s] for s in x.test if label_of[case_of[s]] == f"class{c}"}) for x in splits]
        assert max(counts) - min(counts) <= 1
    assert splits == make_splits(cohort, n_folds, seed)


def test_permuted_labels_stay_with_their_cases_and_keep_their_number(tmp_path):
    rows = [(f"s{i}", f"c{i // 2}", "tumor" if i < 8 else "normal", f"s{i}.tif") for i in range(24)]
    table = pd.DataFrame(rows, columns=["slide_id", "case_id", "label", "path"])
    cohort = Cohort(table, ("normal", "tumor"), tmp_path)
    permuted = cohort.permuted(3)
    assert permuted.labels.sum() == 8 and not np.array_equal(permuted.labels, cohort.labels)
    assert permuted.table.groupby("case_id")["label"].nunique().eq(1).all()
    assert permuted.slide_ids == cohort.slide_ids
    pd.testing.assert_frame_equal(permuted.table, cohort.permuted(3).table)
    assert cohort.table["label"].tolist() == table["label"].tolist()


def test_another_seed_is_another_split():
    cohort = cohort_of([1] * 40)
    assert make_splits(cohort, 5, 0) != make_splits(cohort, 5, 1)


def test_too_few_cases_or_folds():
    with pytest.raises(CohortError, match="class 'class1' has 4 case"):
        make_splits(cohort_of([3] * 9), 5, 0)
    with pytest.raises(CohortError, match="three or more"):
        make_splits(cohort_of([1] * 20), 2, 0)


def test_splits_are_written_as_clam_reads_them(tmp_path):
    splits = make_splits(cohort_of([1, 2] * 12), 3, 0)
    write_splits(splits, tmp_path)
    table = pd.read_csv(tmp_path / "splits_1.csv", index_col=0)
    assert table.columns.tolist() == ["train", "val", "test"]
    assert table["val"].dropna().tolist() == list(splits[1].val)
    assert read_splits(tmp_path) == splits


def test_bad_split_files(tmp_path):
    with pytest.raises(CohortError, match="no splits_0.csv"):
        read_splits(tmp_path)
    (tmp_path / "splits_0.csv").write_text(",train,val\n0,a,b\n")
    with pytest.raises(CohortError, match="needs train, val, test"):
        read_splits(tmp_path)
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,a,b,a\n")
    with pytest.raises(CohortError, match="in two parts: a"):
        read_splits(tmp_path)


def test_load_bags_reads_all_without_tile_labels(tmp_path):
    bags, labels = make_bags(4)
    cohort = make_cohort(tmp_path, bags, labels)
    loaded = load_bags(cohort)
    assert list(loaded) == list(bags)
    assert loaded["s01"].features.dtype == np.float16
    np.testing.assert_array_equal(loaded["s01"].features, bags["s01"].features)
    np.testing.assert_array_equal(loaded["s01"].patches, bags["s01"].patches)


def test_a_bag_of_another_dimension_is_named(tmp_path):
    bags, labels = make_bags(6)
    bags["s03"] = make_bag("s03", 1, dim=8)
    with pytest.raises(BagError, match="s03"):
        load_bags(make_cohort(tmp_path, bags, labels))
