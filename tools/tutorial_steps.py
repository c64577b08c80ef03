"""The steps of the main job: cohort, cross-validation, seconds per slide, tables and figures, notebooks."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import psutil

import notebooks
from hdmil_lib.cohort import Cohort
from hdmil_lib.config import Config
from hdmil_lib.errors import HDMILError
from hdmil_lib.evaluation.metrics import fold_scores
from hdmil_lib.methods import title
from hdmil_lib.models import HDMIL
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.reproduce.tables import (
    TABLE1_METHODS,
    TABLE3_METHODS,
    add_mask_scores,
    save_table,
    table1,
    table2,
    table3,
    to_markdown,
)
from hdmil_lib.reproduce.timing import STAGES, stage_medians, time_slides
from hdmil_lib.synthetic.cohorts import large_slides, prepare_cohort
from hdmil_lib.synthetic.truth import truth_path, tumor_share
from hdmil_lib.training.crossval import cross_validate
from hdmil_lib.viz import plots

COHORT = "camelyon-mini"


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        methods: Systems that are trained, all to their end.
        n_drawn: Number of slides to draw where the cohort itself is shipped as bags.
        n_slides: Number of large slides for the comparison of seconds.
        side: Width and height of the large slides in pixels.
        repeats: Number of turns of each timing.
    """

    methods: tuple[str, ...]
    n_drawn: int
    n_slides: int
    side: int
    repeats: int


N_FOLDS = 5
FULL = Size(
    methods=tuple(dict.fromkeys(TABLE1_METHODS + TABLE3_METHODS)),
    n_drawn=0,
    n_slides=3,
    side=16_384,
    repeats=3,
)
FAST = Size(
    methods=("mean", "abmil", "clam_mb", "hdmil_dagger", "hdmil", "hdmil_evidence", "random"),
    n_drawn=4,
    n_slides=1,
    side=6_144,
    repeats=1,
)
FULL_RUN = Path(__file__).resolve().parent.parent / "docs" / "results" / "table1.csv"


class Steps:
    """Announces steps and records seconds and peak memory, of this process and all it started.

    The memory is the sum of resident sizes, read twice per second: shared pages count once per process.
    """

    def __init__(self, path: Path, fast: bool):
        self.path = path
        self.steps: dict[str, dict[str, float]] = {}
        self.runs = json.loads(path.read_text()) if path.exists() else []
        started = datetime.now().isoformat(timespec="seconds")
        self.runs.append({"started": started, "fast": fast, "steps": self.steps})

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        print(f"\n{len(self.steps) + 1}. {name}", flush=True)
        done, peak, start = threading.Event(), [0.0], time.perf_counter()
        watcher = threading.Thread(target=_watch_memory, args=(done, peak), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
        seconds = time.perf_counter() - start
        self.steps[name] = {"seconds": round(seconds, 1), "peak_mb": round(peak[0])}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.runs, indent=1) + "\n")
        print(f"   {seconds:.0f} s, peak {peak[0]:,.0f} MB", flush=True)


def _watch_memory(done: threading.Event, peak: list[float]) -> None:
    me = psutil.Process()
    while True:
        total = 0
        for process in [me, *me.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:  # it ended between the two calls
                continue
        peak[0] = max(peak[0], total / 2**20)
        if done.wait(0.5):
            return


def time_once(model: HDMIL, slides: list[Path], size: Size, path: Path) -> pd.DataFrame:
    """Seconds by stage on the large slides; measured once for these networks and kept in `path`."""
    if not path.exists():
        timings = time_slides(model, slides, size.repeats, keep_ratios=(0.3,), progress=True)
        timings.to_csv(path, index=False)
    return pd.read_csv(path)


def draw_figures(
    folder: Path,
    predictions: pd.DataFrame,
    timings: pd.DataFrame,
    history: Path,
    model: HDMIL,
    slide: Path,
) -> None:
    """The figures of the README and of the results, as PNG."""
    plots.use_style()
    scores = fold_scores(predictions)
    scores["method"] = scores["method"].map(title)
    plots.method_scores(scores)
    _save(folder / "methods.png")
    hdmil = [fold for _, fold in predictions[predictions["method"] == "hdmil"].groupby("fold")]
    plots.roc([fold["label"] for fold in hdmil], [fold["p_1"] for fold in hdmil])
    _save(folder / "roc.png")
    plots.training_curves(pd.read_csv(history))
    _save(folder / "training_curves.png")
    plots.stage_times(stage_medians(timings)[list(STAGES)])
    _save(folder / "stage_times.png")
    prediction = model.predict(slide)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    plots.truth_overlay(prediction, tumor_share(truth_path(slide), prediction.rowcol), axes[0])
    plots.kept_overlay(prediction, prediction.kept, axes[1])
    plots.attention_overlay(prediction, prediction.attention[:, 1], axes[2])
    _save(folder / "slide.png")


def _save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path)
    plt.close("all")


