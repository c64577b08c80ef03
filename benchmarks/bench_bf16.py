"""What does training in bfloat16 do to the AUC?

    python benchmarks/bench_bf16.py [--methods abmil_gated hdmil_dagger]

Every method is cross-validated on `camelyon-mini` (synthetic) once in float32 and once with
`TrainSettings.precision = "bf16"`, for three seeds of folds, weights and training: autocast to bfloat16 with
weights, optimizer and losses in float32. On a GPU with matrix units for bfloat16 that halves what is read and
written. A CPU shows its effect on accuracy alone: its seconds say nothing about a GPU. Rounding leads each
training elsewhere, so the mean change is to be read beside its standard error over the 15 pairs of trainings.
Results go to `benchmarks/results/bf16.json`.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from hdmil_lib import devices
from hdmil_lib.config import setup
from hdmil_lib.evaluation.metrics import fold_scores
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.reproduce.tables import to_markdown
from hdmil_lib.synthetic.cohorts import prepare_cohort
from hdmil_lib.training.crossval import cross_validate

RESULTS = Path(__file__).resolve().parent / "results" / "bf16.json"
COHORT, FOLDS, SEEDS = "camelyon-mini", 5, (0, 1, 2)
METHODS = ("abmil_gated", "clam_mb", "hdmil_dagger")


def aucs(method: str, precision: str, workers: int) -> list[float]:
    """Test AUC of each seed and fold, in percent."""
    cohort, recipe, found = prepare_cohort(COHORT, progress=False), RECIPES[COHORT], []
    recipe = replace(recipe, training=replace(recipe.training, precision=precision))
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as out:
            options = {"recipe": recipe, "seed": seed, "workers": workers, "progress": False}
            cv = cross_validate(cohort, [method], folds=FOLDS, out=out, **options)
            found += [round(100 * auc, 2) for auc in fold_scores(cv.predictions)["auc"]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    setup()
    rows = {}
    for method in arguments.methods:
        wide, narrow = (aucs(method, p, arguments.workers) for p in ("fp32", "bf16"))
        change = pd.Series(narrow) - pd.Series(wide)
        rows[method] = {
            "fp32, mean AUC": round(float(pd.Series(wide).mean()), 2),
            "bf16, mean AUC": round(float(pd.Series(narrow).mean()), 2),
            "mean change": round(float(change.mean()), 2),
            "standard error": round(float(change.sem()), 2),
            "fp32, AUC of each training": wide,
            "bf16, AUC of each training": narrow,
        }
        print(method, rows[method], flush=True)
    result = {
        "cohort": f"{COHORT} (synthetic)",
        "device": devices.name(devices.resolve()),
        "torch": torch.__version__,
        "folds": FOLDS,
        "seeds": len(SEEDS),
        "methods": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(to_markdown(pd.DataFrame(rows).T.iloc[:, :4]))


if __name__ == "__main__":
    main()
