"""The paper's Tables 1 to 3 with our figures beside its own."""

from pathlib import Path

import numpy as np
import pandas as pd

from hdmil_lib.evaluation.metrics import fold_scores, mean_sd
from hdmil_lib.evaluation.paper import PAPER_TABLE1, PAPER_TABLE2, PAPER_TABLE3
from hdmil_lib.evaluation.timing import stage_medians
from hdmil_lib.training.crossval import METHODS

COMPONENTS = {
    "dmin_linear": "none",
    "dmin_no_distillation": "+CKA",
    "hdmil_dagger": "+SelfDist",
    "hdmil": "+LIPN",
}
"""Methods of `run_crossval` as rows of Table 3: each adds a component to the row before."""


def table1(
    predictions: pd.DataFrame, timings: pd.DataFrame | None = None, *, cohort: str = "Camelyon16"
) -> pd.DataFrame:
    """Test scores of each method beside the paper's (Table 1).

    Args:
        predictions: From `run_crossval`. Where a column `tumor_recall` was added to them, it is shown.
        timings: From `time_slides`. Methods that need every tile get the seconds of HDMIL†, as in the paper:
            reading and encoding take nearly all of them.
        cohort: The paper's data set to compare with: Camelyon16, NSCLC or BRCA.

    Returns:
        Indexed by the methods' titles, in the order of `METHODS`. As text "mean (sd)" over folds in percent:
        AUC, ACC. In percent: keep ratio, and tumor recall over the slides that have tumor. Then seconds a
        slide and the paper's figures; nan where there is none.

    Raises:
        CohortError: A fold's test slides miss a class.
    """
    scores = fold_scores(predictions)
    totals = {} if timings is None else stage_medians(timings)["total"]
    rows = {}
    for name, method in METHODS.items():
        part = scores[scores["method"] == name]
        if part.empty:
            continue
        rows[method.title] = {
            "AUC": mean_sd(part["auc"]),
            "ACC": mean_sd(part["accuracy"]),
            "keep ratio": 100 * part["keep_ratio"].mean(),
            "tumor recall": 100 * _tumor_recall(predictions, name),
            "s/slide": totals.get("HDMIL" if method.screen else "HDMIL†", np.nan),
        }
    ours = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    return ours.join(PAPER_TABLE1.loc[cohort].add_prefix("paper "))


def _tumor_recall(predictions: pd.DataFrame, method: str) -> float:
    if "tumor_recall" not in predictions:
        return np.nan
    return predictions.loc[predictions["method"] == method, "tumor_recall"].mean()


def table2(timings: pd.DataFrame) -> pd.DataFrame:
    """Seconds a slide by stage, ours above the paper's (Table 2).

    Args:
        timings: From `time_slides`.

    Returns:
        Indexed by (cohort, method), ours as cohort "here": the columns of `stage_medians` and `saved`, the
        percent of the time of HDMIL† that is saved; nan where the paper gives no figure.
    """
    paper = PAPER_TABLE2.copy()
    dagger = paper["total"].xs("HDMIL†", level="method")
    paper["time_ratio"] = paper["total"] / dagger.reindex(paper.index, level="cohort")
    ours = pd.concat({"here": stage_medians(timings)}, names=["cohort"])
    both = pd.concat([ours, paper])
    both["saved"] = 100 * (1 - both["time_ratio"])
    return both


def table3(predictions: pd.DataFrame, *, cohort: str = "Camelyon16") -> pd.DataFrame:
    """Test scores as components are added, beside the paper's validation scores (Table 3).

    Args:
        predictions: From `run_crossval`, with the `COMPONENTS` as methods.
        cohort: The paper's data set to compare with.

    Returns:
        Indexed by component: AUC and ACC as text "mean (sd)" over folds, the paper's means; all in percent.
    """
    scores = fold_scores(predictions).groupby("method")[["auc", "accuracy"]].agg(mean_sd)
    ours = scores.reindex([name for name in COMPONENTS if name in scores.index]).rename(index=COMPONENTS)
    ours = ours.set_axis(["AUC", "ACC"], axis=1)
    return ours.rename_axis("components").join(PAPER_TABLE3.loc[cohort].add_prefix("paper "))


def to_markdown(table: pd.DataFrame) -> str:
    """The table with its index as Markdown: numbers with two decimals, "-" for nan."""
    cells = table.reset_index().astype(object).map(_cell)
    lines = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.2f}"
    return str(value)


def save_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write `<path>.csv` and, for reading, `<path>.md` beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path.with_suffix(".csv"))
    path.with_suffix(".md").write_text(to_markdown(table))
