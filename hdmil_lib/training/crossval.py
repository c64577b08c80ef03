"""Methods x folds: the out-of-fold predictions behind Tables 1 and 3; parallel over folds, resumable."""

import hashlib
import json
import multiprocessing
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hdmil_lib.config import cache_dir, torch_threads
from hdmil_lib.data import Cohort, Split, make_splits, write_splits
from hdmil_lib.errors import CheckpointError, HDMILError
from hdmil_lib.features.bagstore import Bag
from hdmil_lib.models import DMIN, LIPN, DMINSettings, MILModel, build_model
from hdmil_lib.training.checkpoint import claim_folder, load_weights, read_json, save_table, write_json
from hdmil_lib.training.joint import fine_tune
from hdmil_lib.training.methods import METHODS
from hdmil_lib.training.ragged import RaggedBags
from hdmil_lib.training.recipes import Recipe
from hdmil_lib.training.trainer import bags_digest, train_lipn, train_model
from hdmil_lib.training.two_stage import two_stage


@dataclass(frozen=True)
class _Job:
    """One method on one fold, with what a worker process needs beside the bags."""

    method: str
    fold: int
    split: Split
    labels: dict[str, int]
    n_classes: int
    recipe: Recipe
    out_dir: Path

    @property
    def folder(self) -> Path:
        return self.out_dir / self.method / f"fold{self.fold}"

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions.csv"


