"""Cohorts are checked, and no case is split between the parts of a fold."""

from dataclasses import replace
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
    check_repeated_slides,
    check_splits,
    column_split,
    make_splits,
    official_splits,
)
from hdmil_lib.errors import BagError, CohortError
from hdmil_lib.splits import Split, read_splits, write_splits
from hdmil_lib.storage import read_table


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
    assert by_name.labels.tolist() == [1, 1, 0]
    assert len(by_name) == 3
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


def test_every_row_needs_a_bag_and_other_bags_are_left_out(tmp_path):
    bags, labels = make_bags(4)
    cohort = make_cohort(tmp_path, bags, labels)
    again = partial(Cohort.from_csv, tmp_path / "cohort.csv", bags=tmp_path / "bags")
    assert again().bag_path("s01") == tmp_path / "bags" / "s01.h5"
    with pytest.raises(CohortError, match="only a bag"):
        cohort.slide_path("s01")
    write_bag(tmp_path / "bags" / "extra.h5", make_bag("extra", 0, dim=3))
    assert again().slide_ids == cohort.slide_ids
    assert list(again().load_bags()) == cohort.slide_ids
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
    with pytest.raises(CohortError, match="no bags"):
        cohort.load_bags()


def test_labels_and_cases_by_slide(tmp_path):
    cohort = Cohort.from_csv(write_csv(tmp_path, GOOD))
    assert cohort.label_of == {"a": 1, "b": 1, "c": 0}
    assert cohort.case_of == {"a": "1", "b": "1", "c": "2"}
    assert all(type(label) is int for label in cohort.label_of.values())


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
    case_of = cohort.case_of
    label_of = dict(zip(cohort.table["case_id"], cohort.table["label"], strict=True))
    check_splits(splits, cohort)
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
    assert permuted.labels.sum() == 8
    assert not np.array_equal(permuted.labels, cohort.labels)
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
    loaded = cohort.load_bags()
    assert list(loaded) == list(bags)
    assert loaded["s01"].features.dtype == np.float16
    np.testing.assert_array_equal(loaded["s01"].features, bags["s01"].features)
    np.testing.assert_array_equal(loaded["s01"].patches, bags["s01"].patches)


def test_a_bag_of_another_dimension_is_named(tmp_path):
    bags, labels = make_bags(6)
    bags["s03"] = make_bag("s03", 1, dim=8)
    with pytest.raises(BagError, match="s03"):
        make_cohort(tmp_path, bags, labels).load_bags()


# A part set aside for choices


@settings(max_examples=20, deadline=None)
@given(
    slides_per_case=st.lists(st.integers(1, 4), min_size=20, max_size=60),
    n_classes=st.integers(2, 3),
    share=st.floats(0.2, 0.8),
    seed=st.integers(0, 100),
)
def test_a_part_is_set_aside_by_case_and_stratified(slides_per_case, n_classes, share, seed):
    cohort = cohort_of(slides_per_case, n_classes)
    first, rest = cohort.set_aside(share, seed)
    assert sorted(first.slide_ids + rest.slide_ids) == sorted(cohort.slide_ids)
    for part in (first, rest):
        chosen = set(part.slide_ids)
        assert part.slide_ids == [s for s in cohort.slide_ids if s in chosen]
        assert part.classes == cohort.classes
    cases = [set(part.case_of.values()) for part in (first, rest)]
    assert not cases[0] & cases[1]
    assert len(cases[0]) == int(share * len(slides_per_case))
    for label in range(n_classes):  # each class has its share of the cases, to the nearest case
        own, other = (
            len({p.case_of[s] for s in p.slide_ids if p.label_of[s] == label}) for p in (first, rest)
        )
        expected = len(cases[0]) * (own + other) / len(slides_per_case)
        assert abs(own - expected) < 1
    again = cohort.set_aside(share, seed)
    assert [part.slide_ids for part in again] == [first.slide_ids, rest.slide_ids]


def test_another_seed_sets_other_slides_aside():
    cohort = cohort_of([2] * 40)
    assert cohort.set_aside(0.3, 0)[0].slide_ids != cohort.set_aside(0.3, 1)[0].slide_ids


