"""Scores against cases worked by hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from hdmil_lib.errors import CohortError
from hdmil_lib.evaluation.metrics import (
    accuracy,
    auc,
    fold_scores,
    keep_ratio,
    mean_sd,
    summarize,
    tumor_recall,
)


def two_columns(p):
    p = np.asarray(p, dtype=float)
    return np.stack([1 - p, p], axis=1)


def test_binary_auc_counts_ordered_pairs_and_halves_ties():
    # pairs (positive, negative): .6>.2, .6>.5, .5>.2, .5=.5 -> 3.5 of 4
    assert auc([0, 0, 1, 1], two_columns([0.2, 0.5, 0.5, 0.6])) == pytest.approx(3.5 / 4)


def test_auc_of_three_classes_is_the_mean_of_one_against_the_rest():
    labels = np.array([0, 1, 2, 0, 1, 2])
    probabilities = np.eye(3)[labels] * 0.4 + 0.2
    assert auc(labels, probabilities) == 1.0
    probabilities[0] = [0.1, 0.8, 0.1]  # class 0: 4/8 wins + ties; class 1: one negative above both positives
    by_hand = []
    for c in range(3):
        positive, negative = probabilities[labels == c, c], probabilities[labels != c, c]
        wins = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
        by_hand.append(wins / (len(positive) * len(negative)))
    assert auc(labels, probabilities) == pytest.approx(np.mean(by_hand))


@given(
    arrays(int, 12, elements=st.integers(0, 2)), arrays(float, (12, 3), elements=st.floats(0, 1, width=16))
)
@settings(max_examples=50, deadline=None)
def test_auc_agrees_with_sklearn(labels, scores):
    labels[:3] = 0, 1, 2
    probabilities = (scores + 0.01) / (scores + 0.01).sum(axis=1, keepdims=True)
    expected = roc_auc_score(labels, probabilities, multi_class="ovr")
    # both sum at most 12 * 12 halves exactly; only the means differ in rounding
    assert auc(labels, probabilities) == pytest.approx(expected, abs=1e-12)


def test_auc_of_one_class_says_which_is_absent():
    with pytest.raises(CohortError, match="class 1"):
        auc([0, 0], two_columns([0.2, 0.5]))


def test_accuracy_takes_the_most_probable_class():
    assert accuracy([0, 1, 1], two_columns([0.4, 0.6, 0.3])) == pytest.approx(2 / 3)


def test_keep_ratio_is_of_the_union_over_branches():
    mask = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])
    assert keep_ratio(mask) == 0.75
    assert keep_ratio(mask[:, 0]) == 0.5


def test_tumor_recall_ignores_normal_tiles_and_is_nan_without_tumor():
    mask = np.array([[0, 1], [0, 0], [1, 0]])
    assert tumor_recall(mask, [0.9, 0.5, 0.0]) == 0.5
    assert tumor_recall(mask, [0.9, 0.4, 0.0]) == 1.0
    assert tumor_recall(mask, [0.9, 0.4, 0.0], threshold=0.3) == 0.5
    assert np.isnan(tumor_recall(mask, [0.0, 0.0, 0.0]))


def test_mean_sd_prints_as_the_paper():
    assert mean_sd([0.90, 0.94]) == "92.00 (2.83)"
    assert mean_sd([0.5]) == "50.00 (0.00)"
    assert mean_sd([1.0, 3.0], percent=False) == "2.00 (1.41)"


def test_fold_scores_and_summary():
    predictions = pd.DataFrame(
        {
            "method": ["b"] * 4 + ["a"] * 4,
            "fold": [0, 0, 1, 1] * 2,
            "label": [0, 1] * 4,
            "keep_ratio": [0.5, 0.7] * 2 + [1.0] * 4,
        }
    )
    p = np.array([0.1, 0.9, 0.8, 0.3, 0.1, 0.9, 0.1, 0.9])
    predictions["p_0"], predictions["p_1"] = 1 - p, p
    scores = fold_scores(predictions)
    assert scores["method"].tolist() == ["b", "b", "a", "a"]
    assert scores["auc"].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert scores["accuracy"].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert scores["keep_ratio"].tolist() == pytest.approx([0.6, 0.6, 1.0, 1.0])
    table = summarize(scores)
    assert table.index.tolist() == ["b", "a"]
    assert table.loc["a"].tolist() == ["100.00 (0.00)", "100.00 (0.00)", "100.00 (0.00)"]
    assert table.loc["b", "auc"] == "50.00 (70.71)"