def run_crossval(
    cohort: Cohort,
    bags: Mapping[str, Bag],
    methods: Sequence[str],
    n_folds: int,
    seed: int,
    recipe: Recipe,
    out_dir: str | Path | None = None,
    *,
    workers: int = 2,
    progress: bool = True,
) -> pd.DataFrame:
    """Train and test methods by cross-validation.

    Methods that screen tiles build on the DMIN of "hdmil_dagger", and all but "hdmil" on the LIPN of
    "hdmil": both are trained first where they are not asked for. What is finished is not run again.

    Args:
        cohort: Labels and cases.
        bags: Bags by slide_id, of one encoder.
        methods: Names in `METHODS`.
        n_folds: Folds; see `make_splits`.
        seed: Of splits, initial weights, training and random tiles.
        recipe: Settings of the networks, such as `RECIPES["camelyon-mini"]`; its seeds give way to `seed`.
        out_dir: Gets the splits and a folder `<method>/fold<k>` each; default: `run_dir` of the others.
        workers: Processes, this one among them, each with one torch thread; 1 trains here alone, with the
            threads that torch has.
        progress: Show a bar over jobs.

    Returns:
        One row a method, fold and test slide: `method`, `fold`, `slide_id`, `label`, `p_<class index>` for
        each class, and `keep_ratio`, the share of tiles that are read.

    Raises:
        HDMILError: A method is unknown.
        CohortError: Too few cases for the folds.
        CheckpointError: `out_dir` holds runs of another configuration.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise HDMILError(f"there is no method {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    run = (cohort, bags, n_folds, seed, recipe)
    out_dir = run_dir(*run) if out_dir is None else Path(out_dir)
    splits = make_splits(cohort, n_folds, seed)
    claim_folder(out_dir, _identity(*run))
    write_splits(splits, out_dir / "splits")
    labels = dict(zip(cohort.slide_ids, cohort.labels.tolist(), strict=True))
    waves = [
        [
            _Job(method, fold, split, labels, len(cohort.classes), recipe.seeded(seed), out_dir)
            for method in wave
            for fold, split in enumerate(splits)
        ]
        for wave in _waves(methods)
    ]
    _run(waves, bags, workers, progress)
    asked = [job for method in methods for wave in waves for job in wave if job.method == method]
    tables = [pd.read_csv(job.folder / "predictions.csv", dtype={"slide_id": str}) for job in asked]
    return pd.concat(tables, ignore_index=True)


def run_dir(cohort: Cohort, bags: Mapping[str, Bag], n_folds: int, seed: int, recipe: Recipe) -> Path:
    """Where such a run is kept in the cache: `runs/<cohort folder>-<hash of all it depends on>`."""
    text = json.dumps(_identity(cohort, bags, n_folds, seed, recipe), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return cache_dir() / "runs" / f"{cohort.root.resolve().name}-{digest}"


def load_fold(out_dir: str | Path, fold: int, method: str = "hdmil") -> tuple[DMIN, LIPN, tuple[float, ...]]:
    """The two networks that a method uses on a fold, in evaluation mode, and LIPN's calibrated thresholds.

    Raises:
        CheckpointError: That fold was not run in this folder, or its files are damaged.
    """
    entry = METHODS[method]
    joint = entry.screen == "joint"
    folder = Path(out_dir) / (method if entry.screen in ("lipn", "joint") else entry.base) / f"fold{fold}"
    thresholds = read_json(folder / "config.json").get("thresholds")
    if thresholds is None:
        raise CheckpointError(f"{folder}: LIPN is not trained to its end; run the cross-validation again")
    dmin = load_dmin(out_dir, fold, method if joint else entry.dmin)
    lipn = LIPN(dmin.n_classes)
    load_weights(lipn, folder / ("lipn.safetensors" if joint else "model.safetensors"))
    return dmin, lipn.eval(), tuple(thresholds)


def load_dmin(out_dir: str | Path, fold: int, method: str = "hdmil_dagger") -> DMIN:
    """The DMIN that a method trained on a fold, in evaluation mode.

    Raises:
        CheckpointError: That fold was not run in this folder, or its files are damaged.
    """
    folder = Path(out_dir) / method / f"fold{fold}"
    dmin = DMIN(DMINSettings(**read_json(folder / "config.json")["model_settings"]))
    load_weights(dmin, folder / "model.safetensors")
    return dmin.eval()


def _identity(
    cohort: Cohort, bags: Mapping[str, Bag], n_folds: int, seed: int, recipe: Recipe
) -> dict[str, Any]:
    """What the result of a cross-validation depends on."""
    rows = cohort.table[["slide_id", "case_id", "label"]].to_json()
    return {
        "n_folds": n_folds,
        "seed": seed,
        "recipe": asdict(recipe),
        "labels": hashlib.sha256(rows.encode()).hexdigest()[:16],
        "features": bags_digest(bags, cohort.slide_ids),
    }


def _waves(methods: Sequence[str]) -> list[list[str]]:
    """Methods and those they build on, in groups: each needs only the groups before it."""
    wanted = set(methods)
    for name in reversed(METHODS):
        if name in wanted:
            wanted |= set(METHODS[name].needs)
    depth: dict[str, int] = {}
    for name in METHODS:  # what a method needs stands before it
        depth[name] = 1 + max((depth[other] for other in METHODS[name].needs), default=-1)
    names = [name for name in METHODS if name in wanted]
    return [[name for name in names if depth[name] == d] for d in range(3)]


def _run(waves: list[list[_Job]], bags: Mapping[str, Bag], workers: int, progress: bool) -> None:
    """Run the jobs that have no predictions yet, one wave after the other.

    This process is one of the workers: it trains while the others still import.
    """
    todo = [[job for job in wave if not job.predictions.is_file()] for wave in waves]
    n_jobs, n_todo = sum(map(len, waves)), sum(map(len, todo))
    helpers = min(workers, n_todo) - 1
    with tqdm(total=n_jobs, initial=n_jobs - n_todo, disable=not progress, desc="cross-validation") as bar:
        if helpers < 1:
            for job in chain(*todo):
                _run_job(job, bags)
                bar.update()
            return
        spawn = multiprocessing.get_context("spawn")
        with (
            torch_threads(1),
            ProcessPoolExecutor(helpers, spawn, _start_worker, (dict(bags),)) as processes,
            ThreadPoolExecutor(helpers) as threads,
        ):
            for wave in todo:
                _share(deque(wave), bags, processes, threads, helpers, bar)


def _share(
    jobs: deque[_Job],
    bags: Mapping[str, Bag],
    processes: Executor,
    threads: Executor,
    helpers: int,
    bar: tqdm,
) -> None:
    """Run jobs here and in `helpers` processes, each taking the next one when it is free."""

    def next_job() -> _Job | None:
        with suppress(IndexError):  # another thread took the last one
            return jobs.popleft()
        return None

    def work(run: Callable[[_Job], object]) -> None:
        try:
            while job := next_job():
                run(job)
                bar.update()
        except BaseException:
            jobs.clear()
            raise

    waiting = [
        threads.submit(work, lambda job: processes.submit(_run_in_worker, job).result())
        for _ in range(helpers)
    ]
    work(lambda job: _run_job(job, bags))
    for thread in waiting:
        thread.result()


_worker_bags: dict[str, Bag] = {}


def _start_worker(bags: dict[str, Bag]) -> None:
    torch.set_num_threads(1)
    _worker_bags.update(bags)


def _run_in_worker(job: _Job) -> None:
    _run_job(job, _worker_bags)


def _run_job(job: _Job, bags: Mapping[str, Bag]) -> None:
    """Train what the method trains, predict the fold's test slides and write `predictions.csv`."""
    started = time.time()
    screen = METHODS[job.method].screen
    if screen is None:
        model = _train_classifier(job, bags)
        logits, kept = RaggedBags(bags, job.split.test, model.inputs).predict(model, job.split.test)
        kept = torch.ones_like(kept) if model.reads_all else kept  # DMIN selects, but among all
        outputs = dict(zip(job.split.test, zip(logits, kept, strict=True), strict=True))
    else:
        if screen == "lipn":
            _train_lipn(job, bags)
        elif screen == "joint":
            _fine_tune(job, bags)
        outputs = _screened(job, RaggedBags(bags, job.split.test, ("features", "patches")))
    rows = []
    for slide_id, (logits, kept) in outputs.items():
        row = {"method": job.method, "fold": job.fold, "slide_id": slide_id, "label": job.labels[slide_id]}
        row |= {f"p_{c}": float(p) for c, p in enumerate(logits.double().softmax(0))}
        rows.append(row | {"keep_ratio": float(kept)})
    write_json(job.folder / "provenance.json", _commit() | {"seconds": round(time.time() - started, 1)})
    save_table(job.predictions, pd.DataFrame(rows))


