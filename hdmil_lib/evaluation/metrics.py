"""Scores of slide predictions (AUC, accuracy) and of tile masks (keep ratio, tumor recall)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hdmil_lib.errors import CohortError


def auc(labels: np.ndarray | Sequence[int], probabilities: np.ndarray) -> float:
    """Area under the ROC curve: of class 1 for two classes, the one-against-rest mean for more.

    Args:
        labels: Class indices (S,).
        probabilities: Class probabilities (S, C).

    Raises:
        CohortError: A class has no slide, so its ROC curve does not exist.
    """
    from sklearn.metrics import roc_auc_score  # takes a second to import

    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    n_classes = probabilities.shape[1]
    absent = sorted(set(range(n_classes)) - set(labels.tolist()))
    if absent:
        raise CohortError(
            f"no AUC: none of the {len(labels)} slides has class {', '.join(map(str, absent))}; "
            "score a set of slides that has every class"
        )
    columns = [1] if n_classes == 2 else range(n_classes)
    return float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in columns]))


def accuracy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Share of slides whose most probable class is their label; labels (S,), probabilities (S, C)."""
    return float(np.mean(np.argmax(probabilities, axis=1) == np.asarray(labels)))


def keep_ratio(mask: np.ndarray) -> float:
    """Share of tiles that at least one branch of a mask (N, C) keeps, or that a mask (N,) keeps."""
    mask = np.asarray(mask, dtype=bool)
    return float(np.mean(mask.reshape(len(mask), -1).any(axis=1)))


def tumor_recall(mask: np.ndarray, tile_labels: np.ndarray, threshold: float = 0.5) -> float:
    """Share of a slide's tumor tiles that at least one branch keeps; nan for a slide without tumor tiles.

    Args:
        mask: Kept tiles, (N, C) or (N,).
        tile_labels: Share of tumor in each tile (N,), from `read_tile_labels`.
        threshold: Smallest share of tumor of a tumor tile.
    """
    tumor = np.asarray(tile_labels) >= threshold
    return keep_ratio(np.asarray(mask)[tumor]) if tumor.any() else float("nan")


def mean_sd(values: Sequence[float], *, percent: bool = True) -> str:
    """Mean and sample standard deviation over folds as the paper prints them: "93.17 (1.83)"."""
    numbers = np.asarray(values, dtype=float) * (100 if percent else 1)
    sd = numbers.std(ddof=1) if len(numbers) > 1 else 0.0
    return f"{numbers.mean():.2f} ({sd:.2f})"


def fold_scores(predictions: pd.DataFrame) -> pd.DataFrame:
    """Scores of each method on each fold's test slides.

    Args:
        predictions: Predictions of `cross_validate`: `method`, `fold`, `label`, `keep_ratio` and one
            probability column `p_<class index>` per class.

    Returns:
        One row per method and fold, in the order of `predictions`: `method`, `fold`, `auc`, `accuracy`,
        `keep_ratio` (mean over slides), `n_slides`.

    Raises:
        CohortError: A class is missing among the test slides of a fold.
    """
    columns = sorted((c for c in predictions if c.startswith("p_")), key=lambda c: int(c[2:]))
    rows = []
    for (method, fold), part in predictions.groupby(["method", "fold"], sort=False):
        labels, probabilities = part["label"].to_numpy(), part[columns].to_numpy()
        rows.append(
            {
                "method": method,
                "fold": fold,
                "auc": auc(labels, probabilities),
                "accuracy": accuracy(labels, probabilities),
                "keep_ratio": part["keep_ratio"].mean(),
                "n_slides": len(part),
            }
        )
    return pd.DataFrame(rows)


def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation of `fold_scores` as text: one row per method, one column per score."""
    return scores.groupby("method", sort=False)[["auc", "accuracy", "keep_ratio"]].agg(mean_sd)
