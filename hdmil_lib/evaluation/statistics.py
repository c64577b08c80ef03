"""What stands behind the means of a results table: intervals, paired tests, calibration.

A cross-validation scores every slide once, by the model of the fold that tests on it. Two AUCs follow.
The *pooled* one ranks the slides of all folds together and so assumes that the folds' models share a scale:
where they do not, it falls although no model ranks worse. The one *within folds* compares only slides that
one model scored, and is averaged over folds: the mean AUC of the paper's tables. `score_table` states both,
and compares methods within folds, because a comparison of rankings should not turn on calibration.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from hdmil_lib.errors import CohortError
from hdmil_lib.evaluation.auc_tests import Difference, Interval, auc_interval, delong, paired_permutation
from hdmil_lib.evaluation.reliability import brier_score, expected_calibration_error, reliability
from hdmil_lib.evaluation.metrics import accuracy, fold_scores
from hdmil_lib.evaluation.out_of_fold import OutOfFold, align_methods
from hdmil_lib.methods import title

SIGNIFICANT = 0.05
"""Adjusted p values below it are marked in tables and figures."""


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjustment of the p values (M,) of M tests; nan is no test and stays nan."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values, kind="stable")[: np.isfinite(p_values).sum()]
    adjusted = np.full(p_values.shape, np.nan)
    steps = np.arange(len(order), 0, -1) * p_values[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def compare(
    slides: OutOfFold,
    method: str,
    reference: str,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """A method's mean AUC over folds less that of a reference, with interval and p value.

    By DeLong's test within folds for two classes, one slide a case, and two slides of each class a fold;
    otherwise by the paired bootstrap and the paired permutation test, over cases.
    """
    labels, folds, cases = slides.labels, slides.folds, slides.cases
    ours, theirs = slides.probabilities[method], slides.probabilities[reference]
    independent = len(np.unique(cases)) == len(cases)
    smallest = pd.DataFrame({"fold": folds, "label": labels}).value_counts().min()
    if ours.shape[1] == 2 and independent and smallest >= 2:
        return delong(labels, ours[:, 1], theirs[:, 1], folds=folds, level=level)
    options = {"folds": folds, "cases": cases, "n_resamples": n_resamples, "seed": seed}
    interval = auc_interval(labels, ours, theirs, level=level, **options)
    return Difference(*interval, paired_permutation(labels, ours, theirs, **options))


def score_table(
    predictions: pd.DataFrame,
    reference: str = "hdmil",
    *,
    cases: Mapping[str, str] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    bins: int = 10,
) -> pd.DataFrame:
    """All scores of all methods, and their differences to a reference.

    Args:
        predictions: What `run_crossval` returns.
        reference: Method that the others are compared with.
        cases: Case by slide_id, for cases of several slides; see `align_methods`.
        level: Of confidence.
        n_resamples: Of bootstrap and permutation test.
        seed: Of the same.
        bins: Of the calibration error, with as many slides each.

    Returns:
        Indexed by method in the order of `predictions`: `auc` and `auc_sd` (mean and deviation over folds);
        `pooled_auc`, `pooled_low`, `pooled_high`; `accuracy`, `balanced_accuracy`, `f1` (macro), `ece`,
        `brier` (over all slides); `difference`, `difference_low`, `difference_high` (of `auc`, from
        `compare`), `p`, and `p_holm`, adjusted over the methods compared; nan for the reference.

    Raises:
        CohortError: The reference is missing, or `align_methods` cannot make sense of the predictions.
    """
    slides = align_methods(predictions, cases)
    if reference not in slides.probabilities:
        raise CohortError(
            f"reference '{reference}' has no predictions; choose from {', '.join(slides.probabilities)}"
        )
    options = {"level": level, "n_resamples": n_resamples, "seed": seed}
    rows = {}
    for method, probabilities in slides.probabilities.items():
        folds = slides.fold_aucs(method)
        pooled = auc_interval(slides.labels, probabilities, cases=slides.cases, **options)
        none = Difference(*[np.nan] * 4)
        difference = none if method == reference else compare(slides, method, reference, **options)
        rows[method] = {
            "auc": np.mean(folds),
            "auc_sd": np.std(folds, ddof=1) if len(folds) > 1 else 0.0,
            **dict(zip(("pooled_auc", "pooled_low", "pooled_high"), pooled, strict=True)),
            **_slide_scores(slides.labels, probabilities, bins),
            **dict(zip(("difference", "difference_low", "difference_high", "p"), difference, strict=True)),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    return table.assign(p_holm=holm(table["p"]))


def _slide_scores(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> dict[str, float]:
    from sklearn.metrics import balanced_accuracy_score, f1_score  # takes a second to import

    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": accuracy(labels, probabilities),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "f1": f1_score(labels, predicted, average="macro"),
        "ece": expected_calibration_error(labels, probabilities, bins=bins),
        "brier": brier_score(labels, probabilities),
    }


def summary_table(
    predictions: pd.DataFrame,
    cases: Mapping[str, str] | None = None,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """The scores that a user asks for first, in percent, by the titles of the methods.

    Args:
        predictions: Predictions of `cross_validate`.
        cases: Case by slide_id, for cases of several slides.
        level: Confidence level of the intervals.
        n_resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        `AUC` and `ACC`, means over folds; `AUC low` and `AUC high`, the bootstrap interval of that mean over
        test slides, drawn by case; `tiles read`.

    Raises:
        CohortError: A fold's test slides miss a class, or the methods were not tested on the same slides.
    """
    slides = align_methods(predictions, cases)
    means = fold_scores(predictions).groupby("method")[["accuracy", "keep_ratio"]].mean()
    rows = {}
    for method, probabilities in slides.probabilities.items():
        interval = auc_interval(
            slides.labels,
            probabilities,
            folds=slides.folds,
            cases=slides.cases,
            level=level,
            n_resamples=n_resamples,
            seed=seed,
        )
        rows[title(method)] = {
            "AUC": 100 * interval.value,
            "AUC low": 100 * interval.low,
            "AUC high": 100 * interval.high,
            "ACC": 100 * means.loc[method, "accuracy"],
            "tiles read": 100 * means.loc[method, "keep_ratio"],
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def format_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """A `score_table` as text to print, by the methods' titles: in percent, "value (low to high)"."""

    def interval(columns: tuple[str, str, str], sign: str = "") -> list[str]:
        numbers = 100 * scores[list(columns)].to_numpy()
        return [
            "-" if np.isnan(v) else f"{v:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"
            for v, low, high in numbers
        ]

    text = pd.DataFrame(index=pd.Index([title(name) for name in scores.index], name="method"))
    means = zip(100 * scores["auc"], 100 * scores["auc_sd"], strict=True)
    text["AUC, mean (sd)"] = [f"{mean:.2f} ({sd:.2f})" for mean, sd in means]
    text["AUC, pooled"] = interval(("pooled_auc", "pooled_low", "pooled_high"))
    names = {"accuracy": "ACC", "balanced_accuracy": "balanced ACC", "f1": "F1", "ece": "ECE"}
    for column, name in names.items():
        text[name] = [f"{100 * value:.2f}" for value in scores[column]]
    text["Brier"] = [f"{value:.3f}" for value in scores["brier"]]
    text["difference of AUC"] = interval(("difference", "difference_low", "difference_high"), "+")
    text["p"] = [format_p(p) for p in scores["p"]]
    text["p (Holm)"] = [format_p(p) for p in scores["p_holm"]]
    return text


def format_p(p: float) -> str:
    """A p value as printed: three decimals, "<0.001", "-" for nan."""
    return "-" if np.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"
