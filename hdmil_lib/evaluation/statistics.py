"""Scores of all methods of a cross-validation, with confidence intervals and adjusted p values.

A cross-validation scores every slide once, with the model of the fold in which it is a test slide. There are
two AUCs for this. The *pooled* AUC ranks the slides of all folds together. It assumes that the models of the
folds share a scale; where they do not, it is lower although no model ranks its slides worse. The AUC *within
folds* ranks only slides that the same model scored, and is averaged over folds: it is the mean AUC of the
paper's tables. `score_table` has both, and compares methods within folds, so that the comparison does not
depend on calibration.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from hdmil_lib.errors import CohortError
from hdmil_lib.evaluation.auc_tests import Difference, auc_interval, delong, paired_permutation
from hdmil_lib.evaluation.metrics import accuracy, fold_scores
from hdmil_lib.evaluation.out_of_fold import OutOfFold, align_methods
from hdmil_lib.evaluation.reliability import brier_score, expected_calibration_error
from hdmil_lib.methods import title

SIGNIFICANT = 0.05
"""Adjusted p values below this are marked in tables and figures."""


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjust the p values (M,) of M tests by Holm's method; nan, which stands for no test, stays nan."""
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
    """A method's mean AUC over folds minus that of a reference, with interval and p value.

    DeLong's test within folds is used for two classes if every case has one slide and every fold at least two
    slides of each class; otherwise the paired bootstrap and the paired permutation test over cases.
    """
    labels, folds, cases = slides.labels, slides.folds, slides.cases
    ours, theirs = slides.probabilities[method], slides.probabilities[reference]
    independent = len(np.unique(cases)) == len(cases)
    smallest = pd.DataFrame({"fold": folds, "label": labels}).value_counts().min()
    if ours.shape[1] == 2 and independent and smallest >= 2:
        return delong(labels, ours[:, 1], theirs[:, 1], folds=folds, level=level)
    interval = auc_interval(
        labels, ours, theirs, folds=folds, cases=cases, level=level, n_resamples=n_resamples, seed=seed
    )
    p = paired_permutation(labels, ours, theirs, folds=folds, cases=cases, n_resamples=n_resamples, seed=seed)
    return Difference(*interval, p)


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
        predictions: Predictions of `cross_validate`.
        reference: Method that the others are compared with.
        cases: Case by slide_id, for cases of several slides; see `align_methods`.
        level: Confidence level.
        n_resamples: Number of samples of the bootstrap and of the permutation test.
        seed: Seed of the bootstrap and of the permutation test.
        bins: Number of bins of the calibration error.

    Returns:
        Indexed by method in the order of `predictions`: `auc` and `auc_sd` (mean and standard deviation over
        folds); `pooled_auc`, `pooled_low`, `pooled_high`; `accuracy`, `balanced_accuracy`, `f1` (macro),
        `ece`, `brier` (over all slides); `difference`, `difference_low`, `difference_high` (of `auc`, from
        `compare`), `p`, and `p_holm`, adjusted over the methods compared. The differences and p values of the
        reference are nan.

    Raises:
        CohortError: The reference has no predictions, or `align_methods` rejects the predictions.
    """
    slides = align_methods(predictions, cases)
    if reference not in slides.probabilities:
        raise CohortError(
            f"reference '{reference}' has no predictions; choose from {', '.join(slides.probabilities)}"
        )
    rows = {}
    for method, probabilities in slides.probabilities.items():
        folds = slides.fold_aucs(method)
        pooled = auc_interval(
            slides.labels, probabilities, cases=slides.cases, level=level, n_resamples=n_resamples, seed=seed
        )
        difference = Difference(*[np.nan] * 4)
        if method != reference:
            difference = compare(slides, method, reference, level=level, n_resamples=n_resamples, seed=seed)
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
    """AUC, accuracy and share of tiles read of all methods, in percent.

    Args:
        predictions: Predictions of `cross_validate`.
        cases: Case by slide_id, for cases of several slides.
        level: Confidence level of the intervals.
        n_resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        Indexed by the methods' titles: `AUC` and `ACC`, means over folds; `AUC low` and `AUC high`, the
        interval of the mean AUC from a bootstrap of the cases; `tiles read`.

    Raises:
        CohortError: `align_methods` rejects the predictions.
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
    """A `score_table` as text, indexed by the methods' titles: in percent, as "value (low to high)"."""

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
    """A p value as text: three decimals, "<0.001" if smaller, "-" for nan."""
    return "-" if np.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"
