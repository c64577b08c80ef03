"""Cohorts: tables of slides with labels, and their splits by case."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from hdmil_lib.bags import Bag, check_same_features, read_bag
from hdmil_lib.errors import BagError, CohortError
from hdmil_lib.splits import PARTS, Split, refuse, whole_number
from hdmil_lib.storage import read_table, write_table

FEW_PATIENTS = 20
"""Number of patients of a class below which its scores are said to be uncertain."""
_TCGA = re.compile(r"TCGA-\w\w-\w{4}(?=-|$)", re.IGNORECASE)
IMBALANCE = 4
"""Ratio of the sizes of two classes from which it is said."""


@dataclass(frozen=True)
class Cohort:
    """A table of slides in CLAM's format, with the locations of their files.

    Attributes:
        table: One row per slide: `slide_id`, `case_id`, `label` (one of `classes`), `path` (relative to
            `root`; missing if there is only a bag), and optionally `mpp` and `split`.
        classes: Class names in the order of the class indices.
        root: Folder to which paths are relative.
        bag_dir: Folder with one `<slide_id>.h5` per slide, or None before extraction.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]
    root: Path
    bag_dir: Path | None = None

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        classes: Sequence[str] | None = None,
        *,
        bags: str | Path | None = None,
    ) -> "Cohort":
        """Read and check a label file.

        Whole numbers that a spreadsheet wrote as "1.0" are read as "1" in `case_id` and `label`.

        Args:
            path: CSV with `slide_id`, `case_id`, `label` and `path`; labels are class names, or indices into
                `classes`.
            classes: Class names in the order of the class indices; by default the labels found, sorted.
            bags: Folder of extracted bags. If given, every slide needs a bag and the column `path` may be
                absent; otherwise every slide file must exist. Bags without a row are ignored.

        Raises:
            CohortError: A column, a label or a file is missing, a slide is listed twice, a label is unknown,
                or there is only one class.
        """
        path = Path(path)
        table = read_table(path)
        if "mpp" in table:
            given = table["mpp"]
            table["mpp"] = pd.to_numeric(given, errors="coerce")
            wrong = given[given.notna() & table["mpp"].isna()]
            refuse(wrong.tolist(), f"{path}: mpp is no number of um/px:", "correct it, or leave it empty")
        table, classes = _check_table(table, classes, source=path, needs_path=bags is None)
        cohort = cls(table, classes, path.resolve().parent, Path(bags) if bags is not None else None)
        cohort._check_files(path)
        return cohort

    def __len__(self) -> int:
        return len(self.table)

    @property
    def slide_ids(self) -> list[str]:
        """Names of the slides, in the order of the table."""
        return self.table["slide_id"].tolist()

    @property
    def labels(self) -> np.ndarray:
        """Class indices in the order of the table, int64 (n_slides,)."""
        return self.table["label"].map(self.classes.index).to_numpy(np.int64)

    @property
    def label_of(self) -> dict[str, int]:
        """Class index by slide_id."""
        return dict(zip(self.slide_ids, self.labels.tolist(), strict=True))

    @property
    def case_of(self) -> dict[str, str]:
        """Case by slide_id."""
        return dict(zip(self.slide_ids, self.table["case_id"], strict=True))

    def slide_path(self, slide_id: str) -> Path:
        """File of a slide.

        Raises:
            CohortError: The table has no path for the slide.
        """
        value = self.table.loc[self.table["slide_id"] == slide_id, "path"].item()
        if pd.isna(value):
            raise CohortError(
                f"slide '{slide_id}' of {self.root} has no file, only a bag; prepare the full cohort"
            )
        return self.root / value

    def bag_path(self, slide_id: str) -> Path:
        """Bag of a slide.

        Raises:
            CohortError: The cohort has no bags.
        """
        if self.bag_dir is None:
            raise CohortError(f"the cohort in {self.root} has no bags; extract features first")
        return self.bag_dir / f"{slide_id}.h5"

    def select(self, slide_ids: Sequence[str]) -> "Cohort":
        """The cohort with only these slides, in this order."""
        table = self.table.set_index("slide_id", drop=False).loc[list(slide_ids)].reset_index(drop=True)
        return Cohort(table, self.classes, self.root, self.bag_dir)

    def class_notes(self) -> list[str]:
        """What is to be kept in mind about the sizes of the classes, in whole sentences; often nothing."""
        patients = self.table.groupby("label")["case_id"].nunique()
        slides = self.table["label"].value_counts()
        few = [f"{name} ({patients[name]})" for name in self.classes if patients[name] < FEW_PATIENTS]
        notes = []
        if few:
            notes.append(
                f"class {', '.join(few)} has fewer than {FEW_PATIENTS} patients: each of them moves the "
                "scores by much, look at the intervals"
            )
        if slides.max() >= IMBALANCE * slides.min():
            notes.append(
                f"{slides.idxmax()} has {slides.max() / slides.min():.0f} times as many slides as "
                f"{slides.idxmin()}: training makes up for it (see --balance), but accuracy hides the "
                "smaller class, so look at the AUC"
            )
        return notes

    def patient_notes(self) -> list[str]:
        """Which values of `case_id` may be one patient, whose slides would be in several parts of a split.

        These are names that differ only in upper and lower case, and barcodes of TCGA that go on after the
        patient, such as TCGA-AA-1234-01Z.

        Returns:
            A whole sentence, or nothing.
        """
        found = pd.Series(self.table["case_id"].unique())
        shared = found.groupby(found.map(_patient)).agg(list)
        pairs = [f"{names[0]} and {names[1]}" for names in shared if len(names) > 1]
        if not pairs:
            return []
        more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
        return [
            f"case_id may have several names for one patient: {', '.join(pairs[:3])}{more}; give each "
            "patient one, or the scores are too good"
        ]

    def load_bags(self, progress: bool = False) -> dict[str, Bag]:
        """Read all bags into memory, by slide_id.

        Raises:
            BagError: A bag is missing, damaged or of another slide, or differs from the others in encoder,
                weights or width.
            CohortError: The cohort has no bags.
        """
        ids = tqdm(self.slide_ids, desc="bags", unit="bag", disable=not progress)
        bags = {slide_id: read_bag(self.bag_path(slide_id)) for slide_id in ids}
        check_same_features(bags.values())
        for slide_id, bag in bags.items():
            if bag.slide_id != slide_id:
                raise BagError(
                    f"{self.bag_path(slide_id)}: says that it is the bag of slide {bag.slide_id!r}; was it "
                    "renamed? Extract the slide again"
                )
        return bags

    def set_aside(self, share: float, seed: int) -> tuple["Cohort", "Cohort"]:
        """Divide the cohort by case, stratified by class, into a part for choosing settings and the rest.

        The validation slides of all folds of a cross-validation are also its test slides, so settings must
        not be chosen on them. Choose settings by a cross-validation of the first part, and report the scores
        of the second.

        Args:
            share: Share of the cases in the first part, between 0 and 1.
            seed: Seed of the random draw.

        Returns:
            The part for choosing settings, and the rest; no case is in both.

        Raises:
            ValueError: The share is out of range.
            CohortError: A class has too few cases for both parts.
        """
        from sklearn.model_selection import train_test_split

        if not 0 < share < 1:
            raise ValueError(f"share is {share}, expected a number between 0 and 1")
        cases = _case_classes(self)
        names = cases.index.to_numpy()  # scikit-learn cannot index the strings of pandas
        try:
            first, _ = train_test_split(names, train_size=share, random_state=seed, stratify=cases)
        except ValueError as error:
            raise CohortError(f"{self.root}: too few cases to set {share:.0%} aside ({error})") from error
        chosen = self.table["case_id"].isin(first)
        ids = self.table["slide_id"]
        return self.select(ids[chosen].tolist()), self.select(ids[~chosen].tolist())

    def permuted(self, seed: int) -> "Cohort":
        """The cohort with its labels permuted among the cases, as a negative control.

        The class of a case is the highest class among its slides; all its slides get its new label.
        """
        cases = _case_classes(self)
        permuted = pd.Series(np.random.default_rng(seed).permutation(cases.to_numpy()), index=cases.index)
        labels = self.table["case_id"].map(permuted).map(dict(enumerate(self.classes)))
        return Cohort(self.table.assign(label=labels), self.classes, self.root, self.bag_dir)

    def to_csv(self, path: str | Path) -> None:
        """Write a label file that `from_csv` reads."""
        write_table(Path(path), self.table)

    def _check_files(self, source: Path) -> None:
        if self.bag_dir is None:
            absent = [s for s in self.slide_ids if not self.slide_path(s).is_file()]
            refuse(
                absent, f"{source}: no slide file for", "correct `path` (relative to the CSV), or drop them"
            )
            return
        bags = {bag.stem for bag in self.bag_dir.glob("[!.]*.h5")}
        absent = [s for s in self.slide_ids if s not in bags]
        if absent and Path(absent[0]).stem in bags:
            raise CohortError(
                f"{source}: there is no bag of {absent[0]!r} but one of {Path(absent[0]).stem!r}; write "
                "slide_ids without the suffix of the file"
            )
        composed = {unicodedata.normalize("NFC", name) for name in bags}
        if absent and unicodedata.normalize("NFC", absent[0]) in composed:
            raise CohortError(
                f"{source}: {absent[0]!r} and the name of its bag look alike, but their accents are stored "
                "otherwise, as macOS does; copy the slide_id from the name of the bag"
            )
        refuse(absent, f"{source}: no bag in {self.bag_dir} for", "extract their features, or drop the rows")


