"""Control of risk against closed forms, SciPy, published sample sizes and simulated cohorts of slides.

A simulation of a bound p over n draws may exceed it by chance. `at_most` allows what a binomial count exceeds
once in 10,000 seeds, and each simulation also shows a shortcut that the same allowance finds out.
"""

from math import ceil, comb, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom, binomtest

from hdmil_lib.evaluation.statistics import holm
from hdmil_lib.inference.risk import control_expected_loss, control_risk, slides_needed

PROCEDURES = ("sequence", "holm")
N_COHORTS = 2000


def counted(errors, n_slides):
    """Losses (n, R) with so many errors of each rule."""
    return np.arange(n_slides)[:, None] < np.asarray(errors)


def control(errors, n_slides, costs=None, **options):
    """Faster rules cost less, unless costs are given."""
    costs = -np.arange(len(errors)) if costs is None else costs
    return control_risk(counted(errors, n_slides), costs, **options)


def at_most(probability, happened):
    """Whether draws, bool (n,), agree with an event that is no more probable than this."""
    return happened.sum() <= binom.isf(1e-4, len(happened), probability)


def cohorts(risks, n_slides, seed, *, shared):
    """Losses (cohorts, n, R) of rules with these risks: alike in the slides they err on, or independent."""
    shape = (N_COHORTS, n_slides, 1 if shared else len(risks))
    return np.random.default_rng(seed).random(shape) < np.asarray(risks)


errors_of_rules = st.integers(5, 80).flatmap(
    lambda n: st.tuples(st.lists(st.integers(0, n), min_size=1, max_size=6), st.just(n))
)
shares = st.floats(0.02, 0.98)


# -- the test of one rule ------------------------------------------------------------------------------------


def test_p_values_are_binomial_sums():
    p_values = control(range(12), 11, epsilon=0.3).p_values
    masses = [comb(11, k) * 0.3**k * 0.7 ** (11 - k) for k in range(12)]
    np.testing.assert_allclose(p_values, np.cumsum(masses), rtol=1e-12)


