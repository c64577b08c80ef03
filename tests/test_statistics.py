"""Tests and intervals against naive counts, closed forms, SciPy, scikit-learn and simulated cohorts."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, f1_score

from hdmil_lib.errors import CohortError
from hdmil_lib.evaluation.auc_tests import auc_interval, delong, paired_permutation
from hdmil_lib.evaluation.metrics import auc, fold_scores
from hdmil_lib.evaluation.out_of_fold import align_methods
from hdmil_lib.evaluation.reliability import brier_score, expected_calibration_error, reliability
from hdmil_lib.evaluation.statistics import compare, format_p, format_scores, holm, score_table


def two_columns(p):
    return np.stack([1 - p, p], axis=1)


def predictions(n_slides=60, n_folds=3, seed=0, **effects):
    """Two classes in turn; methods share what makes a slide hard and differ in how much they see."""
    rng = np.random.default_rng(seed)
    label = np.arange(n_slides) % 2
    hard = rng.normal(size=n_slides)
    tables = []
    for method, effect in effects.items():
        p = stats.norm.cdf(effect * (label - 0.5) + 0.7 * hard + 0.5 * rng.normal(size=n_slides))
        table = pd.DataFrame({"method": method, "fold": np.arange(n_slides) // 2 % n_folds, "label": label})
        table["slide_id"] = [f"s{i:03d}" for i in range(n_slides)]
        tables.append(table.assign(p_0=1 - p, p_1=p, keep_ratio=1.0))
    return pd.concat(tables, ignore_index=True)


def three_classes(**effects):
    rng = np.random.default_rng(1)
    tables = []
    for method, effect in effects.items():
        label = np.arange(60) % 3
        p = rng.dirichlet(np.ones(3), 60) + effect * np.eye(3)[label]
        p /= p.sum(axis=1, keepdims=True)
        table = pd.DataFrame({"method": method, "fold": np.arange(60) // 3 % 2, "label": label})
        table["slide_id"] = [f"s{i}" for i in range(60)]
        tables.append(table.assign(p_0=p[:, 0], p_1=p[:, 1], p_2=p[:, 2]))
    return pd.concat(tables, ignore_index=True)


def naive_delong(labels, scores, reference):
    """Difference and variance from the (m, n) matrices of pairs."""
    positive = labels == 1
    placements = []
    for s in (scores, reference):
        above, below = s[positive, None], s[None, ~positive]
        wins = (above > below) + 0.5 * (above == below)
        placements.append((wins.mean(axis=1), wins.mean(axis=0)))
    (a, b), (c, d) = placements
    by_positive, by_negative = np.cov(a, c), np.cov(b, d)
    s = by_positive / len(a) + by_negative / len(b)
    return a.mean() - c.mean(), s[0, 0] + s[1, 1] - 2 * s[0, 1]


@given(
    arrays(float, (2, 23), elements=st.integers(0, 6).map(float)),
    st.lists(st.integers(0, 1), min_size=19, max_size=19),
)
@settings(max_examples=60, deadline=None)
def test_delong_agrees_with_counted_pairs_and_ties(scores, rest):
    labels = np.array([0, 1, 0, 1, *rest])
    value, variance = naive_delong(labels, *scores)
    test = delong(labels, *scores)
    # sums of at most 23 * 23 halves: rounding alone differs
    assert test.value == pytest.approx(value, abs=1e-12)
    if variance > 1e-20:
        assert test.p == pytest.approx(2 * stats.norm.sf(abs(value) / np.sqrt(variance)), abs=1e-9)
        assert test.high - test.low == pytest.approx(2 * stats.norm.ppf(0.975) * np.sqrt(variance))


def test_delong_over_folds_averages_differences_and_adds_variances():
    rng = np.random.default_rng(0)
    labels, folds = np.arange(60) % 2, np.repeat([0, 1, 2], 20)
    scores, reference = rng.normal(size=(2, 60)) + labels
    parts = [naive_delong(labels[folds == f], scores[folds == f], reference[folds == f]) for f in range(3)]
    values, variances = np.transpose(parts)
    test = delong(labels, scores, reference, folds=folds)
    assert test.value == pytest.approx(values.mean())
    assert test.p == pytest.approx(2 * stats.norm.sf(abs(values.sum()) / np.sqrt(variances.sum())))
    shifted = scores + 100 * folds  # a fold's model on another scale
    assert delong(labels, shifted, reference, folds=folds) == pytest.approx(test)


def simulated(seed, n=80, effects=(1.0, 1.0)):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    hard = rng.normal(size=n)
    return labels, *(hard + 0.7 * rng.normal(size=n) + effect * labels for effect in effects)


def test_delong_variance_is_that_of_repeated_cohorts_and_of_the_bootstrap():
    tests = [delong(*simulated(seed)) for seed in range(800)]
    variance = np.mean([((t.high - t.low) / 2 / stats.norm.ppf(0.975)) ** 2 for t in tests])
    # a variance from 800 draws has a relative standard error of sqrt(2 / 800) = 5 %
    assert variance == pytest.approx(np.var([t.value for t in tests]), rel=0.2)
    # 800 tests of a true null: 5 % +- 4 standard errors of 0.8 %
    assert np.mean([t.p < 0.05 for t in tests]) == pytest.approx(0.05, abs=0.031)
    labels, a, b = simulated(0, effects=(1.5, 1.0))
    drawn = auc_interval(labels, two_columns(a), two_columns(b))
    exact = delong(labels, a, b)
    assert drawn.value == pytest.approx(exact.value)
    # the normal and the percentile interval of 80 slides agree roughly, not exactly
    assert drawn[1:] == pytest.approx(exact[1:3], abs=0.2 * (exact.high - exact.low))


def test_exchanging_labels_or_methods_turns_the_sign_and_keeps_p():
    labels, a, b = simulated(3, effects=(1.5, 1.0))
    test = delong(labels, a, b)
    for turned in (delong(1 - labels, a, b), delong(labels, b, a)):
        assert (turned.value, turned.low, turned.high) == pytest.approx((-test.value, -test.high, -test.low))
        assert turned.p == pytest.approx(test.p)
    assert delong(1 - labels, -a, -b) == pytest.approx(test)


def test_identical_methods_do_not_differ():
    labels, a, _ = simulated(0)
    assert delong(labels, a, a) == (0, 0, 0, 1)
    assert delong(labels, a, 3 * a + 1) == (0, 0, 0, 1), "only ranks count"
    assert paired_permutation(labels, two_columns(a), two_columns(a), n_resamples=99) == 1
    assert auc_interval(labels, two_columns(a), two_columns(a), n_resamples=99) == (0, 0, 0)


def test_delong_has_no_answer_where_placements_do_not_vary():
    labels = np.array([0, 0, 1, 1])
    test = delong(labels, labels, 1 - labels)
    assert test.value == 1
    assert np.isnan(test[1:]).all()


def test_delong_needs_two_slides_of_each_class():
    with pytest.raises(CohortError, match="fold 0.*two slides of each class.*paired_permutation"):
        delong(np.array([0, 0, 1]), np.arange(3), np.arange(3))


def test_permutation_agrees_with_delong_on_many_slides():
    labels, a, b = simulated(5, n=120, effects=(1.4, 1.0))
    p = paired_permutation(labels, two_columns(a), two_columns(b), n_resamples=2000)
    # Monte Carlo error 4 * sqrt(p (1 - p) / 2000) < 0.045, and the tests differ by a little
    assert p == pytest.approx(delong(labels, a, b).p, abs=0.06)


def test_permutation_tries_all_exchanges_of_few_slides():
    labels = np.array([0, 0, 1, 1])
    good, bad = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0.9, 0.8, 0.2, 0.1])
    # ranks 1234 against 4321: of 16 exchanges only the identity gives a difference of 1, its mirror one of -1
    assert paired_permutation(labels, two_columns(good), two_columns(bad)) == pytest.approx(2 / 16)


def test_permutation_does_not_mind_scales_and_exchanges_whole_cases():
    labels, a, b = simulated(7, effects=(1.4, 1.0))
    squeezed = stats.norm.cdf(a) * 1e-3
    options = {"n_resamples": 200, "seed": 1}
    p = paired_permutation(labels, two_columns(a), two_columns(b), **options)
    assert paired_permutation(labels, two_columns(squeezed), two_columns(b), **options) == p
    pairs = paired_permutation(labels, two_columns(a), two_columns(b), cases=np.arange(80) // 40, **options)
    assert pairs in (0.5, 1.0), "two cases have four exchanges"


def test_permutation_of_a_true_null_rejects_as_often_as_it_says():
    p_values = []
    for seed in range(150):
        labels, a, b = simulated(seed, n=30)
        p_values.append(paired_permutation(labels, two_columns(a), two_columns(b), n_resamples=199))
    # 20 % +- 4 standard errors of 3.3 %
    assert np.mean(np.array(p_values) <= 0.2) == pytest.approx(0.2, abs=0.13)


def test_bootstrap_agrees_with_scipy():
    labels, a, _ = simulated(0)

    def statistic(x, y, axis):
        return stats.mannwhitneyu(x, y, axis=axis).statistic / (x.shape[axis] * y.shape[axis])

    theirs = stats.bootstrap(
        (a[labels == 1], a[labels == 0]),
        statistic,
        n_resamples=2000,
        method="percentile",
        random_state=np.random.default_rng(1),
    ).confidence_interval
    ours = auc_interval(labels, two_columns(a))
    assert ours.value == auc(labels, two_columns(a))
    # ends of 2,000 resamples differ by some 4 % of the interval's width
    assert ours[1:] == pytest.approx(tuple(theirs), abs=0.02)
    assert auc_interval(labels, two_columns(a)) == ours, "seeded"
    assert auc_interval(labels, two_columns(a), seed=1) != ours


def test_bootstrap_interval_covers_the_true_auc():
    true = stats.norm.cdf(1 / np.sqrt(2 * 1.49))  # of two normals with variance 1 + 0.7 ** 2, one apart
    intervals = [
        auc_interval(labels, two_columns(a), n_resamples=300, seed=seed)
        for seed in range(200)
        for labels, a, _ in [simulated(1000 + seed)]
    ]
    # 95 % nominal; percentile intervals of 40 + 40 slides fall short a little; standard error 1.5 %
    assert 0.90 <= np.mean([i.low <= true <= i.high for i in intervals]) <= 0.99


def test_bootstrap_of_cases_is_wider_where_slides_repeat():
    labels, a, _ = simulated(0)
    twice = np.tile(labels, 2), two_columns(np.tile(a, 2))
    once, naive = auc_interval(labels, two_columns(a)), auc_interval(*twice)
    by_case = auc_interval(*twice, cases=np.tile(np.arange(80), 2))
    # copies add nothing; taken as new slides they shrink the interval by sqrt(2)
    assert by_case == pytest.approx(once, abs=1e-12)
    assert naive.high - naive.low == pytest.approx((once.high - once.low) / np.sqrt(2), rel=0.1)


def test_bootstrap_takes_three_classes_and_keeps_folds_apart():
    slides = align_methods(three_classes(a=0.3))
    p = slides.probabilities["a"]
    interval = auc_interval(slides.labels, p, n_resamples=200)
    assert interval.value == auc(slides.labels, p)
    assert interval.low < interval.value < interval.high
    labels, folds, score = np.array([0, 1] * 20), np.repeat([0, 1], 20), np.tile([0.1, 0.2], 20)
    score[20:] += 0.5
    assert auc_interval(labels, two_columns(score), folds=folds) == (1, 1, 1)
    assert auc_interval(labels, two_columns(score)).value == 0.75


def test_bootstrap_leaves_out_samples_without_a_class():
    labels, cases = np.array([1, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 2, 3, 4])
    interval = auc_interval(labels, two_columns(np.array([0.9, 0.5, 0.8, 0.7, 0.6, 0.1])), cases=cases)
    assert np.isfinite(interval).all()


def test_holm_by_hand():
    # sorted .01 .02 .04 .3 times 4 3 2 1 = .04 .06 .08 .3
    assert holm([0.04, 0.01, np.nan, 0.3, 0.02]) == pytest.approx(
        [0.08, 0.04, np.nan, 0.3, 0.06], nan_ok=True
    )
    assert holm([0.03, 0.02, 0.9]) == pytest.approx([0.06, 0.06, 0.9]), "never below a smaller one"
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert np.isnan(holm([np.nan])).all()


def test_ece_closed_forms():
    labels = np.array([0, 0, 0, 1] * 25)
    constant = np.full(100, 0.25)
    assert expected_calibration_error(labels, two_columns(constant)) == pytest.approx(0)
    assert expected_calibration_error(labels, two_columns(constant + 0.5)) == pytest.approx(0.5)
    assert len(reliability(labels, two_columns(constant))) == 1
    stepped = np.repeat([0.2, 0.8], 50)  # comes true exactly
    happened = np.concatenate([np.arange(50) < 10, np.arange(50) < 40]).astype(int)
    assert expected_calibration_error(happened, two_columns(stepped)) == pytest.approx(0)
    assert expected_calibration_error(1 - happened, two_columns(stepped)) == pytest.approx(0.6)
    assert expected_calibration_error(np.array([1]), np.array([[0.3, 0.7]])) == pytest.approx(0.3)


def test_ece_of_three_classes_is_of_the_most_probable_class():
    probabilities = np.tile([0.6, 0.3, 0.1], (10, 1))
    labels = np.array([0] * 4 + [1] * 3 + [2] * 3)
    assert expected_calibration_error(labels, probabilities) == pytest.approx(0.2)


@pytest.mark.parametrize("equal_mass", [True, False])
def test_reliability_agrees_with_sklearn(equal_mass):
    rng = np.random.default_rng(0)
    p = rng.uniform(size=300)
    labels = (rng.uniform(size=300) < p**2).astype(int)
    observed, predicted = calibration_curve(
        labels, p, n_bins=8, strategy="quantile" if equal_mass else "uniform"
    )
    table = reliability(labels, two_columns(p), bins=8, equal_mass=equal_mass)
    assert table["predicted"].tolist() == pytest.approx(predicted.tolist())
    assert table["observed"].tolist() == pytest.approx(observed.tolist())
    assert table["n_slides"].sum() == 300
    assert not equal_mass or np.ptp(table["n_slides"]) <= 1


def test_brier_score():
    p, labels = np.array([0.2, 0.9, 0.4]), np.array([0, 1, 1])
    assert brier_score(labels, two_columns(p)) == pytest.approx(brier_score_loss(labels, p))
    assert brier_score([2], [[1.0, 0.0, 0.0]]) == 2


def test_score_table_repeats_each_score():
    table = predictions(max=0.6, hdmil=1.5, abmil=1.2)
    scores = score_table(table, n_resamples=200)
    assert scores.index.tolist() == ["max", "hdmil", "abmil"]
    means = fold_scores(table).groupby("method")["auc"].agg(["mean", "std"])
    part = table[table["method"] == "max"]
    labels, p = part["label"].to_numpy(), part[["p_0", "p_1"]].to_numpy()
    row, reference = scores.loc["max"], scores.loc["hdmil"]
    assert (row["auc"], row["auc_sd"]) == pytest.approx(tuple(means.loc["max"]))
    assert row["pooled_auc"] == auc(labels, p)
    assert row["pooled_low"] < row["pooled_auc"] < row["pooled_high"]
    predicted = p.argmax(axis=1)
    assert row["balanced_accuracy"] == balanced_accuracy_score(labels, predicted)
    assert row["f1"] == f1_score(labels, predicted, average="macro")
    assert row["difference"] == pytest.approx(row["auc"] - reference["auc"])
    assert row["p_holm"] == pytest.approx(2 * row["p"])
    assert row["p"] < scores.loc["abmil", "p"]
    assert reference[["difference", "p", "p_holm"]].isna().all()


def test_score_table_does_not_depend_on_the_order_of_rows():
    table = predictions(max=0.6, hdmil=1.5)
    shuffled = table.sample(frac=1, random_state=0).sort_values("method", key=lambda m: m == "hdmil")
    options = {"n_resamples": 100}
    pd.testing.assert_frame_equal(score_table(table, **options), score_table(shuffled, **options))


def test_repeated_cases_and_more_classes_are_permuted():
    slides = align_methods(three_classes(hdmil=0.5, other=0.0))
    options = {"folds": slides.folds, "cases": slides.cases, "n_resamples": 200}
    test = compare(slides, "other", "hdmil", n_resamples=200)
    assert test.p == paired_permutation(
        slides.labels, slides.probabilities["other"], slides.probabilities["hdmil"], **options
    )
    assert test.low <= test.value <= test.high < 0
    assert test.p < 0.05
    table = predictions(max=0.6, hdmil=1.5)
    cases = {slide: f"case {i // 4}" for i, slide in enumerate(table["slide_id"].unique())}
    by_case, by_slide = (score_table(table, cases=c, n_resamples=200).loc["max"] for c in (cases, None))
    assert by_case["difference"] == pytest.approx(by_slide["difference"])
    assert by_case["p"] != by_slide["p"]
    with_column = table.assign(case_id=table["slide_id"].map(cases))
    assert score_table(with_column, n_resamples=200).loc["max", "p"] == by_case["p"]


def test_format_scores_prints_titles_percent_and_p():
    text = format_scores(score_table(predictions(max=0.3, hdmil=2.5), n_resamples=100))
    assert text.index.tolist() == ["Max-Pooling", "HDMIL"]
    assert text.loc["HDMIL", ["difference of AUC", "p", "p (Holm)"]].tolist() == ["-"] * 3
    assert text.loc["Max-Pooling", "difference of AUC"].startswith("-")
    assert text.loc["Max-Pooling", "p"][0] in "<0"
    assert [format_p(p) for p in (np.nan, 0.0004, 0.0312, 1.0)] == ["-", "<0.001", "0.031", "1.000"]


def one_slide(table):
    return table[table["slide_id"] == "s000"]


def with_nan(table):
    return table.assign(p_1=table["p_1"].mask(table["slide_id"] == "s007"))


BAD = {
    "one class": (lambda t: t[t["label"] == 0], "fold 0: none of its 10 test slides has class 1"),
    "one slide": (one_slide, "none of its 1 test slides has class 1"),
    "nan": (with_nan, "method 'max', fold 0: slide s007 has a probability that is nan"),
    "label": (lambda t: t.assign(label=t["label"] + 1), "slide s001 has a label outside 0 to 1"),
    "other slides": (lambda t: t.drop(index=[3, 65]), "'max' and 'hdmil' were not tested.*s003, s005 differ"),
    "other folds": (
        lambda t: t.assign(fold=(t.index + (t.index > 59) * 20) // 20),
        "were not tested.*57 more",
    ),
    "twice": (lambda t: pd.concat([t, t]), "slide s000 is tested more than once"),
    "no column": (lambda t: t.drop(columns="p_1"), "without column p_1"),
    "empty": (lambda t: t[:0], "0 rows"),
    "no reference": (
        lambda t: t[t["method"] == "max"],
        "reference 'hdmil' has no predictions; choose from max",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scored_is_named(name):
    spoil, message = BAD[name]
    with pytest.raises(CohortError, match=message):
        score_table(spoil(predictions(max=0.6, hdmil=1.5)), n_resamples=10)


def test_a_slide_without_a_case_is_named():
    with pytest.raises(CohortError, match="no case for slide s001, s002, s003 and 56 more"):
        score_table(predictions(hdmil=1.0), cases={"s000": "a"})


def test_slides_of_several_folds_are_drawn_for_all_of_them_at_once():
    """Copies of a test part are no new slides: the interval is that of one, not narrower by sqrt(2)."""
    labels, a, _ = simulated(0)
    once = auc_interval(labels, two_columns(a))
    folds, cases = np.repeat([0, 1], 80), np.tile(np.arange(80), 2)
    twice = auc_interval(np.tile(labels, 2), two_columns(np.tile(a, 2)), folds=folds, cases=cases)
    assert twice == pytest.approx(once, abs=1e-12)


def test_a_slide_may_be_tested_in_several_folds():
    table = predictions(max=0.6, hdmil=1.5)
    again = table[table["fold"] == 0].assign(fold=3)
    scores = score_table(pd.concat([table, again]), n_resamples=50)
    assert scores["p"].dropna().between(0, 1).all()
    rows = table[table["method"] == "max"]
    folds = [
        auc(rows[rows["fold"] == f]["label"], rows[rows["fold"] == f][["p_0", "p_1"]]) for f in (0, 1, 2, 0)
    ]
    assert scores.loc["max", "auc"] == pytest.approx(np.mean(folds))