def test_a_case_of_two_labels_is_set_aside_whole():
    table = pd.DataFrame(
        [(f"s{i}{part}", f"c{i}", part) for i in range(12) for part in ("normal", "tumor")]
        + [(f"h{i}", f"healthy{i}", "normal") for i in range(12)],
        columns=["slide_id", "case_id", "label"],
    )
    first, rest = Cohort(table, ("normal", "tumor"), Path(".")).set_aside(0.5, 0)
    assert not set(first.case_of.values()) & set(rest.case_of.values())
    assert sum(case.startswith("c") for case in set(first.case_of.values())) == 6


def test_parts_set_aside_are_cross_validated_by_themselves():
    first, rest = cohort_of([1, 2] * 20).set_aside(0.4, 0)
    for part in (first, rest):
        splits = make_splits(part, 3, 0)
        assert {s for split in splits for s in (*split.train, *split.val, *split.test)} == set(part.slide_ids)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2, float("nan")])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match="share is .*, expected a number between 0 and 1"):
        cohort_of([1] * 20).set_aside(share, 0)


@pytest.mark.parametrize(("n_cases", "share"), [(3, 0.5), (20, 0.01), (20, 0.99)])
def test_too_few_cases_for_two_parts_are_refused(n_cases, share):
    with pytest.raises(CohortError, match=f"too few cases to set {share:.0%} aside"):
        cohort_of([1] * n_cases).set_aside(share, 0)


# Splits of one's own


def with_column(parts):
    """A cohort of one slide per case with a column `split`."""
    cohort = cohort_of([1] * len(parts))
    return Cohort(cohort.table.assign(split=parts), cohort.classes, cohort.root)


def test_the_column_split_is_one_fold():
    cohort = with_column(["train", " Test", "VAL", "train", "test"])
    assert column_split(cohort) == Split(("0-0", "3-0"), ("2-0",), ("1-0", "4-0"))
    assert column_split(cohort_of([1] * 5)) is None


def test_a_bad_column_split_is_refused():
    with pytest.raises(CohortError, match="`split` is none of train, val, test for 1-0, 3-0; correct it"):
        column_split(with_column(["train", "dev", "val", None, "test"]))
    with pytest.raises(CohortError, match="no slide has `split` val"):
        column_split(with_column(["train", "test", "test"]))


def test_the_column_split_is_read_from_the_table(tmp_path):
    text = "slide_id,case_id,label,path,split\n" + "".join(
        f"{s},{s},{label},{s}.tif,{part}\n"
        for s, label, part in (("a", "tumor", "train"), ("b", "normal", "val"), ("c", "tumor", "test"))
    )
    cohort = Cohort.from_csv(write_csv(tmp_path, text))
    assert column_split(cohort) == Split(("a",), ("b",), ("c",))
    cohort.to_csv(tmp_path / "again.csv")
    assert column_split(Cohort.from_csv(tmp_path / "again.csv")) == column_split(cohort)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([], "there are no splits"),
        ([Split(("0-0",), (), ("1-0",))], "split 0 has no slides in its part val"),
        ([Split(("0-0",), ("2-0",), ("1-0", "x"))], "split 0: not in the cohort: x"),
        (
            [Split(("0-0",), ("2-0",), ("1-0", "2-1"))],
            r"split 0: patients in several parts: c2 \(val and test\); keep",
        ),
        (
            [Split(("0-0",), ("2-0",), ("1-0",)), Split(("0-0",), ("1-0",), ("0-0",))],
            r"split 1: patients in several parts: c0 \(train and test\)",
        ),
    ],
)
def test_splits_that_do_not_fit_the_cohort_are_refused(splits, message):
    with pytest.raises(CohortError, match=message):
        check_splits(splits, cohort_of([1, 1, 2]))


def test_splits_need_not_use_every_slide():
    check_splits([Split(("0-0",), ("2-0", "2-1"), ("1-0",))], cohort_of([1, 1, 2, 3]))


def test_numbers_of_spreadsheets_are_one_class(tmp_path):
    path = write_csv(tmp_path, "slide_id,case_id,label,path\na,a,1.0,a.tif\nb,b,1,b.tif\nc,c,0.0,c.tif\n")
    assert Cohort.from_csv(path).classes == ("0", "1")


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    text = 'slide_id,case_id,label,path,mpp\na,1,tumor,a.tif,0.5\nb,2,tumor,b.tif,\nc,3,normal,c.tif,"0,5"\n'
    path = write_csv(tmp_path, text)
    with pytest.raises(CohortError, match="mpp is no number of um/px: 0,5; correct it"):
        Cohort.from_csv(path)
    path.write_text(text.replace('"0,5"', "0.25"))
    assert Cohort.from_csv(path).table["mpp"].tolist() == pytest.approx([0.5, np.nan, 0.25], nan_ok=True)


