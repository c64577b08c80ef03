"""The paper's experiment on its own cohorts: slides, features, all systems, Tables 1 to 3; resumable."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hdmil_lib.errors import CohortError, HDMILError, nearest
from hdmil_lib.methods import METHODS, check_methods
from hdmil_lib.public.fetching import ALL_SLIDES, LABELS, SOURCE
from hdmil_lib.storage import read_json, read_table, write_table, write_whole

if TYPE_CHECKING:
    import pandas as pd

    from hdmil_lib.cohort import Cohort
    from hdmil_lib.splits import Split
    from hdmil_lib.training.trained import CrossValidation

Stage = Literal["fetch", "extract", "train", "time", "tables"]
STAGES: tuple[Stage, ...] = ("fetch", "extract", "train", "time", "tables")

PAPER_NAMES = {"camelyon16": "Camelyon16", "nsclc": "NSCLC", "brca": "BRCA"}
"""Cohorts of the paper, by the names of `hdmil fetch`, and what the paper's tables call them."""

PAPER_ENCODER = "resnet50"
"""The paper's encoder: a ResNet-50 of ImageNet up to its third stage (section 4.1)."""

PAPER_FOLDS = 10


def paper_methods(name: str) -> tuple[str, ...]:
    """The systems of the paper's Tables 1 and 3 for a cohort, in the order of `METHODS`."""
    from hdmil_lib.reproduce.paper import PAPER_TABLE1
    from hdmil_lib.reproduce.tables import TABLE3_METHODS

    titles = set(PAPER_TABLE1.loc[PAPER_NAMES[name]].index)
    return tuple(m for m in METHODS if METHODS[m].title in titles or m in TABLE3_METHODS)


@dataclass(frozen=True)
class Experiment:
    """What is run, and where.

    Attributes:
        name: The cohort, a name in `PAPER_NAMES`.
        folder: Folder of everything: slides, bags, runs and tables.
        encoder: Name in `ENCODERS`.
        methods: Names in `METHODS`; those that they need are trained too.
        n_folds: Number of folds. On Camelyon16 these divide the official training part, and each is tested on
            the official test part.
        epochs: Largest number of epochs; by default the paper's.
        n_timed: Number of slides for Table 2.
        seed: Seed of folds, initial weights and training.
        device: Device or devices, as the commands take them.
        workers: Number of processes that train.
    """

    name: str
    folder: Path
    encoder: str = PAPER_ENCODER
    methods: tuple[str, ...] = field(default=())
    n_folds: int = PAPER_FOLDS
    epochs: int | None = None
    n_timed: int = 3
    seed: int = 0
    device: str = "auto"
    workers: int = 2

    @property
    def labels(self) -> Path:
        """Label table that `hdmil fetch` wrote."""
        return self.folder / LABELS

    @property
    def bags(self) -> Path:
        """Folder of the bags of this encoder."""
        return self.folder / "bags" / self.encoder

    @property
    def runs(self) -> Path:
        """Folder of the trainings on the slides that have bags."""
        return self.folder / "runs" / f"{self.encoder}-{len(self.slides_with_bags())}-slides"

    @property
    def timings(self) -> Path:
        """Table of seconds per slide."""
        return self.runs / "timings.csv"

    @property
    def tables(self) -> Path:
        """Folder of the results."""
        return self.folder / "tables" / self.encoder

    def slides_with_bags(self) -> list[str]:
        """Slides of the label table that have a bag of this encoder."""
        if not self.labels.is_file():
            return []
        there = {bag.stem for bag in self.bags.glob("*.h5")}
        return [slide_id for slide_id in read_table(self.labels)["slide_id"] if slide_id in there]


def check_experiment(experiment: Experiment) -> None:
    """Check the names of an experiment before anything is done.

    Raises:
        HDMILError: The cohort, the encoder or a method is unknown, or there are too few folds.
    """
    from hdmil_lib.encoders.registry import ENCODERS

    for kind, name, known in (
        ("cohort of the paper", experiment.name, PAPER_NAMES),
        ("encoder", experiment.encoder, ENCODERS),
    ):
        if name not in known:
            raise HDMILError(
                f"there is no {kind} {name!r}{nearest(name, known)}; choose from {', '.join(known)}"
            )
    check_methods(experiment.methods)
    if experiment.n_folds < 3:
        raise HDMILError(f"{experiment.n_folds} folds are too few; ask for three or more")