def run_notebooks(out: Path) -> None:
    """Execute the notebooks in order, one line each.

    Raises:
        HDMILError: One of them failed.
    """
    for path in notebooks.find():
        run = notebooks.execute(path, out)
        print(f"   {run}", flush=True)
        if run.error:
            raise HDMILError(f"{path.name}: {run.error}")


def beside_full_run(results: pd.DataFrame) -> pd.DataFrame:
    """The table of a fast run beside the same rows of the full run, as committed in docs/results."""
    full = pd.read_csv(FULL_RUN, index_col="method")
    ours = results[["AUC", "ACC", "tiles read"]]
    theirs = full[["AUC", "ACC", "tiles read"]].add_prefix("full run: ")
    return ours.join(theirs).join(results[["paper AUC"]])


def run(cfg: Config) -> None:
    """All steps, in order."""
    size = FAST if cfg.fast else FULL
    tables, figures = cfg.build / "tables", cfg.build / "figures"
    steps = Steps(cfg.build / "timing.json", cfg.fast)
    with steps.step("Cohort: synthetic slides, tiles and features"):
        cohort: Cohort = prepare_cohort(COHORT, fast=cfg.fast)
        if cfg.fast:  # its bags are shipped: draw, tile and encode a few slides all the same
            prepare_cohort(COHORT, n_slides=size.n_drawn)
        bags = cohort.load_bags()
    with steps.step(f"Cross-validation, {N_FOLDS} folds of {len(cohort)} slides"):
        cv = cross_validate(
            cohort, size.methods, folds=N_FOLDS, seed=cfg.seed, recipe=RECIPES[COHORT], bags=bags
        )
    with steps.step("Seconds per slide: all tiles against the tiles that LIPN keeps"):
        fold = cv.best_fold("hdmil")
        model = cv.hdmil(fold)
        model.save_pretrained(cfg.build / "model")
        slides = large_slides(COHORT, size.n_slides, size.side)
        timings = time_once(model, slides, size, cv.folder / f"timings-{size.side}-{size.n_slides}.csv")
    with steps.step("Tables and figures"):
        predictions = add_mask_scores(cv, cohort, bags)
        results = table1(predictions[predictions["method"].isin(TABLE1_METHODS)], timings)
        save_table(results, tables / "table1")
        save_table(table2(timings), tables / "table2")
        save_table(table3(predictions[predictions["method"].isin(TABLE3_METHODS)]), tables / "table3")
        predictions.to_csv(tables / "predictions.csv", index=False)
        timings.to_csv(tables / "timings.csv", index=False)
        history = cv.folder / "hdmil_dagger" / f"fold{fold}" / "history.csv"
        draw_figures(figures, predictions, timings, history, model, slides[0])
    with steps.step("Notebooks"):
        run_notebooks(cfg.build / "notebooks")
    if cfg.fast:
        print(
            f"\nTest scores on the {len(cohort)} sample slides (synthetic, {COHORT}), beside the full run on "
            "all 200 and the paper's on Camelyon16:\n"
        )
        print(to_markdown(beside_full_run(results)))
        print(
            "The samples hold larger tumors than the full cohort, so scores are higher. LIPN is worth its "
            "seconds where its row lies above that of random tiles, of which as many are read. Taught "
            "evidence, it does; taught DMIN's masks, as published, the difference is within noise "
            "(notebook 06).\n"
        )
    else:
        print(f"\nTest scores on {len(cohort)} synthetic slides ({COHORT}), beside the paper's Camelyon16:\n")
        print(to_markdown(results))
    print(f"notebooks  {cfg.build / 'notebooks'}   (read them with `make lab`)")
    print(f"tables     {tables}\nfigures    {figures}\nmodel      {cfg.build / 'model'}")
