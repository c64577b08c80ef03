"""Calibration of predicted probabilities: reliability, expected calibration error, Brier score."""

import numpy as np
import pandas as pd


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 10, equal_mass: bool = True
) -> pd.DataFrame:
    """Predicted probability against observed frequency, in bins of slides.

    For two classes the probability of class 1 is compared with the frequency of class 1; for more, the
    probability of the most probable class with the accuracy (Guo et al., ICML 2017).

    Args:
        labels: Class indices (S,).
        probabilities: Class probabilities (S, C).
        bins: Number of bins; there are fewer rows where probabilities coincide or bins are empty.
        equal_mass: Whether bins have equal numbers of slides, which suits a few hundred slides, or equal
            widths on [0, 1].

    Returns:
        One row per bin, by rising probability: `predicted` and `observed`, means over its slides, and
        `n_slides`.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, float)
    if probabilities.shape[1] == 2:
        predicted, observed = probabilities[:, 1], labels == 1
    else:
        predicted, observed = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    shares = np.linspace(0, 1, bins + 1)[1:-1]
    edges = np.quantile(predicted, shares) if equal_mass else shares
    slides = pd.DataFrame({"predicted": predicted, "observed": observed.astype(float), "n_slides": 1})
    means = {"predicted": "mean", "observed": "mean", "n_slides": "size"}
    return slides.groupby(np.searchsorted(edges, predicted)).agg(means).reset_index(drop=True)


def expected_calibration_error(
    labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 10, equal_mass: bool = True
) -> float:
    """Mean over slides of |predicted - observed| in the slide's bin of `reliability`.

    It depends on the bins, and on few slides it is above zero even for perfect probabilities: by about
    0.8 sqrt(p (1 - p) / n) with n slides per bin. Compare it only for the same slides and bins.
    """
    table = reliability(labels, probabilities, bins=bins, equal_mass=equal_mass)
    return float(np.average((table["predicted"] - table["observed"]).abs(), weights=table["n_slides"]))


def brier_score(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean squared error of probabilities (S, C): of class 1 for two classes, else summed over classes."""
    probabilities = np.asarray(probabilities, float)
    n_classes = probabilities.shape[1]
    squares = (probabilities - np.eye(n_classes)[np.asarray(labels)]) ** 2
    return float(squares.sum(axis=1).mean() / (2 if n_classes == 2 else 1))