def remaining(experiment: Experiment, n_slides: int) -> dict[Stage, str]:
    """What the stages after the download will take, in a line each.

    Args:
        experiment: The experiment.
        n_slides: Number of slides when all have been fetched.
    """
    from hdmil_lib.encoders.registry import ENCODERS
    from hdmil_lib.reproduce.paper import PAPER_TABLE2
    from hdmil_lib.training.crossval import waves_of

    n_bags = len(experiment.slides_with_bags())
    seconds = PAPER_TABLE2.loc[(PAPER_NAMES[experiment.name], "HDMIL†"), "total"]
    megabytes = (2 * ENCODERS[experiment.encoder].dim + 768) * 10_000 / 1e6
    todo = max(n_slides - n_bags, 0)
    names = [name for wave in waves_of(experiment.methods) for name in wave]
    done = len(list(experiment.runs.glob("*/fold*/predictions.csv"))) if n_bags else 0
    timed = "are there" if experiment.timings.is_file() else f"of {experiment.n_timed} slides, three times"
    encoder = f"{experiment.encoder}, {_of_the_paper(experiment.encoder)}"
    return {
        "extract": f"{todo} of {n_slides} slides by {encoder}; the paper took {seconds:.0f} s per slide on "
        f"its GPU, {_hours(todo * seconds)} for these; a bag of 10,000 tiles has {megabytes:.0f} MB",
        "train": f"{len(names)} systems on {experiment.n_folds} folds, "
        f"{len(names) * experiment.n_folds} trainings, of which {done} are there",
        "time": f"seconds per slide {timed}",
        "tables": f"Tables 1 to 3 in {experiment.tables}",
    }


def extract_bags(experiment: Experiment) -> dict[str, str]:
    """Turn the slides of the label table into bags; those that are there are skipped.

    Returns:
        Reasons by slide_id of slides that failed, which are left out of all that follows.

    Raises:
        CohortError: There is no label table.
        HDMILError: The encoder cannot be loaded.
    """
    from hdmil_lib.devices import resolve_all
    from hdmil_lib.encoders.extraction import extract
    from hdmil_lib.encoders.loading import load_encoder

    table = labels_of(experiment)
    if len(experiment.slides_with_bags()) == len(table):
        return {}
    gpus = resolve_all(experiment.device)
    encoder = load_encoder(experiment.encoder, device=gpus[0])
    report = extract(experiment.labels, [encoder, *map(encoder.to, gpus[1:])], experiment.bags)
    failed = report[report["status"] == "failed"]
    return dict(zip(failed["slide_id"], failed["error"], strict=True))


def train_systems(experiment: Experiment) -> "CrossValidation":
    """Cross-validate all systems by the paper's recipe; finished trainings are not repeated.

    Raises:
        CohortError: There are too few slides with bags for the folds.
        CheckpointError: The folder holds trainings with other settings.
    """
    from hdmil_lib.reproduce.recipes import RECIPES
    from hdmil_lib.training.crossval import cross_validate

    cohort, recipe = _cohort(experiment), RECIPES[experiment.name]
    return cross_validate(
        cohort,
        experiment.methods,
        splits=_splits(experiment, cohort),
        recipe=recipe if experiment.epochs is None else recipe.shorter(experiment.epochs),
        seed=experiment.seed,
        out=experiment.runs,
        workers=experiment.workers,
        device=experiment.device,
    )


def time_systems(experiment: Experiment) -> "pd.DataFrame | None":
    """Time HDMIL with and without pre-screening on the first test slides, or read what was measured.

    Returns:
        The table of `time_slides`; None if HDMIL is not trained, or its slides are not here.

    Raises:
        CheckpointError: A training is not finished.
    """
    import pandas as pd

    from hdmil_lib.reproduce.timing import time_slides
    from hdmil_lib.training.trained import CrossValidation

    if experiment.timings.is_file():
        return pd.read_csv(experiment.timings, dtype={"slide_id": str})
    if "hdmil" not in experiment.methods:
        return None
    cv = CrossValidation(experiment.runs, ["hdmil"])
    fold = cv.best_fold("hdmil")
    cohort = _cohort(experiment)
    paths = [cohort.slide_path(slide_id) for slide_id in cv.splits[fold].test]
    paths = [path for path in paths if path.is_file()][: experiment.n_timed]
    if not paths:
        return None
    model = cv.hdmil(fold)
    model.to(str(_first_device(experiment)))
    timings = time_slides(model, paths, progress=True)
    write_table(experiment.timings, timings)
    return timings


