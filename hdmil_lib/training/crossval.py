"""Cross-validation: all methods on all folds, with test predictions and trained models; resumable."""

import hashlib
import json
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hdmil_lib import devices
from hdmil_lib.bags import Bag
from hdmil_lib.batches import BagDataset
from hdmil_lib.cohort import (
    Cohort,
    check_classes,
    check_repeated_slides,
    check_splits,
    make_splits,
    official_splits,
)
from hdmil_lib.config import cache_dir, torch_threads
from hdmil_lib.errors import BagError
from hdmil_lib.kernels.segments import to_device
from hdmil_lib.methods import METHODS, check_methods
from hdmil_lib.models import DMIN, LIPN, MILModel, create_model
from hdmil_lib.processes import helper_processes
from hdmil_lib.splits import Split, read_splits, write_splits
from hdmil_lib.storage import read_json, remove_stale, write_json, write_table
from hdmil_lib.training.cascade import CascadeSettings, fit_cascade
from hdmil_lib.training.fit import fit, predict_slides
from hdmil_lib.training.joint import fine_tune
from hdmil_lib.training.lipn import fit_lipn, predict_screened
from hdmil_lib.training.look import LOOK_TRAINING
from hdmil_lib.training.provenance import source_commit
from hdmil_lib.training.recipes import Recipe, recipe_for
from hdmil_lib.training.state import claim_folder
from hdmil_lib.training.trained import CrossValidation


def cross_validate(
    cohort: Cohort,
    methods: Sequence[str] = ("abmil", "hdmil_dagger", "hdmil"),
    *,
    folds: int = 5,
    splits: str | Path | Sequence[Split] | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    bags: Mapping[str, Bag] | None = None,
    workers: int = 2,
    device: str | torch.device | Sequence[str | torch.device] = "auto",
    progress: bool = True,
    share: Callable[[list[list["Job"]]], None] | None = None,
) -> CrossValidation:
    """Train and test methods by cross-validation.

    Methods that need the DMIN of "hdmil_dagger" or the LIPN of "hdmil" (see `Method.needs`) have these
    trained first. Finished trainings are not repeated, so an interrupted run resumes if started again.

    Args:
        cohort: Labels, cases and bags.
        methods: Names in `METHODS`.
        folds: Number of folds; see `make_splits`. With a column `split` in the table see `official_splits`.
            Not used if there are `splits`.
        splits: Folder with CLAM's `splits_<k>.csv`, or the splits themselves; test parts may overlap.
        recipe: Settings of the networks, whose seeds are replaced by `seed`; by default `recipe_for` the
            cohort's size and features.
        seed: Seed of splits, initial weights, training and random tiles.
        out: Folder of all results; by default one in the cache, named after a hash of the configuration.
        bags: Bags by slide_id, if they are in memory already.
        workers: Number of processes including this one, each with one torch thread; with 1 this process keeps
            its number of threads. There is at least one per device.
        device: Device or devices to train on, as `devices.resolve_all` takes them; "auto" is all GPUs, or the
            CPU. Processes take them in turn.
        progress: Whether a bar over trainings is shown.
        share: Function that runs the jobs elsewhere, one list after the other; see `cluster.cross_validate`.

    Raises:
        HDMILError: A method is unknown.
        BagError: A slide has no bag, the bags do not fit together, or lack the patches that a method needs.
        CohortError: There are too few cases for the folds, the splits do not fit the cohort, or a fold cannot
            be learned or scored.
        CheckpointError: `out` holds runs of another configuration.
        HDMILError: There is no such device, or it has too little memory.
    """
    check_methods(methods)
    targets = devices.resolve_all(device)
    if bags is None:
        bags = cohort.load_bags()
    if absent := [slide_id for slide_id in cohort.slide_ids if slide_id not in bags]:
        raise BagError(f"there is no bag of slide '{absent[0]}'; extract its features, or drop its row")
    bags = {slide_id: bags[slide_id] for slide_id in cohort.slide_ids}
    check_repeated_slides(bags, cohort)
    data = BagDataset(bags, cohort.label_of)
    _check_patches(methods, bags)
    parts = _splits(cohort, splits, folds, seed)
    recipe = (recipe or recipe_for(len(cohort), data.dim)).seeded(seed)
    identity = {
        "n_folds": len(parts),
        "seed": seed,
        "recipe": asdict(recipe),
        "splits": hashlib.sha256(repr(parts).encode()).hexdigest()[:16],
        "labels": hashlib.sha256(repr([cohort.label_of, cohort.case_of]).encode()).hexdigest()[:16],
        "classes": list(cohort.classes),
        "features": data.digest(cohort.slide_ids),
        "encoder": asdict(data.encoder),
        "cohort": cohort.root.resolve().name,
        **_tiles(bags),
    }
    if out is None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        out = cache_dir() / "runs" / f"{identity['cohort']}-{digest}"
    out = Path(out)
    claim_folder(out, identity)
    for folder in out.glob("**/"):
        remove_stale(folder)
    write_splits(parts, out / "splits")
    write_table(out / "slides.csv", cohort.table[["slide_id", "case_id", "label"]])
    n_classes = len(cohort.classes)
    waves = [
        [Job(name, fold, split, n_classes, recipe, out) for name in wave for fold, split in enumerate(parts)]
        for wave in waves_of(methods)
    ]
    if share is None:
        _run(waves, data, bags, max(workers, len(targets)), targets, progress)
    else:
        todo = [[job for job in wave if not job.predictions.is_file()] for wave in waves]
        share([wave for wave in todo if wave])
    return CrossValidation(out, methods)


