"""What does a cross-validation score where there is nothing to learn? Labels permuted again and again.

    python benchmarks/permuted_labels.py [--cohort nsclc-mini] [--repeats 20]

Each repeat permutes the labels of a drawn cohort among its cases and cross-validates gated attention. Besides
AUC on the test slides of each fold, the contrasts of a fold are compared: the difference of the classes' mean
features on its training slides, and on its test slides. Both together are the cohort: what is by luck higher
in one class of the test part is lower in that class of the training part. Everything goes to
`benchmarks/results/permuted_labels.json`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

from hdmil_lib.config import setup
from hdmil_lib.evaluation.metrics import fold_scores
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.synthetic.cohorts import prepare_cohort
from hdmil_lib.training.crossval import cross_validate

RESULTS = Path(__file__).resolve().parent / "results" / "permuted_labels.json"
METHOD, FOLDS, EPOCHS = "abmil_gated", 5, 15


def contrast(means: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Difference between the classes' mean features, (D,)."""
    return means[labels == 1].mean(0) - means[labels == 0].mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cohort", default="nsclc-mini", choices=("camelyon-mini", "nsclc-mini", "brca-mini")
    )
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    setup()
    cohort = prepare_cohort(given.cohort)
    bags = cohort.load_bags()
    means = {slide_id: bag.features.astype("f4").mean(0) for slide_id, bag in bags.items()}
    scale = np.stack(list(means.values())).std(0) + 1e-6
    aucs, cosines = [], []
    for seed in range(given.repeats):
        permuted = cohort.permuted(seed)
        recipe = RECIPES[given.cohort].shorter(EPOCHS)
        cv = cross_validate(
            permuted, [METHOD], folds=FOLDS, seed=seed, recipe=recipe, bags=bags, progress=False
        )
        aucs.append(float(fold_scores(cv.predictions)["auc"].mean()))
        label_of = permuted.label_of
        for split in cv.splits:
            sides = [
                contrast(np.stack([means[s] / scale for s in part]), np.array([label_of[s] for s in part]))
                for part in ([*split.train, *split.val], split.test)
            ]
            norms = np.linalg.norm(sides[0]) * np.linalg.norm(sides[1])
            cosines.append(float(sides[0] @ sides[1] / norms))
        print(seed, round(aucs[-1], 3), round(float(np.mean(cosines)), 3), flush=True)
    test = ttest_1samp(aucs, 0.5)
    result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    result[given.cohort] = {
        "method": METHOD,
        "repeats": given.repeats,
        "AUC, mean over folds, of each repeat": [round(value, 4) for value in aucs],
        "mean": round(float(np.mean(aucs)), 4),
        "standard deviation": round(float(np.std(aucs, ddof=1)), 4),
        "95 % interval of the mean": [round(float(v), 4) for v in test.confidence_interval()],
        "cosine between the contrasts of training and test slides": round(float(np.mean(cosines)), 4),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result[given.cohort], indent=1))


if __name__ == "__main__":
    main()