def write_tables(experiment: Experiment, failed: dict[str, str]) -> str:
    """Write Tables 1 to 3 beside the paper's figures, and a report that says how they came about.

    Args:
        experiment: The experiment.
        failed: Reasons by slide_id of slides without bags.

    Returns:
        The report, as Markdown.

    Raises:
        CheckpointError: A training is not finished.
        CohortError: A class is missing among the test slides of a fold.
    """
    import pandas as pd

    from hdmil_lib.reproduce.tables import TABLE3_METHODS, save_table, table1, table2, table3, to_markdown
    from hdmil_lib.training.trained import CrossValidation

    cv, paper = CrossValidation(experiment.runs, experiment.methods), PAPER_NAMES[experiment.name]
    timings = pd.read_csv(experiment.timings) if experiment.timings.is_file() else None
    predictions = cv.predictions
    tables = {"table1": table1(_of_table1(predictions), timings, cohort=paper)}
    if timings is not None:
        both = table2(timings)
        tables["table2"] = both[both.index.get_level_values("cohort").isin(("here", paper))]
    if predictions["method"].isin(TABLE3_METHODS).any():
        tables["table3"] = table3(predictions, cohort=paper)
    parts = [_heading(experiment, cv, failed)]
    for name, table in tables.items():
        filled = table.dropna(axis=1, how="all")
        save_table(filled, experiment.tables / name)
        parts.append(f"## Table {name[-1]}\n\n{to_markdown(filled)}")
    report = "\n".join(parts)
    write_whole(experiment.tables / "report.md", lambda path: path.write_text(report, encoding="utf-8"))
    return report


def _of_table1(predictions: "pd.DataFrame") -> "pd.DataFrame":
    """Predictions of the systems of Table 1; those of Table 3 alone are left out."""
    from hdmil_lib.reproduce.tables import TABLE1_METHODS

    return predictions[predictions["method"].isin(TABLE1_METHODS)]


def _heading(experiment: Experiment, cv: "CrossValidation", failed: dict[str, str]) -> str:
    """What the results are of, and what differs from the paper."""
    table = labels_of(experiment)
    n_slides = len(experiment.slides_with_bags())
    counts = ", ".join(f"{n} {label}" for label, n in table["label"].value_counts().sort_index().items())
    source = experiment.folder / SOURCE
    whole = f" The whole cohort has {read_json(source)[ALL_SLIDES]}." if source.is_file() else ""
    official = "split" in table
    lines = [
        f"# {PAPER_NAMES[experiment.name]}",
        "",
        f"- {n_slides} slides with features of {len(table)} fetched ones ({counts}).{whole}",
        f"- Encoder {experiment.encoder}, {_of_the_paper(experiment.encoder)}.",
        f"- {cv.n_folds} folds"
        + (" of the official training part, each tested on the official test part." if official else "."),
        f"- Epochs: {'those of the paper' if experiment.epochs is None else f'at most {experiment.epochs}'}.",
        "- AUC and ACC are percent, mean (sd) over folds, of test slides; the paper's Table 3 is of "
        "validation slides.",
        *(f"- Without features: {slide_id} ({reason})." for slide_id, reason in failed.items()),
        "",
    ]
    return "\n".join(lines)


def labels_of(experiment: Experiment) -> "pd.DataFrame":
    """The label table.

    Raises:
        CohortError: There is none.
    """
    if not experiment.labels.is_file():
        raise CohortError(f"{experiment.labels}: there is none; do not skip the stage fetch")
    return read_table(experiment.labels)


def _cohort(experiment: Experiment) -> "Cohort":
    """The slides that have bags.

    Raises:
        CohortError: There are none.
    """
    from hdmil_lib.cohort import Cohort
    from hdmil_lib.public.catalog import cohort_named

    slides = experiment.slides_with_bags()
    if not slides:
        raise CohortError(f"{experiment.bags}: holds no bag of the cohort; do not skip the stage extract")
    table = labels_of(experiment)
    used = experiment.folder / f"cohort-{experiment.encoder}.csv"
    write_table(used, table[table["slide_id"].isin(slides)])
    return Cohort.from_csv(used, cohort_named(experiment.name).classes, bags=experiment.bags)


def _splits(experiment: Experiment, cohort: "Cohort") -> "Sequence[Split]":
    from hdmil_lib.cohort import make_splits, official_splits

    folds = experiment.n_folds, experiment.seed
    return official_splits(cohort, *folds) or make_splits(cohort, *folds)


def _first_device(experiment: Experiment) -> Any:
    from hdmil_lib.devices import resolve_all

    return resolve_all(experiment.device)[0]


def _of_the_paper(encoder: str) -> str:
    return "the paper's encoder" if encoder == PAPER_ENCODER else f"not the paper's, which is {PAPER_ENCODER}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