def _tiles(bags: Mapping[str, Bag]) -> dict[str, Any]:
    """Which tiles the bags hold, if not those by default: prediction must cut the same.

    Raises:
        BagError: Two bags differ in it.
    """
    usual = {"tissue": "default", "min_tissue": 0.25, "tile_size": 256, "tile_mpp": 0.5}
    found: dict[str, tuple[Any, str]] = {}
    for slide_id, bag in bags.items():
        own = {key: bag.attrs.get(key, value) for key, value in usual.items()}
        if "tile_mpp" in bag.attrs:  # else the size may be one in level-0 pixels
            own["tile_size"] = int(bag.attrs.get("patch_size", 256))
        for key, value in own.items():
            other, first = found.setdefault(key, (value, slide_id))
            if value != other:
                option = key.replace("_", "-")
                raise BagError(
                    f"bag {first} was made with {key} {other!r}, bag {slide_id} with {value!r}; extract all "
                    f"slides with the same --{option}"
                )
    made = {key: found[key][0] for key in usual} if found else usual
    return {} if made == usual else {"tiles": made}


def _check_patches(methods: Sequence[str], bags: Mapping[str, Bag]) -> None:
    """Check, before anything is trained, that all bags have the patches that a method needs.

    Raises:
        BagError: A method screens tiles, and a bag has no patches.
    """
    screening = [name for name in methods if METHODS[name].screen is not None]
    lacking = [slide_id for slide_id, bag in bags.items() if bag.patches is None]
    if screening and lacking:
        raise BagError(
            f"method '{screening[0]}' screens tiles by their patches, which {len(lacking)} of {len(bags)} "
            f"bags lack, such as {lacking[0]}; fill them in from the slides with `hdmil add-patches`, or "
            "train bag classifiers alone (`hdmil train --no-screening`)"
        )


def _splits(
    cohort: Cohort, splits: str | Path | Sequence[Split] | None, folds: int, seed: int
) -> list[Split]:
    """The given splits, else those of the column `split`, else new splits by case; all of them checked."""
    if splits is not None:
        found = read_splits(splits) if isinstance(splits, str | Path) else list(splits)
    else:
        found = official_splits(cohort, folds, seed) or make_splits(cohort, folds, seed)
    check_splits(found, cohort)
    check_classes(found, cohort)
    return found