def test_messages_name_the_folder_of_a_table_in_the_working_directory(tmp_path, monkeypatch):
    write_csv(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CohortError, match=f"^{tmp_path}: class 'normal' has 1 case"):
        make_splits(Cohort.from_csv("labels.csv"), 5, 0)


def test_a_patient_whose_number_a_spreadsheet_changed_is_one_patient(tmp_path):
    text = "slide_id,case_id,label,path\na,7,tumor,a.tif\nb,7.0,tumor,b.tif\nc,7.5,normal,c.tif\n"
    cohort = Cohort.from_csv(write_csv(tmp_path, text))
    assert cohort.case_of == {"a": "7", "b": "7", "c": "7.5"}


def test_slide_ids_with_a_suffix_are_explained(tmp_path):
    (tmp_path / "bags").mkdir()
    for name in "abc":
        (tmp_path / "bags" / f"{name}.h5").touch()
    path = write_csv(tmp_path, "slide_id,case_id,label\na.svs,a,x\nb.svs,b,y\nc.svs,c,x\n")
    with pytest.raises(CohortError, match="without the suffix of the file"):
        Cohort.from_csv(path, bags=tmp_path / "bags")


def test_patients_with_a_slide_of_each_class_are_split_whole(tmp_path):
    rows = [f"s{i}{c},p{i},{c},a.tif" for i in range(20) for c in ("normal", "tumor")]
    path = write_csv(tmp_path, "slide_id,case_id,label,path\n" + "\n".join(rows) + "\n")
    cohort = Cohort.from_csv(path)
    for split in make_splits(cohort, 5, seed=0):
        parts = [{s[1:].rstrip("normaltu") for s in part} for part in (split.train, split.val, split.test)]
        assert not parts[0] & parts[1]
        assert not parts[1] & parts[2]
        assert not parts[0] & parts[2]
        assert {cohort.label_of[s] for s in split.test} == {0, 1}


def test_boolean_splits_are_read_as_clam_writes_them(tmp_path):
    split = Split(("a", "007"), ("c",), ("d",))
    names = [*split.train, *split.val, *split.test]
    for number in (0, 1):
        chosen = {part: [name in getattr(split, part) for name in names] for part in ("train", "val", "test")}
        pd.DataFrame(chosen, index=names).to_csv(tmp_path / f"splits_{number}_bool.csv")
        (tmp_path / f"splits_{number}_descriptor.csv").write_text(",train,val,test\nnormal,1,1,1\n")
    assert read_splits(tmp_path) == [split, split]
    write_splits([replace(split, test=("e",))], tmp_path)  # lists of names go first
    assert [s.test for s in read_splits(tmp_path)] == [("e",), ("d",)]
    (tmp_path / "splits_0.csv").write_text(",train,val,test\na,True,True,False\n")
    with pytest.raises(CohortError, match="in two parts: a; leave one True"):
        read_splits(tmp_path)


def test_a_gap_in_the_numbers_of_splits_is_named(tmp_path):
    write_splits([Split(("a",), ("b",), ("c",))] * 3, tmp_path)
    (tmp_path / "splits_1.csv").unlink()
    with pytest.raises(CohortError, match="no splits_1.csv, but splits_2.csv"):
        read_splits(tmp_path)


def test_names_that_are_numbers_survive_the_gaps_of_a_column(tmp_path):
    """Pandas makes numbers of them, and 12.0 of 12 where a column is shorter than the others."""
    columns = {"train": pd.Series([11, 12, 13]), "val": pd.Series([14]), "test": pd.Series([15, 16])}
    pd.DataFrame(columns).to_csv(tmp_path / "splits_0.csv")
    assert "14.0" in (tmp_path / "splits_0.csv").read_text()
    assert read_splits(tmp_path) == [Split(("11", "12", "13"), ("14",), ("15", "16"))]


