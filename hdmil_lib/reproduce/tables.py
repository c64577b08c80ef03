"""The paper's Tables 1 to 3, our results beside the reported ones."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from hdmil_lib.bags import Bag, read_tile_labels
from hdmil_lib.cohort import Cohort
from hdmil_lib.evaluation.metrics import fold_scores, keep_ratio, mean_sd, tumor_recall
from hdmil_lib.methods import METHODS
from hdmil_lib.reproduce.paper import PAPER_TABLE1, PAPER_TABLE2, PAPER_TABLE3
from hdmil_lib.reproduce.timing import stage_medians
from hdmil_lib.training.trained import CrossValidation

TABLE1_METHODS = tuple(name for name in METHODS if not name.startswith("dmin_"))
TABLE3_METHODS = ("dmin_linear", "dmin_no_distillation", "hdmil_dagger", "hdmil")

TIMED = {None: "HDMIL†", "lipn": "HDMIL", "random": "HDMIL"}
"""How a method screens tiles, mapped to the timed method that reads the same number of tiles."""

SHARES = {"tiles read": "keep_ratio", "tiles kept": "kept", "tumor recall": "tumor_recall"}
"""Columns of Table 1 that are shares of tiles, and the columns of the predictions that hold them."""

COMPONENTS = {
    "dmin_linear": "none",
    "dmin_no_distillation": "+CKA",
    "hdmil_dagger": "+SelfDist",
    "hdmil": "+LIPN",
}
"""Rows of Table 3: each method adds a component to the one before."""


def add_mask_scores(cv: CrossValidation, cohort: Cohort, bags: Mapping[str, Bag]) -> pd.DataFrame:
    """Score the masks of a cross-validation on the test slides of each fold.

    Args:
        cv: Cross-validation with "hdmil".
        cohort: Cohort of the cross-validation, whose bag files hold the tile labels.
        bags: Bags by slide_id.

    Returns:
        The predictions with two more columns, which are nan for methods without a mask: `kept`, the share of
        tiles that are kept for at least one branch, by LIPN or, for HDMIL†, by DMIN; and `tumor_recall`, the
        share of the tumor tiles that are kept, nan for slides without tumor. For random tiles, its expected
        value is given, which is the share of tiles that are kept.
    """
    networks = {"hdmil_dagger": "hdmil", "hdmil": "hdmil", "hdmil_evidence": "hdmil_evidence"}
    predictions = cv.predictions
    masked = predictions[predictions["method"].isin(networks)]
    scores = {}
    for (fold, method), part in masked.groupby(["fold", "method"]):
        model = cv.hdmil(fold, networks[method])
        for slide_id in part["slide_id"]:
            mask = model.predict(bags[slide_id], all_tiles=method == "hdmil_dagger").mask
            truth = read_tile_labels(cohort.bag_path(slide_id))
            recall = np.nan if truth is None else tumor_recall(mask, truth)
            scores[method, slide_id] = {"kept": keep_ratio(mask), "tumor_recall": recall}
    table = pd.DataFrame.from_dict(scores, orient="index").rename_axis(["method", "slide_id"])
    predictions = predictions.join(table, on=["method", "slide_id"])
    random = predictions["method"] == "random"
    if random.any():
        has_tumor = predictions["slide_id"].isin(table.dropna().index.get_level_values("slide_id"))
        predictions.loc[random, "kept"] = predictions["keep_ratio"]
        predictions.loc[random & has_tumor, "tumor_recall"] = predictions["keep_ratio"]
    return predictions


def table1(
    predictions: pd.DataFrame, timings: pd.DataFrame | None = None, *, cohort: str = "Camelyon16"
) -> pd.DataFrame:
    """Test scores of each method beside those of the paper (Table 1).

    Args:
        predictions: Predictions of `cross_validate`, or of `add_mask_scores` to include the mask scores.
        timings: Table of `time_slides`. Methods that read every tile get the seconds of HDMIL†, as in the
            paper, because reading and encoding take nearly all the time. A method that chooses tiles itself
            (SMT) gets the seconds of a timed keep ratio within 0.02 of its own.
        cohort: Data set of the paper to compare with: Camelyon16, NSCLC or BRCA.

    Returns:
        Indexed by the methods' titles, in the order of `METHODS`: `AUC` and `ACC` as text, "mean (sd)" over
        folds in percent; `tiles read`, `tiles kept` and `tumor recall`, means over slides in percent;
        `s/slide`; and the figures of the paper. Numbers are nan where there are none.

    Raises:
        CohortError: A class is missing among the test slides of a fold.
    """
    scores = fold_scores(predictions)
    medians = None if timings is None else stage_medians(timings)
    means = predictions.groupby("method").mean(numeric_only=True)
    rows = {}
    for name, method in METHODS.items():
        part = scores[scores["method"] == name]
        if part.empty:
            continue
        rows[method.title] = {
            "AUC": mean_sd(part["auc"]),
            "ACC": mean_sd(part["accuracy"]),
            **{title: 100 * means.get(column, {}).get(name, np.nan) for title, column in SHARES.items()},
            "s/slide": _seconds(method.screen, means.loc[name, "keep_ratio"], medians),
        }
    ours = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    return ours.join(PAPER_TABLE1.loc[cohort].add_prefix("paper "))


def _seconds(screen: str | None, share: float, medians: pd.DataFrame | None) -> float:
    """Seconds per slide of a method that reads this share of the tiles; nan where none were measured."""
    if medians is None:
        return np.nan
    if screen in TIMED and (screen is not None or share == 1):
        return medians["total"].get(TIMED[screen], np.nan)
    near = medians[(medians["keep_ratio"] - share).abs() <= 0.02]
    return near["total"].iloc[0] if screen is None and len(near) else np.nan


def table2(timings: pd.DataFrame) -> pd.DataFrame:
    """Seconds per slide by stage, ours above those of the paper (Table 2).

    Args:
        timings: Table of `time_slides`.

    Returns:
        Indexed by (cohort, method), with "here" as the cohort of our rows: the columns of `stage_medians`,
        and `saved`, the saved time in percent of that of HDMIL†; nan where the paper gives no figure.
    """
    paper = PAPER_TABLE2.copy()
    dagger = paper["total"].xs("HDMIL†", level="method")
    paper["time_ratio"] = paper["total"] / dagger.reindex(paper.index, level="cohort")
    ours = pd.concat({"here": stage_medians(timings)}, names=["cohort"])
    both = pd.concat([ours, paper])
    both["saved"] = 100 * (1 - both["time_ratio"])
    return both


def table3(predictions: pd.DataFrame, *, cohort: str = "Camelyon16") -> pd.DataFrame:
    """Test scores as components are added, beside the validation scores of the paper (Table 3).

    Args:
        predictions: Predictions of `cross_validate` for the methods of `COMPONENTS`.
        cohort: Data set of the paper to compare with: Camelyon16, NSCLC or BRCA.

    Returns:
        Indexed by component: `AUC` and `ACC` as text, "mean (sd)" over folds; the means of the paper. All are
        in percent.
    """
    scores = fold_scores(predictions).groupby("method")[["auc", "accuracy"]].agg(mean_sd)
    ours = scores.reindex([name for name in COMPONENTS if name in scores.index]).rename(index=COMPONENTS)
    ours = ours.set_axis(["AUC", "ACC"], axis=1)
    return ours.rename_axis("components").join(PAPER_TABLE3.loc[cohort].add_prefix("paper "))


def to_markdown(table: pd.DataFrame) -> str:
    """A table with its index as Markdown: numbers have two decimals, nan is "-"."""
    cells = table.reset_index().astype(object).map(_cell)
    lines = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.2f}"
    return str(value)


def save_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write `<path>.csv`, and `<path>.md` for readers."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path.with_suffix(".csv"))
    path.with_suffix(".md").write_text(to_markdown(table), encoding="utf-8")
