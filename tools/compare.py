"""All systems on all synthetic cohorts: Tables 1 and 3, statistics, controls, claims and figures.

    python tools/compare.py [--cohorts NAME ...] [--methods NAME ...] [--folds 5] [--seed 0] [--no-controls]

Writes `docs/results/<cohort>/*.csv` (and `.md` beside them), and `build/runs/<cohort>.parquet`, one row per
run and epoch. What is trained is kept in the cache: an interrupted run goes on where it stopped.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from hdmil_lib.bags import Bag
from hdmil_lib.cohort import Cohort
from hdmil_lib.config import setup
from hdmil_lib.evaluation.statistics import format_scores, score_table
from hdmil_lib.methods import title
from hdmil_lib.reproduce.claims import judge_claims
from hdmil_lib.reproduce.keep_ratio import score_by_keep_ratio
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.reproduce.tables import (
    TABLE1_METHODS,
    TABLE3_METHODS,
    add_mask_scores,
    save_table,
    table1,
    table3,
)
from hdmil_lib.storage import write_json
from hdmil_lib.synthetic.cohorts import prepare_cohort
from hdmil_lib.training.crossval import cross_validate
from hdmil_lib.training.runs import save_runs
from hdmil_lib.training.trained import CrossValidation
from hdmil_lib.viz.scores import auc_intervals, score_against_keep_ratio
from hdmil_lib.viz.style import use_style

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
PAPER = {"camelyon-mini": "Camelyon16", "nsclc-mini": "NSCLC", "brca-mini": "BRCA"}
CONTROLS = {
    "color statistics, mean": ("color", "mean"),
    "color statistics, attention": ("color", "abmil_gated"),
    "random encoder, attention": ("efficientnet_lite0_random", "abmil_gated"),
    "permuted labels, attention": (None, "abmil_gated"),
}
"""Name -> (encoder, or None for the default one with permuted labels; method)."""


@dataclass(frozen=True)
class Comparison:
    """One cohort's runs: which, and how many folds."""

    name: str
    methods: tuple[str, ...]
    n_folds: int
    seed: int

    def train(self, cohort: Cohort, bags: Mapping[str, Bag], methods: tuple[str, ...]) -> CrossValidation:
        """Cross-validate these methods."""
        recipe = RECIPES[self.name]
        return cross_validate(cohort, methods, folds=self.n_folds, seed=self.seed, recipe=recipe, bags=bags)

    def controls(self, cohort: Cohort) -> pd.DataFrame:
        """Test predictions of the controls, under their own names."""
        parts = []
        for control, (encoder, method) in CONTROLS.items():
            changed = cohort.permuted(self.seed)
            if encoder is not None:
                changed = prepare_cohort(self.name, encoder=encoder)
            cv = self.train(changed, changed.load_bags(), (method,))
            parts.append(cv.predictions.assign(method=control))
        return pd.concat(parts, ignore_index=True)


def compare(comparison: Comparison, build: Path, controls: bool) -> None:
    """Train, judge and write one cohort."""
    name, out = comparison.name, RESULTS / comparison.name
    cohort = prepare_cohort(name)
    bags, cases = cohort.load_bags(), cohort.case_of
    cv = comparison.train(cohort, bags, comparison.methods)
    predictions = cv.predictions
    (build / "runs").mkdir(parents=True, exist_ok=True)
    save_runs(cv.folder).replace(build / "runs" / f"{name}.parquet")
    masked = add_mask_scores(cv, cohort, bags)
    in_table1 = masked["method"].isin(TABLE1_METHODS)
    save_table(table1(masked[in_table1], cohort=PAPER[name]).drop(columns="s/slide"), out / "table1")
    save_table(table3(masked[masked["method"].isin(TABLE3_METHODS)], cohort=PAPER[name]), out / "table3")
    save_table(judge_claims(masked, cases=cases), out / "claims")
    if "hdmil_evidence" in comparison.methods:
        variant = masked[masked["method"] != "hdmil"].replace({"method": {"hdmil_evidence": "hdmil"}})
        judged = judge_claims(variant, ("loses_little", "keeps_tumor"), cases=cases)
        save_table(judged, out / "claims_evidence")
    curves = {
        title(name): score_by_keep_ratio(cv, cohort, bags, method=name)
        for name in ("hdmil", "hdmil_evidence")
        if name in comparison.methods
    }
    curve = pd.concat(curves, names=["LIPN of"]).groupby(["LIPN of", "source", "keep_ratio"])
    save_table(100 * curve[["auc", "tumor_recall"]].mean(), out / "keep_ratio")
    judged = predictions[predictions["method"].isin(TABLE1_METHODS)]
    scores = score_table(judged, cases=cases)
    if controls:
        hdmil = predictions[predictions["method"] == "hdmil"]
        save_table(format_scores(score_controls(hdmil, comparison.controls(cohort), cases)), out / "controls")
    save_table(format_scores(scores), out / "statistics")
    write_json(
        out / "command.json",
        {
            "command": f"python tools/compare.py --cohorts {name} --folds {comparison.n_folds}",
            "data": f"{len(cohort)} synthetic slides",
            "seed": comparison.seed,
            "seconds of all trainings, one core each": round(training_seconds(cv.folder)),
        },
    )
    draw(out, scores, curves)


def training_seconds(folder: Path) -> float:
    """Seconds of all trainings of a cross-validation, whenever they ran."""
    return sum(json.loads(path.read_text())["seconds"] for path in folder.glob("*/fold*/provenance.json"))


def score_controls(hdmil: pd.DataFrame, controls: pd.DataFrame, cases: Mapping[str, str]) -> pd.DataFrame:
    """Scores of the controls; those on the true labels are compared with HDMIL, on the same slides."""
    permuted = controls["method"].map(lambda name: CONTROLS[name][0] is None)
    table = score_table(pd.concat([hdmil, controls[~permuted]]), cases=cases).drop(index="hdmil")
    parts = [controls[permuted & (controls["method"] == name)] for name in CONTROLS]
    alone = [score_table(part, part["method"].iloc[0], cases=cases) for part in parts if len(part)]
    return pd.concat([table, *alone])


def draw(out: Path, scores: pd.DataFrame, curves: Mapping[str, pd.DataFrame]) -> None:
    """The figures of a cohort."""
    use_style()
    auc_intervals(scores)
    _save(out / "auc.png")
    figure, axes = plt.subplots(
        1, len(curves), figsize=(6 * len(curves), 4), layout="constrained", sharey=True
    )
    for ax, (name, curve) in zip(np.atleast_1d(axes), curves.items(), strict=True):
        score_against_keep_ratio(curve, ax).set_title(name)
    _save(out / "keep_ratio.png")


def _save(path: Path) -> None:
    plt.savefig(path, dpi=110)
    plt.close("all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", nargs="+", choices=PAPER, default=list(PAPER))
    parser.add_argument("--methods", nargs="+", default=list(dict.fromkeys(TABLE1_METHODS + TABLE3_METHODS)))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-controls", action="store_true")
    arguments = parser.parse_args()
    cfg = setup(arguments.seed)
    for name in arguments.cohorts:
        comparison = Comparison(name, tuple(arguments.methods), arguments.folds, arguments.seed)
        compare(comparison, cfg.build, not arguments.no_controls)
        print(f"{name}: {RESULTS / name}", flush=True)


if __name__ == "__main__":
    main()