@pytest.mark.parametrize("delta", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("n_slides", [1, 2, 37])
def test_upper_bounds_are_clopper_pearson(n_slides, delta):
    errors = np.arange(n_slides + 1)
    bounds = control(errors, n_slides, delta=delta).upper_bounds
    tests = [binomtest(int(k), n_slides, alternative="less") for k in errors]
    expected = [test.proportion_ci(1 - delta, method="exact").high for test in tests]
    np.testing.assert_allclose(bounds, expected, rtol=1e-9)  # SciPy finds the root to 1e-12
    assert bounds[0] == pytest.approx(1 - delta ** (1 / n_slides), rel=1e-12)
    assert bounds[-1] == 1


@settings(max_examples=50, deadline=None)
@given(errors_of_rules, shares, shares)
def test_bound_and_p_value_say_the_same(drawn, epsilon, delta):
    result = control(*drawn, epsilon=epsilon, delta=delta)
    clear = np.abs(result.upper_bounds - epsilon) > 1e-9
    np.testing.assert_array_equal((result.upper_bounds <= epsilon)[clear], (result.p_values <= delta)[clear])


@pytest.mark.parametrize("risk", [0.1, 0.13, 0.3])
@pytest.mark.parametrize("delta", [0.02, 0.1, 0.4])
def test_one_bad_rule_is_certified_with_probability_at_most_delta(risk, delta):
    n_slides = 60
    errors = np.arange(n_slides + 1)
    certified = [control([k], n_slides, epsilon=0.1, delta=delta).certified[0] for k in errors]
    probability = binom.pmf(errors, n_slides, risk)[certified].sum()  # exact: all cohorts, no simulation
    assert probability <= delta * (1 + 1e-12)
    if risk == 0.1:  # one error more would be too many: nothing is given away
        assert binom.cdf(sum(certified), n_slides, risk) > delta


# -- many rules ----------------------------------------------------------------------------------------------


def test_a_sequence_ends_at_its_first_failure():
    result = control([0, 1, 9, 0], 100, epsilon=0.05, delta=0.1)
    assert result.certified.tolist() == [True, True, False, False]
    assert result.index == 1


def test_holm_certifies_in_any_order():
    result = control([0, 1, 9, 0], 200, procedure="holm")
    assert result.certified.tolist() == [True, True, False, True]
    assert result.index == 3


@settings(max_examples=50, deadline=None)
@given(errors_of_rules, shares, shares)
def test_holm_agrees_with_adjusted_p_values(drawn, epsilon, delta):
    result = control(*drawn, epsilon=epsilon, delta=delta, procedure="holm")
    adjusted = holm(result.p_values)
    clear = np.abs(adjusted - delta) > 1e-12
    np.testing.assert_array_equal(result.certified[clear], (adjusted <= delta)[clear])


@pytest.mark.parametrize(
    ("costs", "index"), [([4, 3, 2, 1], 2), ([1, 2, 3, 0], 0), ([2, 1, 1, 0], 1), ([9, 8, 9, -9], 1)]
)
def test_the_cheapest_certified_rule_is_chosen(costs, index):
    assert control([0, 0, 0, 50], 100, costs).index == index


@pytest.mark.parametrize("procedure", PROCEDURES)
@settings(max_examples=50, deadline=None)
@given(errors_of_rules, shares, shares, st.data())
def test_more_errors_certify_no_more_rules(procedure, drawn, epsilon, delta, data):
    losses = counted(*drawn)
    worse = losses | data.draw(arrays(bool, losses.shape))
    costs = data.draw(arrays(float, losses.shape[1], elements=st.floats(-9, 9)))
    options = {"epsilon": epsilon, "delta": delta, "procedure": procedure}
    before, after = control_risk(losses, costs, **options), control_risk(worse, costs, **options)
    assert not (after.certified & ~before.certified).any()
    assert after.needed_slides >= before.needed_slides
    if after.index is not None:
        assert costs[after.index] >= costs[before.index]


# Risks of rules from careful to fast; epsilon is 0.1. The last one hides bad rules among good ones.
RISKS = {
    "rising": [0.02, 0.05, 0.08, 0.11, 0.15, 0.25],
    "all just above": [0.1001] * 12,
    "not monotone": [0.01, 0.101, 0.02, 0.12, 0.03, 0.105, 0.2, 0.04],
}


@pytest.mark.parametrize("shared", [True, False], ids=["same slides", "independent"])
@pytest.mark.parametrize("name", RISKS)
@pytest.mark.parametrize("procedure", PROCEDURES)
def test_the_chosen_rule_misleads_with_probability_at_most_delta(procedure, name, shared):
    risks = np.array(RISKS[name])
    costs = -risks  # the worst case: the more a rule errs, the rather it is taken
    options = {"epsilon": 0.1, "delta": 0.1, "procedure": procedure}
    results = [control_risk(losses, costs, **options) for losses in cohorts(risks, 80, 1, shared=shared)]
    misled = np.array([result.index is not None and risks[result.index] > 0.1 for result in results])
    assert at_most(0.1, misled)
    assert at_most(0.1, np.array([(result.certified & (risks > 0.1)).any() for result in results]))


@pytest.mark.parametrize("name", ["all just above", "not monotone"])
def test_without_a_multiple_test_the_chosen_rule_misleads_more_often(name):
    risks = np.array(RISKS[name])
    errors = cohorts(risks, 80, 1, shared=False).sum(1)
    assert not at_most(0.1, ((binom.cdf(errors, 80, 0.1) <= 0.1) & (risks > 0.1)).any(1))


def test_an_error_rate_below_epsilon_on_the_slides_is_no_guarantee():
    errors = cohorts(RISKS["rising"], 80, 1, shared=True).sum(1)
    assert not at_most(0.1, ((errors / 80 <= 0.1) & (np.array(RISKS["rising"]) > 0.1)).any(1))


# -- how many slides it takes --------------------------------------------------------------------------------


def test_slides_needed_are_those_of_wilks():
    assert [slides_needed(0.05, 0.05, errors) for errors in range(5)] == [59, 93, 124, 153, 181]


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-4, 0.99), st.floats(1e-6, 0.99))
def test_slides_needed_without_errors_have_a_closed_form(epsilon, delta):
    exact = log(delta) / log(1 - epsilon)
    if abs(exact - round(exact)) > 1e-9:  # next to an integer, rounding decides
        assert slides_needed(epsilon, delta) == ceil(exact)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.floats(1e-3, 0.99), st.floats(1e-9, 0.99))