def waves_of(methods: Sequence[str]) -> list[list[str]]:
    """Methods and those they need, in groups: a group needs only the groups before it."""
    wanted = set(methods)
    for name in reversed(METHODS):
        if name in wanted:
            wanted |= set(METHODS[name].needs)
    depth: dict[str, int] = {}
    for name in METHODS:  # a method is listed after those it needs
        depth[name] = 1 + max((depth[other] for other in METHODS[name].needs), default=-1)
    names = [name for name in METHODS if name in wanted]
    return [[name for name in names if depth[name] == d] for d in range(3)]


@dataclass(frozen=True)
class Job:
    """One method on one fold, with everything that a worker process needs except the bags.

    Attributes:
        method: Name in `METHODS`.
        fold: Number of the fold, from 0.
        split: Its slides.
        n_classes: Number of classes.
        recipe: Settings of the networks.
        out: Folder of all results.
    """

    method: str
    fold: int
    split: Split
    n_classes: int
    recipe: Recipe
    out: Path

    @property
    def folder(self) -> Path:
        """Folder of its results."""
        return self.out / self.method / f"fold{self.fold}"

    @property
    def predictions(self) -> Path:
        """Table of its predictions, which is there when it is done."""
        return self.folder / "predictions.csv"


def _run(
    waves: list[list[Job]],
    data: BagDataset,
    bags: Mapping[str, Bag],
    workers: int,
    targets: Sequence[torch.device],
    progress: bool,
) -> None:
    """Run the jobs that have no predictions yet, one wave after the other.

    This process is one of the workers: it trains while the others still import modules, and takes jobs that
    no other worker has started. If a job fails, the other workers are terminated.
    """
    todo = [[job for job in wave if not job.predictions.is_file()] for wave in waves]
    n_jobs, n_todo = sum(map(len, waves)), sum(map(len, todo))
    helpers = min(workers, n_todo) - 1
    with tqdm(total=n_jobs, initial=n_jobs - n_todo, disable=not progress, desc="cross-validation") as bar:
        if n_todo:
            data = data.to(targets[0])
            if data.device.type == "cuda" and progress:
                bar.write(data.placement)
        if helpers < 1:
            for job in chain(*todo):
                run_job(job, data)
                bar.update()
            return
        free = multiprocessing.get_context("spawn").SimpleQueue()  # of the devices of the helpers
        for number in range(1, helpers + 1):
            free.put(str(targets[number % len(targets)]))
        given = (dict(bags), data.labels, free)
        with helper_processes(helpers, _start_worker, given) as pool, torch_threads(1):
            for wave in todo:
                _share(wave, data, pool, helpers, bar)


def _share(wave: Sequence[Job], data: BagDataset, pool: ProcessPoolExecutor, helpers: int, bar: tqdm) -> None:
    """Run a wave of jobs here and in the helpers, each of which takes the next job when it is free.

    A helper gets its next job when the last one is done: jobs that wait in the pool cannot be taken back.
    """
    jobs, futures = deque(wave), list[Future]()

    def feed() -> None:
        with suppress(IndexError):  # no job is left
            future = pool.submit(_run_in_worker, jobs.popleft())
            futures.append(future)
            future.add_done_callback(done)

    def done(future: Future) -> None:
        if future.cancelled() or future.exception():
            jobs.clear()
            return
        bar.update()
        feed()

    for _ in range(helpers):
        feed()
    while jobs:
        try:
            job = jobs.popleft()
        except IndexError:  # a helper took the last one
            break
        run_job(job, data)
        bar.update()
    for future in futures:
        future.result()


_worker_data: list[BagDataset] = []


def _start_worker(bags: dict[str, Bag], labels: dict[str, int], free: "SimpleQueue[str]") -> None:
    torch.set_num_threads(1)
    _worker_data.append(BagDataset(bags, labels, free.get()))


def _run_in_worker(job: Job) -> None:
    run_job(job, _worker_data[0])