def test_an_official_test_part_leaves_folds_in_the_rest():
    cohort = cohort_of([2] * 20)
    parts = ["test" if i < 10 else "train" for i in range(40)]
    marked = Cohort(cohort.table.assign(split=parts), cohort.classes, cohort.root)
    splits = official_splits(marked, 5, 0)
    check_splits(splits, marked)
    assert len(splits) == 5
    assert {split.test for split in splits} == {tuple(cohort.slide_ids[:10])}
    assert sorted(s for split in splits for s in split.val) == sorted(cohort.slide_ids[10:])
    assert splits != official_splits(marked, 5, 1)
    assert official_splits(cohort, 5, 0) is None
    with pytest.raises(CohortError, match="two or more"):
        official_splits(marked, 1, 0)
    with pytest.raises(CohortError, match="fewer than the 9 folds"):
        official_splits(marked, 9, 0)


def test_small_and_unequal_classes_are_said():
    rows = [(f"s{i}", f"c{i}", "tumor" if i < 25 else "normal") for i in range(125)]
    table = pd.DataFrame(rows, columns=["slide_id", "case_id", "label"])
    (note,) = Cohort(table, ("normal", "tumor"), Path(".")).class_notes()
    assert "normal has 4 times as many slides as tumor" in note
    few = Cohort(table[10:], ("normal", "tumor"), Path(".")).class_notes()
    assert few[0].startswith("class tumor (15) has fewer than 20 patients")
    assert Cohort(table[:50], ("normal", "tumor"), Path(".")).class_notes() == []


def test_labels_that_differ_only_in_case_are_refused(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("slide_id,case_id,label\n" + "".join(f"s{i},c{i},{x}\n" for i, x in enumerate(SPELLED)))
    with pytest.raises(
        CohortError, match="labels differ only in upper and lower case: Tumor and tumor; write"
    ):
        Cohort.from_csv(table, bags=tmp_path)


SPELLED = ("Tumor", "normal", "tumor", "normal")


@pytest.mark.parametrize(
    ("cases", "said"),
    [
        (["P1", "p1", "P2"], "P1 and p1"),
        (["TCGA-AA-1234-01Z-00-DX1", "TCGA-AA-1234-11A", "TCGA-AA-1235"], "TCGA-AA-1234-01Z-00-DX1 and TCGA"),
        (["TCGA-AA-1234", "TCGA-AA-12345", "P1-01", "P1-02"], None),
    ],
)
def test_cases_that_may_be_one_patient_are_said(cases, said):
    rows = [(f"s{i}", case, "ab"[i % 2]) for i, case in enumerate(cases)]
    table = pd.DataFrame(rows, columns=["slide_id", "case_id", "label"])
    notes = Cohort(table, ("a", "b"), Path(".")).patient_notes()
    assert len(notes) == (said is not None)
    assert said is None or f"one patient: {said}" in notes[0]


def test_a_slide_of_two_cases_is_refused_before_training(tmp_path):
    bags, labels = make_bags(12)
    bags["s12"], labels["s12"] = replace(bags["s03"], slide_id="s12"), 1
    cohort = make_cohort(tmp_path, bags, labels)
    with pytest.raises(CohortError, match="slides s03 and s12 have the same features but the cases case-s03"):
        check_repeated_slides(cohort.load_bags(), cohort)
    table = cohort.table.replace("case-s12", "case-s03")
    check_repeated_slides(bags, Cohort(table, cohort.classes, cohort.root, cohort.bag_dir))


@pytest.mark.parametrize("ends", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("first", ["", "sep=;", "sep=;;"])
def test_tables_of_spreadsheets_are_read_whatever_ends_their_lines(tmp_path, ends, first):
    lines = [first] * bool(first) + ["slide_id;case_id;label", "a;b;c", "d;e;f"]
    (tmp_path / "t.csv").write_bytes(ends.join(lines).encode())
    assert read_table(tmp_path / "t.csv").to_numpy().tolist() == [["a", "b", "c"], ["d", "e", "f"]]


def test_accents_that_are_stored_otherwise_are_explained(tmp_path):
    (tmp_path / "Mu\u0308ller.h5").touch()
    (tmp_path / "b.h5").touch()
    (tmp_path / "t.csv").write_text("slide_id,case_id,label\nM\xfcller,1,x\nb,2,y\n", "utf-8")
    with pytest.raises(CohortError, match="look alike, but their accents are stored otherwise"):
        Cohort.from_csv(tmp_path / "t.csv", bags=tmp_path)