def test_slides_needed_are_the_fewest_that_pass(errors, epsilon, delta):
    n_slides = slides_needed(epsilon, delta, errors)
    assert n_slides > errors
    assert binom.cdf(errors, n_slides, epsilon) <= delta < binom.cdf(errors, n_slides - 1, epsilon)


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_too_few_slides_say_how_many_it_takes(procedure):
    options = {"epsilon": 0.05, "delta": 0.1, "procedure": procedure}
    result = control([1, 1, 3], 40, **options)
    assert result.index is None
    assert not result.certified.any()
    assert f"not achievable with 40 slides; it takes {result.needed_slides}" in str(result)
    enough = control([1, 1, 3], result.needed_slides, **options)
    assert enough.index is not None
    assert enough.needed_slides == result.needed_slides
    assert f"rule {enough.index}, which errs on 1 of {enough.n_slides} slides" in str(enough)
    assert control([1, 1, 3], result.needed_slides - 1, **options).index is None


@pytest.mark.parametrize("procedure", PROCEDURES)
@settings(max_examples=50, deadline=None)
@given(errors_of_rules, shares, shares)
def test_needed_slides_exceed_those_at_hand_exactly_where_no_rule_is_certified(
    procedure, drawn, epsilon, delta
):
    result = control(*drawn, epsilon=epsilon, delta=delta, procedure=procedure)
    assert (result.needed_slides > result.n_slides) == (result.index is None)


# -- expected loss -------------------------------------------------------------------------------------------


def test_conformal_choice_by_hand():
    losses = counted([0, 1, 3], 19)  # (total + 1) / 20 is 0.05, 0.1 and 0.2
    epsilons = (0.04, 0.05, 0.09, 0.1, 0.19, 0.2, 0.9)
    assert [control_expected_loss(losses, epsilon) for epsilon in epsilons] == [None, 0, 0, 1, 1, 2, 2]
    assert [control_expected_loss(4 * losses, 4 * epsilon, largest=4) for epsilon in epsilons[1:6]] == [
        0, 0, 1, 1, 2,
    ]  # fmt: skip


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.3])
def test_conformal_choice_needs_slides_even_without_errors(epsilon):
    enough = ceil(1 / epsilon - 1)
    assert control_expected_loss(np.zeros((enough, 1)), epsilon) == 0
    assert control_expected_loss(np.zeros((enough - 1, 1)), epsilon) is None


def test_losses_are_raised_slide_by_slide_and_towards_the_fast_rules():
    losses = np.zeros((19, 2))
    losses[0, 0] = losses[1, 1] = 1  # rule 1 errs on one slide, and counts as erring on two
    assert control_expected_loss(losses, 0.1) == 0
    assert control_expected_loss(losses, 0.15) == 1
    falling = counted([9, 0], 19)  # a careful rule that fails is not made good by a faster one
    assert control_expected_loss(falling, 0.1) is None
    assert control_expected_loss(falling[:, ::-1], 0.1) == 0


@settings(max_examples=50, deadline=None)
@given(st.data(), st.floats(0.01, 2))
def test_conformal_choice_never_gets_faster_with_more_loss(data, epsilon):
    shape = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5)))
    losses, more = (data.draw(arrays(float, shape, elements=st.floats(0, 1))) for _ in range(2))
    before = control_expected_loss(losses, epsilon)
    after = control_expected_loss(np.maximum(losses, more), epsilon)
    assert after is None or after <= before