def run_job(job: Job, data: BagDataset) -> None:
    """Train what the method trains, predict the fold's test slides and write `predictions.csv`."""
    started = time.time()
    screen = METHODS[job.method].screen
    if screen is None:
        model = _fit_classifier(job, data).to(data.device)
        logits, kept = predict_slides(model, data, job.split.test)
        kept = torch.ones_like(kept) if model.reads_all else kept  # DMIN selects after reading all tiles
    else:
        if screen == "lipn":
            _fit_lipn(job, data)
        elif screen == "joint":
            _fine_tune(job, data)
        elif screen == "cascade":
            _fit_cascade(job, data)
        logits, kept = _screened(job, data)
    logits, kept = logits.cpu(), kept.cpu()
    rows = [
        {"method": job.method, "fold": job.fold, "slide_id": slide_id, "label": data.labels[slide_id]}
        | {f"p_{c}": float(p) for c, p in enumerate(logits[i].double().softmax(0))}
        | {"keep_ratio": float(kept[i])}
        for i, slide_id in enumerate(job.split.test)
    ]
    spent = {"seconds": round(time.time() - started, 1), "device": devices.name(data.device)}
    write_json(job.folder / "provenance.json", source_commit() | spent)
    write_table(job.predictions, pd.DataFrame(rows))


def _fit_classifier(job: Job, data: BagDataset) -> MILModel:
    method, recipe = METHODS[job.method], job.recipe
    training = recipe.training_of(method.model)
    description = {"name": method.model, "in_dim": data.dim, "n_classes": job.n_classes}
    description |= {**recipe.models.get(method.model, {}), **method.options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = create_model(**description)
    write_json(job.folder / "model.json", description)
    fit(model, data, job.split, training, out=job.folder, device=data.device)
    return model


def _fit_lipn(job: Job, data: BagDataset) -> None:
    method, training = METHODS[job.method], job.recipe.lipn_training
    dmin = cast(DMIN, CrossValidation(job.out, []).classifier(method.dmin, job.fold))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        lipn = LIPN(job.n_classes)
    fit_lipn(lipn, dmin, data, job.split, training, out=job.folder, device=data.device, **method.lipn)


def _fit_cascade(job: Job, data: BagDataset) -> None:
    method, epochs = METHODS[job.method], min(LOOK_TRAINING.epochs, job.recipe.training.epochs)
    training = replace(
        LOOK_TRAINING, seed=job.recipe.training.seed, epochs=epochs, min_epochs=min(epochs, 20)
    )
    base = CrossValidation(job.out, []).hdmil(job.fold, method.base)
    settings = CascadeSettings(**method.cascade)
    fit_cascade(base.dmin, base.lipn, data, job.split, settings, training, out=job.folder, device=data.device)


def _fine_tune(job: Job, data: BagDataset) -> None:
    base = METHODS[job.method].base
    model = CrossValidation(job.out, []).hdmil(job.fold, base)
    dmin_description = read_json(job.out / METHODS[base].dmin / f"fold{job.fold}" / "model.json")
    write_json(job.folder / "model.json", dmin_description)
    fine_tune(model, data, job.split, job.recipe.joint_training, out=job.folder, device=data.device)


@torch.inference_mode()
def _screened(job: Job, data: BagDataset) -> tuple[Tensor, Tensor]:
    """Logits of the test slides (S, C), from the tiles that the method reads, and the share of these (S,)."""
    model = CrossValidation(job.out, []).hdmil(job.fold, job.method).to(data.device)
    logits, kept = predict_screened(model, data, job.split.test)
    if METHODS[job.method].screen != "random":
        return logits, kept
    generator = torch.Generator().manual_seed(job.recipe.training.seed)
    answers = []
    for slide_id, share in zip(job.split.test, kept.tolist(), strict=True):
        features = data.batch([slide_id]).features
        drawn = torch.randperm(len(features), generator=generator)[: round(share * len(features))]
        answers.append(model.dmin(features[to_device(drawn, data.device)]).logits)
    return torch.cat(answers), kept
