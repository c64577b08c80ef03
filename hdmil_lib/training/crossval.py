"""Methods x folds: the out-of-fold predictions behind Tables 1 and 3; parallel over folds, resumable."""

import hashlib
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hdmil_lib.config import cache_dir
from hdmil_lib.data import Cohort, Split, make_splits, write_splits
from hdmil_lib.errors import CheckpointError, HDMILError
from hdmil_lib.features.bagstore import Bag
from hdmil_lib.models import DMIN, LIPN, PAPER_PRESETS, DMINSettings, MILModel, PaperPreset, build_model
from hdmil_lib.training.checkpoint import claim_folder, load_weights, read_json, save_table
from hdmil_lib.training.ragged import RaggedBags
from hdmil_lib.training.trainer import (
    MINI_LIPN_TRAINING,
    MINI_TRAINING,
    PAPER_LIPN_TRAINING,
    PAPER_TRAINING,
    TrainSettings,
    bags_digest,
    train_lipn,
    train_model,
)
from hdmil_lib.training.two_stage import two_stage


@dataclass(frozen=True)
class Method:
    """One row of a results table.

    Attributes:
        title: As the tables print it.
        model: Name in `MODELS` of the network that it trains.
        options: Of `build_model`, beyond the recipe's.
        screen: Tiles that a trained DMIN gets to read: all (None); those that LIPN keeps at the calibrated
            thresholds ("lipn"); as many as these, drawn at random ("random"); or those that LIPN keeps at
            gamma, each pooled by the branches that it was kept for, as in the paper ("published").
    """

    title: str
    model: Literal["mean", "max", "abmil", "dmin"] = "dmin"
    options: Mapping[str, Any] = field(default_factory=dict)
    screen: Literal["lipn", "random", "published"] | None = None


METHODS: dict[str, Method] = {
    "max": Method("Max-Pooling", "max"),
    "mean": Method("Mean-Pooling", "mean"),
    "abmil": Method("ABMIL", "abmil"),
    "hdmil_dagger": Method("HDMIL†"),
    "hdmil_dagger_published": Method(
        "HDMIL†, head as published", options={"degree": 12, "linear_start": False}
    ),
    "hdmil": Method("HDMIL", screen="lipn"),
    "hdmil_published": Method("HDMIL, inference as published", screen="published"),
    "random": Method("Random tiles, as many as HDMIL", screen="random"),
    "dmin_linear": Method(
        "DMIN, linear heads, no self-distillation", options={"head": "linear", "self_distillation": False}
    ),
    "dmin_no_distillation": Method("DMIN, no self-distillation", options={"self_distillation": False}),
}


@dataclass(frozen=True)
class Recipe:
    """Settings of all networks on one cohort.

    Attributes:
        training: Of the bag classifiers.
        lipn_training: Of LIPN.
        models: Options of a bag classifier by its name in `MODELS`.
        trainings: What a bag classifier's training has different from `training`, by the same name.
        loss: Options of `bag_loss`.
    """

    training: TrainSettings
    lipn_training: TrainSettings
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trainings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)

    def shorter(self, epochs: int) -> "Recipe":
        """The same with at most so many epochs of every network."""

        def cut(settings: TrainSettings) -> TrainSettings:
            return replace(settings, epochs=epochs, min_epochs=min(settings.min_epochs, epochs))

        return replace(self, training=cut(self.training), lipn_training=cut(self.lipn_training))


def _paper(preset: PaperPreset) -> Recipe:
    return Recipe(
        training=replace(PAPER_TRAINING, learning_rate=preset.learning_rate),
        lipn_training=PAPER_LIPN_TRAINING,
        models={"dmin": {"degree": preset.settings.degree, "keep_ratio": preset.settings.keep_ratio}},
        loss={"subtyping": preset.subtyping},
    )


def _mini(paper: Recipe) -> Recipe:
    """The paper's recipe cut down to a synthetic cohort of some 200 bags of some 120 tiles.

    Smaller layers, and heads of degree 3 that start linear; "hdmil_dagger_published" has the paper's head.
    """
    return Recipe(
        training=MINI_TRAINING,
        lipn_training=MINI_LIPN_TRAINING,
        models={
            **dict.fromkeys(("max", "mean", "abmil"), {"embed_dim": 256}),
            "dmin": paper.models["dmin"]
            | {"embed_dim": 256, "attention_dim": 128, "degree": 3, "linear_start": True},
        },
        loss={**paper.loss, "k": 8},
    )