def _patient(case_id: str) -> str:
    """The patient that a case_id seems to name."""
    barcode = _TCGA.match(case_id)
    return (barcode[0] if barcode else case_id).casefold()


def check_repeated_slides(bags: Mapping[str, Bag], cohort: Cohort) -> None:
    """Check that no slide stands under two names in two cases: it would be trained on and tested.

    Slides are the same if their bags have the same number of tiles and, in 16 of them, the same features.

    Raises:
        CohortError: A slide does.
    """
    first: dict[tuple[int, bytes], str] = {}
    case_of = cohort.case_of
    for slide_id, case in case_of.items():
        features = bags[slide_id].features
        some = features[:: max(1, len(features) // 16)]
        other = first.setdefault((len(features), np.ascontiguousarray(some).tobytes()), slide_id)
        if case_of[other] != case:
            raise CohortError(
                f"{cohort.root}: slides {other} and {slide_id} have the same features but the cases "
                f"{case_of[other]} and {case}: one slide under two names; drop a row, or give both "
                "one case_id"
            )


def _case_classes(cohort: Cohort) -> pd.Series:
    """Class index of each case, the highest among its slides."""
    return pd.Series(cohort.labels, index=cohort.table["case_id"]).groupby(level=0).max()


def _check_table(
    table: pd.DataFrame, classes: Sequence[str] | None, *, source: Path, needs_path: bool
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Check the rows and map labels to class names."""
    required = ["slide_id", "case_id", "label"] + ["path"] * needs_path
    missing = [column for column in required if column not in table]
    if missing:
        raise CohortError(
            f"{source}: no column {', '.join(missing)} among {', '.join(table.columns)}; add or rename it"
        )
    table = table.assign(path=table.get("path", pd.Series(pd.NA, index=table.index)))
    for column in required:
        empty = table.loc[table[column].isna(), "slide_id"].fillna("(no slide_id)").tolist()
        refuse(empty, f"{source}: no {column} for slide(s)", f"fill in `{column}`, or drop the rows")
    repeated = table.loc[table["slide_id"].duplicated(), "slide_id"].unique()
    refuse(repeated, f"{source}: slide(s) listed more than once:", "keep one row per slide")

    for column in ("case_id", "label"):
        table[column] = table[column].map(whole_number)
    found = sorted(table["label"].unique(), key=lambda v: (0, int(v), v) if v.isdecimal() else (1, 0, v))
    names = tuple(map(str, classes)) if classes is not None else tuple(found)
    spelled = {name.casefold(): name for name in names}
    alike = [f"{name} and {spelled[name.casefold()]}" for name in names if spelled[name.casefold()] != name]
    refuse(alike, f"{source}: labels differ only in upper and lower case:", "write each class in one way")
    by_index = {str(i): name for i, name in enumerate(names)} if classes is not None else {}
    to_name = by_index | {name: name for name in names}
    unknown = table.loc[~table["label"].isin(to_name), "slide_id"].tolist()
    refuse(unknown, f"{source}: labels other than {', '.join(names)} for", "correct them, or pass `classes`")
    table = table.assign(label=table["label"].map(to_name))
    if table["label"].nunique() < 2:
        raise CohortError(
            f"{source}: every slide is '{table['label'].iloc[0]}'; a classifier needs two classes or more"
            if len(table)
            else f"{source}: no slides; add rows"
        )
    return table, names


def make_splits(cohort: Cohort, n_folds: int, seed: int) -> list[Split]:
    """Split for cross-validation by case, stratified by class: no case is in two parts of a fold.

    The cases are divided into `n_folds` groups. In fold k, group k is the test part, group k + 1 the
    validation part, and the others the training part. The class of a case is the highest class among its
    slides, or where that class is too rare all of them. For choosing settings see `Cohort.set_aside`.

    Raises:
        CohortError: Fewer than three folds, or a class is in fewer cases than there are folds.
    """
    if n_folds < 3:
        raise CohortError(f"{n_folds} folds cannot hold train, validation and test; ask for three or more")
    groups, slides = _divided(cohort, n_folds, seed), cohort.table["slide_id"].to_numpy()
    splits = []
    for fold in range(n_folds):
        test, val = groups == fold, groups == (fold + 1) % n_folds
        splits.append(Split(*(tuple(slides[part].tolist()) for part in (~test & ~val, val, test))))
    return splits


def _divided(cohort: Cohort, n_folds: int, seed: int) -> np.ndarray:
    """Divide a cohort by case, stratified by class: the group of each slide, 0 to n_folds - 1.

    Raises:
        CohortError: A class is in fewer cases than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold  # takes a second to import

    cases = _strata(cohort, n_folds)
    divider = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    divided = [cases.index[members] for _, members in divider.split(cases.index, cases)]
    group_of = pd.concat([pd.Series(group, index=members) for group, members in enumerate(divided)])
    return cohort.table["case_id"].map(group_of).to_numpy()


def _strata(cohort: Cohort, n_folds: int) -> pd.Series:
    """What the cases are stratified by: their highest class, or where that is too rare all their classes.

    Where every patient has a normal and a tumor slide, the highest class of all of them is tumor.

    Raises:
        CohortError: A class is in fewer cases than there are folds.
    """
    highest = _case_classes(cohort)
    counts = highest.value_counts()
    if all(counts.get(index, 0) >= n_folds for index in range(len(cohort.classes))):
        return highest
    classes = pd.Series(cohort.labels, index=cohort.table["case_id"]).groupby(level=0).agg(lambda c: {*c})
    for index, name in enumerate(cohort.classes):
        count = sum(index in found for found in classes)
        if count < n_folds:
            raise CohortError(
                f"{cohort.root}: class '{name}' has {count} case(s), fewer than the {n_folds} folds; "
                "ask for fewer folds, or add cases"
            )
    return classes.map(lambda found: "+".join(map(str, sorted(found))))


def official_splits(cohort: Cohort, n_folds: int, seed: int) -> list[Split] | None:
    """Splits by the column `split` of the table, or None without that column.

    With the values "train", "val" and "test" there is one split. Without "val" the test part is the same in
    all folds, and the rest is divided into `n_folds` groups by case, stratified by class: in fold k group k
    is the validation part (paper: protocol on Camelyon16).

    Args:
        cohort: The cohort.
        n_folds: Number of folds within the rest, two or more.
        seed: Seed of the division.

    Raises:
        CohortError: A slide has another value, there are no training or no test slides, or too few cases.
    """
    parts = _split_column(cohort)
    if parts is None:
        return None
    if parts.val:
        return [parts]
    if n_folds < 2:
        raise CohortError(f"{n_folds} fold cannot hold train and validation; ask for two or more")
    rest = cohort.select(parts.train)
    groups, slides = _divided(rest, n_folds, seed), np.array(parts.train, dtype=object)
    return [
        Split(tuple(slides[groups != fold]), tuple(slides[groups == fold]), parts.test)
        for fold in range(n_folds)
    ]


def column_split(cohort: Cohort) -> Split | None:
    """The official split in the column `split` ("train", "val" or "test"), or None without that column.

    Raises:
        CohortError: A slide has another value, or a part is empty.
    """
    split = _split_column(cohort)
    if split is not None and not split.val:
        raise CohortError(f"{cohort.root}: no slide has `split` val; add some, or drop the column")
    return split


def _split_column(cohort: Cohort) -> Split | None:
    """The parts in the column `split`, of which val may be empty."""
    if "split" not in cohort.table:
        return None
    parts = cohort.table["split"].astype(str).str.strip().str.lower()
    wrong = cohort.table.loc[~parts.isin(PARTS), "slide_id"].tolist()
    what = f"{cohort.root}: `split` is none of {', '.join(PARTS)} for"
    refuse(wrong, what, "correct it, or drop the column")
    ids = cohort.table["slide_id"]
    split = Split(*(tuple(ids[parts == name].tolist()) for name in PARTS))
    empty = [name for name in ("train", "test") if not getattr(split, name)]
    if empty:
        raise CohortError(f"{cohort.root}: no slide has `split` {empty[0]}; add some, or drop the column")
    return split


def check_splits(splits: Sequence[Split], cohort: Cohort) -> None:
    """Check that splits fit a cohort.

    Raises:
        CohortError: There is no split, a part is empty, a slide is not in the cohort, or a patient (case) is
            in several parts of a split.
    """
    known = cohort.case_of
    if not splits:
        raise CohortError(f"{cohort.root}: there are no splits")
    for fold, split in enumerate(splits):
        parts_of: dict[str, list[str]] = {}
        for part in PARTS:
            slides = getattr(split, part)
            if not slides:
                raise CohortError(f"split {fold} has no slides in its part {part}; add some")
            unknown = [slide_id for slide_id in slides if slide_id not in known]
            refuse(unknown, f"split {fold}: not in the cohort:", "correct the split, or add rows")
            for case in dict.fromkeys(known[slide_id] for slide_id in slides):
                parts_of.setdefault(case, []).append(part)
        leaks = [f"{case} ({' and '.join(parts)})" for case, parts in parts_of.items() if len(parts) > 1]
        refuse(leaks, f"split {fold}: patients in several parts:", "keep each case_id in one part")


def check_classes(splits: Sequence[Split], cohort: Cohort) -> None:
    """Check that every class can be learned and scored in every split.

    Raises:
        CohortError: A class has no slide in the training or in the test part of a split.
    """
    label_of = cohort.label_of
    for fold, split in enumerate(splits):
        for part, why in (("train", "it cannot be learned"), ("test", "there is no AUC")):
            found = {label_of[slide_id] for slide_id in getattr(split, part)}
            if absent := [name for index, name in enumerate(cohort.classes) if index not in found]:
                raise CohortError(
                    f"split {fold}: no slide of its part {part} has class {', '.join(absent)}, so that "
                    f"{why}; use fewer folds or more slides"
                )
