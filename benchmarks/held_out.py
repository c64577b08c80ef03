"""Trained networks, and synthetic slides that served for nothing else."""

from collections.abc import Mapping
from dataclasses import replace

from hdmil_lib.cohort import Cohort, load_bags, prepare_cohort
from hdmil_lib.bags import Bag
from hdmil_lib.inference import Predictor, best_fold
from hdmil_lib.synthetic.synthesis import PRESETS
from hdmil_lib.training.crossval import run_crossval, run_dir
from hdmil_lib.training.recipes import RECIPES

COHORT, FOLDS = "camelyon-mini", 5
N_SLIDES, SEED = 150, 20_000
METHODS = {"hdmil": "HDMIL, masks", "hdmil_evidence": "HDMIL, evidence"}


def held_out_cohort() -> tuple[Cohort, Mapping[str, Bag]]:
    """Slides five times as large as the cohort's, one a case; drawn and encoded once, in 20 minutes."""
    preset = replace(PRESETS[COHORT], name=f"{COHORT}-large", tiles=(500, 700), paired=0.0)
    cohort = prepare_cohort(preset, n_slides=N_SLIDES, seed=SEED)
    return cohort, load_bags(cohort)


def predictors() -> dict[str, Predictor]:
    """Of the best fold of the cross-validation on the cohort; trained where they are not yet."""
    cohort = prepare_cohort(COHORT)
    bags, recipe = load_bags(cohort), RECIPES[COHORT]
    run = (cohort, bags, FOLDS, 0, recipe)
    run_crossval(cohort, bags, ["hdmil_dagger", *METHODS], *run[2:])
    folder = run_dir(*run)
    bag, fold = next(iter(bags.values())), best_fold(folder)
    return {name: Predictor.from_fold(folder, fold, cohort.classes, bag, method=name) for name in METHODS}