RECIPES: dict[str, Recipe] = {name: _paper(preset) for name, preset in PAPER_PRESETS.items()}
RECIPES |= {
    "camelyon-mini": _mini(RECIPES["camelyon16"]),
    "nsclc-mini": _mini(RECIPES["nsclc"]),
    "brca-mini": _mini(RECIPES["brca"]),
}
"""By cohort: the paper's "camelyon16", "nsclc" and "brca", and the synthetic ones after them."""


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
        workers: Processes, each with one torch thread; 1 trains in this process.
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
    recipe = replace(
        recipe,
        training=replace(recipe.training, seed=seed),
        lipn_training=replace(recipe.lipn_training, seed=seed),
    )
    waves = [
        [
            _Job(method, fold, split, labels, len(cohort.classes), recipe, out_dir)
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


def load_fold(out_dir: str | Path, fold: int) -> tuple[DMIN, LIPN, tuple[float, ...]]:
    """The networks that "hdmil" trained on a fold, in evaluation mode, and LIPN's calibrated thresholds.

    Raises:
        CheckpointError: That fold of "hdmil" was not run in this folder, or its files are damaged.
    """
    folder = Path(out_dir) / "hdmil" / f"fold{fold}"
    thresholds = read_json(folder / "config.json").get("thresholds")
    if thresholds is None:
        raise CheckpointError(f"{folder}: LIPN is not trained to its end; run the cross-validation again")
    dmin = load_dmin(out_dir, fold)
    lipn = LIPN(dmin.n_classes)
    load_weights(lipn, folder / "model.safetensors")
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
    """Methods and those they build on, in three groups: each needs only the groups before it."""
    wanted = set(methods)
    if any(METHODS[name].screen for name in wanted):
        wanted |= {"hdmil_dagger"}
    if any(METHODS[name].screen not in (None, "lipn") for name in wanted):
        wanted |= {"hdmil"}
    group = {None: 0, "lipn": 1}
    return [[n for n in METHODS if n in wanted and group.get(METHODS[n].screen, 2) == i] for i in range(3)]


def _run(waves: list[list[_Job]], bags: Mapping[str, Bag], workers: int, progress: bool) -> None:
    """Run the jobs that have no predictions yet, one wave after the other."""
    todo = [[job for job in wave if not job.predictions.is_file()] for wave in waves]
    n_jobs, n_todo = sum(map(len, waves)), sum(map(len, todo))
    workers = min(workers, n_todo)
    with tqdm(total=n_jobs, initial=n_jobs - n_todo, disable=not progress, desc="cross-validation") as bar:
        if workers <= 1:
            for job in chain(*todo):
                _run_job(job, bags)
                bar.update()
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, _start_worker, (dict(bags),)) as pool:
            for wave in todo:
                for _ in pool.map(_run_in_worker, wave):
                    bar.update()


_worker_bags: dict[str, Bag] = {}


def _start_worker(bags: dict[str, Bag]) -> None:
    torch.set_num_threads(1)
    _worker_bags.update(bags)


def _run_in_worker(job: _Job) -> None:
    _run_job(job, _worker_bags)


def _run_job(job: _Job, bags: Mapping[str, Bag]) -> None:
    """Train what the method trains, predict the fold's test slides and write `predictions.csv`."""
    screen = METHODS[job.method].screen
    if screen is None:
        model = _train_classifier(job, bags)
        logits, kept = RaggedBags(bags, job.split.test, model.inputs).predict(model, job.split.test)
        kept = torch.ones_like(kept)  # whatever it selects, it has read every tile
        outputs = dict(zip(job.split.test, zip(logits, kept, strict=True), strict=True))
    else:
        if screen == "lipn":
            _train_lipn(job, bags)
        outputs = _screened(job, RaggedBags(bags, job.split.test, ("features", "patches")))
    rows = []
    for slide_id, (logits, kept) in outputs.items():
        row = {"method": job.method, "fold": job.fold, "slide_id": slide_id, "label": job.labels[slide_id]}
        row |= {f"p_{c}": float(p) for c, p in enumerate(logits.double().softmax(0))}
        rows.append(row | {"keep_ratio": float(kept)})
    save_table(job.predictions, pd.DataFrame(rows))


def _train_classifier(job: _Job, bags: Mapping[str, Bag]) -> MILModel:
    method, recipe = METHODS[job.method], job.recipe
    options = {**recipe.models.get(method.model, {}), **method.options}
    training = replace(recipe.training, **recipe.trainings.get(method.model, {}))
    in_dim = bags[job.split.train[0]].features.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = build_model(method.model, in_dim, job.n_classes, **options)
    loss_options = recipe.loss if method.model == "dmin" else None
    train_model(model, bags, job.split, job.labels, training, job.folder, loss_options=loss_options)
    return model


def _train_lipn(job: _Job, bags: Mapping[str, Bag]) -> None:
    dmin = load_dmin(job.out_dir, job.fold)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.recipe.lipn_training.seed)
        lipn = LIPN(job.n_classes)
    train_lipn(lipn, dmin, bags, job.split, job.labels, job.recipe.lipn_training, job.folder)


@torch.inference_mode()
def _screened(job: _Job, data: RaggedBags) -> dict[str, tuple[Tensor, Tensor]]:
    """Logits of each test slide from the tiles that the method lets DMIN read, and their share."""
    screen = METHODS[job.method].screen
    dmin, lipn, thresholds = load_fold(job.out_dir, job.fold)
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