def expected_loss(losses, risks, epsilon):
    """Mean and standard error, over cohorts, of the risk of the choice; without one, of the reference: 0."""
    chosen = [control_expected_loss(cohort, epsilon) for cohort in losses]
    loss = np.array([0 if index is None else risks[index] for index in chosen])
    return loss.mean(), loss.std() / len(loss) ** 0.5


def test_expected_loss_is_at_most_epsilon_and_not_far_below():
    """For rules without gaps, the theorem also promises at least epsilon - 2 largest / (n + 1)."""
    risks = np.linspace(0, 0.5, 101)
    mean, error = expected_loss(cohorts(risks, 39, 2, shared=True), risks, 0.1)
    assert 0.1 - 2 / 40 - 0.005 <= mean <= 0.1 + 4 * error  # 4 standard errors: once in 30,000 seeds


@pytest.mark.parametrize("name", RISKS)
def test_expected_loss_is_at_most_epsilon_for_any_rules(name):
    risks = np.array(RISKS[name])
    mean, error = expected_loss(cohorts(risks, 39, 3, shared=False), risks, 0.1)
    assert mean <= 0.1 + 4 * error


def test_without_raised_losses_the_choice_exceeds_epsilon():
    """Of many independent rules of risk 0.12, one passes by luck."""
    losses = cohorts([0.12] * 12, 39, 4, shared=False)
    loss = 0.12 * ((losses.sum(1) + 1) / 40 <= 0.1).any(1)
    assert loss.mean() > 0.1 + 4 * loss.std() / len(loss) ** 0.5
    mean, error = expected_loss(losses, [0.12] * 12, 0.1)
    assert mean <= 0.1 + 4 * error


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        (np.zeros(5), r"losses have shape \(5,\)"),
        (np.zeros((0, 3)), r"losses have shape \(0, 3\)"),
        (np.zeros((3, 0)), r"losses have shape \(3, 0\)"),
        (np.full((3, 2), np.nan), "losses hold nan"),
        (np.full((3, 2), np.inf), "losses hold nan or infinity"),
    ],
)
def test_losses_are_checked(losses, named):
    with pytest.raises(ValueError, match=named):
        control_risk(losses, [1, 2])
    with pytest.raises(ValueError, match=named):
        control_expected_loss(losses, 0.1)


@pytest.mark.parametrize("wrong", [0.5, -1, 2])
def test_counted_losses_are_0_or_1(wrong):
    with pytest.raises(ValueError, match="losses hold numbers other than 0 and 1"):
        control_risk(np.array([[0, 1], [wrong, 0]]), [1, 2])


@pytest.mark.parametrize("costs", [[1], [1, 2, 3], [[1, 2]], [1, np.nan], [1, np.inf], 1])
def test_costs_are_checked(costs):
    with pytest.raises(ValueError, match="costs are .* for each of 2 rules"):
        control_risk(np.zeros((50, 2)), costs)


@pytest.mark.parametrize("name", ["epsilon", "delta"])
@pytest.mark.parametrize("wrong", [0, 1, -0.1, np.nan])
def test_shares_are_checked(name, wrong):
    with pytest.raises(ValueError, match=f"{name} is {wrong}"):
        control_risk(np.zeros((50, 2)), [1, 2], **{name: wrong})
    with pytest.raises(ValueError, match=f"{name} is {wrong}"):
        slides_needed(**{"epsilon": 0.1, "delta": 0.1, name: wrong})


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="procedure is 'bonferroni', expected 'sequence' or 'holm'"):
        control_risk(np.zeros((50, 2)), [1, 2], procedure="bonferroni")
    with pytest.raises(ValueError, match="errors is -1"):
        slides_needed(0.1, 0.1, -1)
    for wrong in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"epsilon is {wrong}"):
            control_expected_loss(np.zeros((5, 2)), wrong)
        with pytest.raises(ValueError, match=f"largest is {wrong}"):
            control_expected_loss(np.zeros((5, 2)), 0.1, largest=wrong)
    for losses in ([[0, 2]], [[-1, 0]]):
        with pytest.raises(ValueError, match="losses go from .* expected 0 to largest, 1.0"):
            control_expected_loss(losses, 0.1)