def _commit() -> dict[str, str | bool | None]:
    """Commit of the code that runs, if it runs from a checkout, and whether files differ from it."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}


def _train_classifier(job: _Job, bags: Mapping[str, Bag]) -> MILModel:
    method, recipe = METHODS[job.method], job.recipe
    options = {**recipe.models.get(method.model, {}), **method.options}
    training = recipe.training_of(method.model)
    in_dim = bags[job.split.train[0]].features.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = build_model(method.model, in_dim, job.n_classes, **options)
    loss_options = recipe.loss if method.model == "dmin" else None
    train_model(model, bags, job.split, job.labels, training, job.folder, loss_options=loss_options)
    return model


def _train_lipn(job: _Job, bags: Mapping[str, Bag]) -> None:
    method = METHODS[job.method]
    dmin = load_dmin(job.out_dir, job.fold, method.dmin)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.recipe.lipn_training.seed)
        lipn = LIPN(job.n_classes)
    train_lipn(lipn, dmin, bags, job.split, job.labels, job.recipe.lipn_training, job.folder, **method.lipn)


def _fine_tune(job: _Job, bags: Mapping[str, Bag]) -> None:
    method, recipe = METHODS[job.method], job.recipe
    networks = load_fold(job.out_dir, job.fold, method.base)
    data = bags, job.split, job.labels
    fine_tune(*networks, *data, recipe.joint_training, job.folder, loss_options=recipe.loss)


@torch.inference_mode()
def _screened(job: _Job, data: RaggedBags) -> dict[str, tuple[Tensor, Tensor]]:
    """Logits of each test slide from the tiles that the method lets DMIN read, and their share."""
    screen = METHODS[job.method].screen
    dmin, lipn, thresholds = load_fold(job.out_dir, job.fold, job.method)
    published = screen == "published"
    cut = dmin.settings.threshold if published else thresholds
    generator = torch.Generator().manual_seed(job.recipe.training.seed)
    outputs = {}
    for slide_id in job.split.test:
        features = data.take("features", [slide_id])
        patches = data.take("patches", [slide_id])
        output, kept = two_stage(dmin, lipn, features, patches, cut, lipn_pools=published)
        if screen == "random":
            n_read = round(float(kept) * len(features))
            drawn = torch.randperm(len(features), generator=generator)[:n_read]
            output = dmin(features[drawn])
        outputs[slide_id] = output.logits, kept
    return outputs
