"""Is it the degree of DMIN's heads, or how their coefficients start? All four combinations, and linear heads.

    python benchmarks/kan_heads.py

HDMIL† is cross-validated on camelyon-mini (synthetic) with linear heads and with Chebyshev heads of degree 3
and 12, each with all coefficients drawn at random, as in the paper, or with those of T_1 alone, the linear
start of the small recipe. All else is the small recipe; a seed draws splits and initial weights, the same
for all five. It takes about a quarter of an hour of one core; finished folds are not repeated. The AUC of
each seed and fold, and for each seed the differences of all pairs with an interval over cases, go to
`benchmarks/results/kan_heads.json`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from hdmil_lib.bags import Bag
from hdmil_lib.cohort import Cohort
from hdmil_lib.config import setup
from hdmil_lib.evaluation.auc_tests import Difference
from hdmil_lib.evaluation.out_of_fold import OutOfFold, align_methods
from hdmil_lib.evaluation.statistics import compare
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.synthetic.cohorts import prepare_cohort
from hdmil_lib.training.crossval import cross_validate

RESULTS = Path(__file__).resolve().parent / "results" / "kan_heads.json"
COHORT, FOLDS, SEEDS = "camelyon-mini", 5, range(3)
HEADS: Mapping[str, Mapping[str, Any]] = {
    "linear head": {"head": "linear"},
    "K = 3, linear start": {"degree": 3, "linear_start": True},
    "K = 3, random start": {"degree": 3, "linear_start": False},
    "K = 12, linear start": {"degree": 12, "linear_start": True},
    "K = 12, random start": {"degree": 12, "linear_start": False},
}


def percent(found: Difference) -> dict[str, float]:
    """A difference of AUCs in points, with its interval and p value."""
    return {
        "difference": round(100 * found.value, 1),
        "low": round(100 * found.low, 1),
        "high": round(100 * found.high, 1),
        "p": round(found.p, 3),
    }


def out_of_fold(cohort: Cohort, bags: Mapping[str, Bag], seed: int) -> OutOfFold:
    """Test predictions of all heads for one seed."""
    recipe, tables = RECIPES[COHORT], []
    for name, options in HEADS.items():
        models = {**recipe.models, "dmin": {**recipe.models["dmin"], **options}}
        cv = cross_validate(
            cohort,
            ["hdmil_dagger"],
            folds=FOLDS,
            seed=seed,
            recipe=replace(recipe, models=models),
            bags=bags,
            workers=1,
            progress=False,
        )
        tables.append(cv.predictions.assign(method=name))
        print(f"seed {seed}, {name}", flush=True)
    return align_methods(pd.concat(tables), cv.cases)


def main() -> None:
    setup()
    cohort = prepare_cohort(COHORT)
    bags = cohort.load_bags()
    slides = {seed: out_of_fold(cohort, bags, seed) for seed in SEEDS}
    result = {
        "cohort": f"{COHORT} (synthetic), {len(cohort)} slides",
        "folds": FOLDS,
        "AUC by seed and fold": {
            name: [[round(auc, 4) for auc in of_seed.fold_aucs(name)] for of_seed in slides.values()]
            for name in HEADS
        },
        "differences in points, by seed": {
            f"{second} minus {first}": [
                percent(compare(of_seed, second, first)) for of_seed in slides.values()
            ]
            for first, second in combinations(HEADS, 2)
        },
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
