"""The predictions of a cross-validation, checked, with the slides in the same order for every method."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hdmil_lib.errors import CohortError
from hdmil_lib.evaluation.metrics import auc


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of several methods for the same S test slides; row i is the same slide in every array.

    Where the test parts of folds overlap, a slide has one row per fold in which it is tested.

    Attributes:
        slide_ids: Names of the slides (S,).
        folds: Fold of each row (S,).
        labels: Class indices (S,).
        cases: Case of each slide (S,).
        probabilities: Class probabilities (S, C) by method, in the order of the predictions.
    """

    slide_ids: np.ndarray
    folds: np.ndarray
    labels: np.ndarray
    cases: np.ndarray
    probabilities: dict[str, np.ndarray]

    def fold_aucs(self, method: str) -> list[float]:
        """AUC of a method on each fold's test slides."""
        parts = [self.folds == fold for fold in np.unique(self.folds)]
        return [auc(self.labels[part], self.probabilities[method][part]) for part in parts]


def align_methods(predictions: pd.DataFrame, cases: Mapping[str, str] | None = None) -> OutOfFold:
    """Check the predictions of all methods and bring them into the same order of slides.

    Args:
        predictions: Predictions of `cross_validate`: `method`, `fold`, `slide_id`, `label` and one
            probability column `p_<class index>` per class.
        cases: Case by slide_id. By default the column `case_id`; without it, each slide is a case of its own.

    Raises:
        CohortError: A column is missing, a label or probability is out of range, a class is missing among the
            test slides of a fold, or the methods were not tested on the same slides, once per fold.
    """
    columns = _class_columns(predictions)
    _check_values(predictions, columns)
    tables = {
        str(method): part.set_index(["slide_id", "fold"], drop=False).sort_index()
        for method, part in predictions.groupby("method", sort=False)
    }
    first, reference = next(iter(tables.items()))
    for method, table in tables.items():
        unequal = {slide_id for slide_id, _ in set(table.index) ^ set(reference.index)}
        if not unequal:
            unequal = set(table["slide_id"][table["label"] != reference["label"]])
        if unequal:
            raise CohortError(
                f"methods '{first}' and '{method}' were not tested on the same slides, in the same folds and "
                f"with the same labels: {_some(unequal)} differ; compare methods of the same cross-validation"
            )
    reference = reference.reset_index(drop=True)
    for fold, part in reference.groupby("fold"):
        if absent := sorted(set(range(len(columns))) - set(part["label"])):
            raise CohortError(
                f"fold {fold}: none of its {len(part)} test slides has class {_some(absent)}, so there is no "
                "AUC; use fewer folds or more slides"
            )
    return OutOfFold(
        reference["slide_id"].to_numpy(),
        reference["fold"].to_numpy(),
        reference["label"].to_numpy(),
        case_ids(reference, cases),
        {method: table[columns].to_numpy(float) for method, table in tables.items()},
    )


def case_ids(table: pd.DataFrame, cases: Mapping[str, str] | None = None) -> np.ndarray:
    """The case of each row of a table: from `cases`, else from its column `case_id`, else its `slide_id`.

    Raises:
        CohortError: `cases` lacks a slide.
    """
    if cases is None:
        return table["case_id" if "case_id" in table else "slide_id"].to_numpy()
    if missing := set(table["slide_id"]) - set(cases):
        raise CohortError(f"cases: no case for slide {_some(missing)}; name a case for every slide")
    return table["slide_id"].map(cases).to_numpy()


def _class_columns(predictions: pd.DataFrame) -> list[str]:
    columns = sorted((c for c in predictions if c.startswith("p_")), key=lambda c: int(c[2:]))
    missing = [c for c in ("method", "fold", "slide_id", "label", "p_0", "p_1") if c not in predictions]
    if missing or predictions.empty:
        problem = f"without column {_some(missing)}" if missing else "with 0 rows"
        raise CohortError(f"predictions {problem}; give the predictions of cross_validate")
    return columns


def _check_values(predictions: pd.DataFrame, columns: list[str]) -> None:
    checks = {
        "has a probability that is nan or outside [0, 1]; train this fold again": ~(
            predictions[columns].ge(0) & predictions[columns].le(1)
        ).all(axis=1),
        f"has a label outside 0 to {len(columns) - 1}; give class indices": ~predictions["label"].isin(
            range(len(columns))
        ),
        "is tested more than once in it; score one cross-validation at a time": predictions.duplicated(
            ["method", "fold", "slide_id"]
        ),
    }
    for problem, wrong in checks.items():
        if wrong.any():
            row = predictions[wrong].iloc[0]
            raise CohortError(
                f"method '{row['method']}', fold {row['fold']}: slide {row['slide_id']} {problem}"
            )


def _some(names: Iterable[object], limit: int = 3) -> str:
    texts = sorted(map(str, names))
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")
