"""A trained model on the slides of a labeled cohort: predictions, and scores by slide and by patient."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from hdmil_lib.bags import read_bag
from hdmil_lib.errors import CohortError
from hdmil_lib.evaluation.auc_tests import Interval, auc_interval
from hdmil_lib.evaluation.metrics import accuracy
from hdmil_lib.evaluation.reliability import brier_score, expected_calibration_error
from hdmil_lib.inference.slides import running_on

if TYPE_CHECKING:
    from hdmil_lib.cohort import Cohort
    from hdmil_lib.models import HDMIL


def evaluate(
    model: "HDMIL",
    cohort: "Cohort",
    *,
    all_tiles: bool = False,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> pd.DataFrame:
    """Classify all slides of a cohort from their bags.

    Args:
        model: The model; its classes and those of the cohort have the same names.
        cohort: Labels and bags; labels may lack some of the model's classes.
        all_tiles: Whether every tile is used (HDMIL†).
        device: Device of the networks, as `HDMIL.predict` takes it.
        progress: Whether a bar is shown.

    Returns:
        One row per slide: `slide_id`, `case_id`, `label` (class index of the model), `predicted`, one column
        `p_<class index>` per class, `n_tiles`, `n_read` and `keep_ratio`.

    Raises:
        CohortError: A class of the cohort is unknown to the model.
        BagError: A bag is of another encoder, or damaged.
    """
    unknown = sorted(set(cohort.classes) - set(model.classes))
    if unknown:
        raise CohortError(
            f"the model does not know class {', '.join(map(repr, unknown))}: its classes are "
            f"{', '.join(model.classes)}; rename the labels of the cohort"
        )
    rows = []
    table = cohort.table.set_index("slide_id")
    with running_on(model, device):
        for slide_id in tqdm(cohort.slide_ids, desc="slides", disable=not progress):
            prediction = model.predict(read_bag(cohort.bag_path(slide_id)), all_tiles=all_tiles)
            rows.append(
                {
                    "slide_id": slide_id,
                    "case_id": table.loc[slide_id, "case_id"],
                    "label": model.classes.index(cohort.classes[cohort.label_of[slide_id]]),
                    "predicted": int(prediction.probabilities.argmax()),
                    **{f"p_{c}": float(p) for c, p in enumerate(prediction.probabilities)},
                    "n_tiles": prediction.n_tiles,
                    "n_read": prediction.n_read,
                    "keep_ratio": prediction.n_read / prediction.n_tiles,
                }
            )
    return pd.DataFrame(rows)


def by_patient(predictions: pd.DataFrame) -> pd.DataFrame:
    """Predictions of slides as predictions of patients.

    The probabilities of a patient are the mean over the patient's slides; the label is the highest class
    index among them, so that a patient with one tumor slide has tumor.

    Args:
        predictions: Of `evaluate`.

    Returns:
        The same columns without `slide_id`, one row per patient in the order of their first slides.
    """
    columns = _probability_columns(predictions)
    groups = predictions.groupby("case_id", sort=False)
    patients = groups[columns].mean()
    patients.insert(0, "label", groups["label"].max())
    patients.insert(1, "predicted", patients[columns].to_numpy().argmax(1))
    patients[["n_tiles", "n_read"]] = groups[["n_tiles", "n_read"]].sum()
    patients["keep_ratio"] = patients["n_read"] / patients["n_tiles"]
    return patients.reset_index()


def scores_of(
    predictions: pd.DataFrame, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Scores of the rows of `evaluate` or `by_patient`.

    Args:
        predictions: The rows.
        level: Confidence level of the interval of the AUC, from a bootstrap of the patients.
        n_resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        `n`, `AUC`, `AUC low`, `AUC high` (nan where a class has no row), `accuracy`, `calibration error`,
        `Brier score` and `tiles read`, the mean share.
    """
    probabilities = predictions[_probability_columns(predictions)].to_numpy()
    labels = predictions["label"].to_numpy()
    try:
        interval = auc_interval(
            labels,
            probabilities,
            cases=predictions["case_id"].to_numpy(),
            level=level,
            n_resamples=n_resamples,
            seed=seed,
        )
    except CohortError:  # a class is absent
        interval = Interval(np.nan, np.nan, np.nan)
    return {
        "n": len(predictions),
        **dict(zip(("AUC", "AUC low", "AUC high"), map(float, interval), strict=True)),
        "accuracy": accuracy(labels, probabilities),
        "calibration error": expected_calibration_error(labels, probabilities),
        "Brier score": brier_score(labels, probabilities),
        "tiles read": float(predictions["keep_ratio"].mean()),
    }


def _probability_columns(predictions: pd.DataFrame) -> list[str]:
    return sorted((c for c in predictions if c.startswith("p_")), key=lambda c: int(c[2:]))
