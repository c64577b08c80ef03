"""The score that training watches and evaluation reports."""

import numpy as np
from sklearn.metrics import roc_auc_score

from hdmil_lib.errors import CohortError


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve: of class 1 for two classes, the mean of one against the rest for more.

    Args:
        labels: Class indices (S,).
        probabilities: Class probabilities (S, C).

    Raises:
        CohortError: A class has no slide, so that its curve does not exist.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    n_classes = probabilities.shape[1]
    absent = sorted(set(range(n_classes)) - set(labels.tolist()))
    if absent:
        raise CohortError(
            f"no AUC: none of the {len(labels)} slides has class {', '.join(map(str, absent))}; "
            "score a part that holds every class"
        )
    columns = [1] if n_classes == 2 else range(n_classes)
    return float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in columns]))
