"""The predictions of a cross-validation, checked and brought into the same order for every method."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hdmil_lib.errors import CohortError
from hdmil_lib.evaluation.metrics import auc


@dataclass(frozen=True)
class OutOfFold:
    """What several methods predict for the same S test slides; row i is the same slide in all of it.

    Attributes:
        slide_ids: (S,).
        folds: Fold that tests on the slide (S,).
        labels: Class indices (S,).
        cases: Case of each slide (S,).
        probabilities: Class probabilities (S, C) by method, in the order of the table.
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
    """Bring the predictions of all methods into the same order of slides.

    Args:
        predictions: What `run_crossval` returns: `method`, `fold`, `slide_id`, `label` and one probability
            column `p_<class index>` a class.
        cases: Case by slide_id; default: the column `case_id`, or where there is none each slide by itself.

    Raises:
        CohortError: A column is missing, a label or probability is impossible, a fold's test slides miss a
            class, or the methods were not tested on the same slides, each once.
    """
    columns = _class_columns(predictions)
    _check_values(predictions, columns)
    tables = {
        str(method): part.set_index("slide_id").sort_index()
        for method, part in predictions.groupby("method", sort=False)
    }
    first, reference = next(iter(tables.items()))
    for method, table in tables.items():
        unequal = set(table.index) ^ set(reference.index)
        if not unequal:
            same = (table[["fold", "label"]] == reference[["fold", "label"]]).all(axis=1)
            unequal = set(table.index[~same])
        if unequal:
            raise CohortError(
                f"methods '{first}' and '{method}' were not tested on the same slides, in the same folds and "
                f"with the same labels: {_some(unequal)} differ; compare methods of one cross-validation"
            )
    for fold, part in reference.groupby("fold"):
        if absent := sorted(set(range(len(columns))) - set(part["label"])):
            raise CohortError(
                f"fold {fold}: none of its {len(part)} test slides has class {_some(absent)}, so there is no "
                "AUC; use fewer folds"
            )
    return OutOfFold(
        reference.index.to_numpy(),
        reference["fold"].to_numpy(),
        reference["label"].to_numpy(),
        case_ids(reference.reset_index(), cases),
        {method: table[columns].to_numpy(float) for method, table in tables.items()},
    )


def case_ids(table: pd.DataFrame, cases: Mapping[str, str] | None = None) -> np.ndarray:
    """The case of each row of a table: from `cases`, its column `case_id`, or its `slide_id`.

    Raises:
        CohortError: `cases` lacks a slide.
    """
    if cases is None:
        return table["case_id" if "case_id" in table else "slide_id"].to_numpy()
    if missing := set(table["slide_id"]) - set(cases):
        raise CohortError(f"cases: no case for slide {_some(missing)}; give a case for each slide")
    return table["slide_id"].map(cases).to_numpy()


def _class_columns(predictions: pd.DataFrame) -> list[str]:
    columns = sorted((c for c in predictions if c.startswith("p_")), key=lambda c: int(c[2:]))
    missing = [c for c in ("method", "fold", "slide_id", "label", "p_0", "p_1") if c not in predictions]
    if missing or predictions.empty:
        raise CohortError(
            f"predictions: {len(predictions)} rows, without column {_some(missing) or '-'}; give what "
            "run_crossval returns"
        )
    return columns


def _check_values(predictions: pd.DataFrame, columns: list[str]) -> None:
    checks = {
        "has a probability that is nan or outside [0, 1]; train that fold again": ~(
            predictions[columns].ge(0) & predictions[columns].le(1)
        ).all(axis=1),
        f"has a label outside 0 to {len(columns) - 1}; give class indices": ~predictions["label"].isin(
            range(len(columns))
        ),
        "is tested more than once; score one cross-validation at a time": predictions.duplicated(
            ["method", "slide_id"]
        ),
    }
    for problem, wrong in checks.items():
        if wrong.any():
            row = predictions[wrong].iloc[0]
            raise CohortError(
                f"method '{row['method']}', fold {row['fold']}: slide {row['slide_id']} {problem}"
            )


def _some(names: Iterable, limit: int = 3) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
