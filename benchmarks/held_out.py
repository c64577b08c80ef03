"""Trained networks, and synthetic slides that served for nothing else."""

from collections.abc import Mapping
from dataclasses import replace

from hdmil_lib.bags import Bag
from hdmil_lib.cohort import Cohort
from hdmil_lib.models import HDMIL
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.synthetic.cohorts import prepare_cohort
from hdmil_lib.synthetic.presets import PRESETS
from hdmil_lib.training.crossval import cross_validate

COHORT, FOLDS = "camelyon-mini", 5
N_SLIDES, SEED = 150, 20_000
METHODS = {"hdmil": "HDMIL, masks", "hdmil_evidence": "HDMIL, evidence"}


def held_out_cohort() -> tuple[Cohort, Mapping[str, Bag]]:
    """Slides five times as large as the cohort's, one per case; drawn and encoded once, in 20 minutes."""
    preset = replace(PRESETS[COHORT], name=f"{COHORT}-large", tiles=(500, 700), paired=0.0)
    cohort = prepare_cohort(preset, n_slides=N_SLIDES, seed=SEED)
    return cohort, cohort.load_bags()


def trained_models() -> dict[str, HDMIL]:
    """The models of the best fold of the cross-validation on the cohort; trained where they are not yet."""
    cohort = prepare_cohort(COHORT)
    cv = cross_validate(cohort, ["hdmil_dagger", *METHODS], folds=FOLDS, seed=0, recipe=RECIPES[COHORT])
    fold = cv.best_fold("hdmil")
    return {name: cv.hdmil(fold, name) for name in METHODS}
