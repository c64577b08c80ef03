"""Tune systems on composed slides with the same number of trials each; needs the tiles of PatchCamelyon.

    python tools/tune_composed.py --tiles DIR [--trials 10] [--seeds 1]

Trial 0 of every system is the recipe of the drawn cohorts, the others are drawn from the same lists. A trial
trains on the training slides of two compositions with several seeds, and counts by its lowest validation
loss. Test slides and slides of other compositions are not read, so that they can be reported on. Trials
go to `benchmarks/results/tuning_composed.json` as they end; those that are there are not repeated.
"""

import argparse
import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hdmil_lib.batches import BagDataset
from hdmil_lib.cohort import column_split
from hdmil_lib.config import setup
from hdmil_lib.models import create_model
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.splits import Split
from hdmil_lib.synthetic.composed import compose_cohort
from hdmil_lib.training.fit import fit

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "tuning_composed.json"
SYSTEMS = {"abmil": "ABMIL, gated", "clam_mb": "CLAM-MB", "dmin": "HDMIL†"}
COMPOSITIONS = (0, 1)
SIDE = 64
TRAINING = {
    "learning_rate": (1e-4, 2e-4, 5e-4, 1e-3),
    "instance_dropout": (0.0, 0.5),
    "weight_decay": (1e-5, 1e-3),
}
MODEL = {"embed_dim": (256, 512), "dropout": (0.0, 0.25, 0.5)}
CLUSTERING = {"k": (4, 8, 32), "subtyping": (False, True)}
"""For the systems that have a clustering loss."""

LENGTH = {"epochs": 25, "min_epochs": 15, "patience": 5}


def settings_of(system: str, trial: int) -> dict[str, dict[str, Any]]:
    """Settings of a trial: those of training and of the model that replace the recipe's."""
    if trial == 0:
        return {"training": {}, "model": {}}
    rng = np.random.default_rng(trial)  # the same for every system

    def draw(lists: Mapping[str, tuple]) -> dict[str, Any]:
        return {name: values[rng.integers(len(values))] for name, values in lists.items()}

    training, model, clustering = draw(TRAINING), draw(MODEL), draw(CLUSTERING)
    model["attention_dim"] = model["embed_dim"] // 2
    return {"training": training, "model": model | (clustering if system != "abmil" else {})}


_data: list[tuple[BagDataset, Split]] = []


def start(tiles: Path, n_slides: int) -> None:
    """Load both compositions in a worker."""
    torch.set_num_threads(1)
    for seed in COMPOSITIONS:
        cohort = compose_cohort(tiles, n_slides=n_slides, seed=seed, looks=[SIDE], progress=False)
        split = column_split(cohort)
        assert split is not None
        served = {*split.train, *split.val}
        bags = {slide_id: bag for slide_id, bag in cohort.load_bags().items() if slide_id in served}
        _data.append((BagDataset(bags, cohort.label_of), split))


def run(system: str, trial: int, composition: int, seed: int) -> tuple[float, float]:
    """Validation loss and AUC of the best epoch of one training."""
    recipe, given = RECIPES["camelyon-mini"], settings_of(system, trial)
    data, split = _data[composition]
    options = {"in_dim": data.dim, "n_classes": 2, **recipe.models.get(system, {}), **given["model"]}
    torch.manual_seed(seed)
    model = create_model(name=system, **options)
    training = replace(recipe.training_of(system), seed=seed, **LENGTH, **given["training"])
    with TemporaryDirectory() as folder:
        history = fit(model, data, split, training, out=folder, device="cpu")
    best = history.loc[history["val_loss"].idxmin()]
    return float(best["val_loss"]), float(best["val_auc"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--n-slides", type=int, default=480)
    given = parser.parse_args()
    setup()
    for seed in COMPOSITIONS:  # drawn and extracted here, not by several workers at once
        compose_cohort(given.tiles, n_slides=given.n_slides, seed=seed, looks=[SIDE])
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with ProcessPoolExecutor(
        2, multiprocessing.get_context("spawn"), start, (given.tiles, given.n_slides)
    ) as pool:
        waiting = {}
        for trial in range(given.trials):
            for system in SYSTEMS:
                if len(found.get(SYSTEMS[system], [])) > trial:
                    continue
                waiting[system, trial] = [
                    pool.submit(run, system, trial, composition, seed)
                    for composition in COMPOSITIONS
                    for seed in range(given.seeds)
                ]
        every = [future for futures in waiting.values() for future in futures]
        for _ in tqdm(as_completed(every), total=len(every), desc="trainings"):
            while waiting and all(future.done() for future in next(iter(waiting.values()))):
                (system, trial), futures = next(iter(waiting.items()))
                del waiting[system, trial]
                losses, aucs = zip(*(future.result() for future in futures), strict=True)
                row = {
                    **settings_of(system, trial),
                    "validation loss": round(float(np.mean(losses)), 4),
                    "validation AUC": round(float(np.mean(aucs)), 4),
                }
                found.setdefault(SYSTEMS[system], []).append(row)
                RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    for system, trials in found.items():
        best = min(trials, key=lambda row: row["validation loss"])
        print(system, json.dumps(best), sep="\n  ")


if __name__ == "__main__":
    main()
