"""Choice of a fast rule on held-out slides, with a guarantee on its error rate.

A rule is one fixed way to classify a slide: the networks with one setting of LIPN's thresholds, of a keep
ratio, or of the margin at which reading stops. It errs on a slide if its label differs from a reference: the
label from all tiles (HDMIL†, "dagger"), or the truth.

`control_risk` is Learn-then-Test (Angelopoulos, Bates, Candès, Jordan and Lei 2021) for losses of 0 or 1.
Rule j errs on a share R_j of the slides of the population, and on k_j of the n held-out slides. The p-value
of "R_j > epsilon" is exact: P(Binomial(n, epsilon) <= k_j). A multiple test certifies rules so that, with
probability at least 1 - delta, none of them has R_j > epsilon; hence any certified rule may be used.

The guarantee requires:

- Slides that are drawn independently from the population of future slides. Slides of one patient are not
  independent: use one slide per patient. Another scanner, stain or hospital is another population.
- Slides that were not used for anything else: not for training, early stopping or the choice of thresholds.
  Pooled out-of-fold predictions come from several networks, each trained on slides on which the others are
  tested. They do not come from one rule, so results on them are estimates without the guarantee.
- Rules, their order, epsilon, delta and procedure that are fixed before these slides are looked at; only the
  costs may come from them. A second test, with more slides or another epsilon, shares delta with the first.

R_j may change with j in any way. To control the rate of missed positives, use positive slides only.

The guarantee does not say that R is near epsilon; that at most a share delta of the chosen rules have
R > epsilon, since draws in which no rule is certified count too; that R is at most epsilon in each class or
subgroup; or, with dagger as the reference, that the labels are true.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Literal, get_args

import numpy as np
from scipy.stats import beta, binom

Procedure = Literal["sequence", "holm"]


@dataclass(frozen=True, eq=False)
class RiskControl:
    """Result of the test of R rules.

    Attributes:
        epsilon: Share of slides on which a rule may err.
        delta: Probability, over the draw of the slides, that a rule is certified that errs more often.
        n_slides: Number of held-out slides, n.
        procedure: The multiple test.
        costs: Cost of each rule, float64 (R,).
        errors: Number of held-out slides on which each rule errs, int64 (R,).
        p_values: P-values of "this rule errs on more than epsilon of all slides", float64 (R,).
        certified: Rules that may be used, bool (R,).
    """

    epsilon: float
    delta: float
    n_slides: int
    procedure: Procedure
    costs: np.ndarray
    errors: np.ndarray
    p_values: np.ndarray
    certified: np.ndarray

    @property
    def index(self) -> int | None:
        """The certified rule of lowest cost, the first of equal ones; `None` if no rule is certified."""
        return int(np.where(self.certified, self.costs, np.inf).argmin()) if self.certified.any() else None

    @property
    def upper_bounds(self) -> np.ndarray:
        """Clopper-Pearson bound on each rule's risk, with confidence 1 - delta for that rule alone, (R,).

        It is at most epsilon exactly if the p-value is at most delta. For a rule that was chosen among
        several only epsilon is guaranteed, not this bound.
        """
        correct = self.n_slides - self.errors
        return np.where(correct == 0, 1.0, beta.isf(self.delta, self.errors + 1, np.maximum(correct, 1)))

    @property
    def needed_slides(self) -> int:
        """Number of slides needed to certify the rule that is tested first, if its number of errors stays.

        It is larger than `n_slides` exactly if no rule is certified.
        """
        if self.procedure == "holm":
            return slides_needed(self.epsilon, self.delta / len(self.errors), int(self.errors.min()))
        return slides_needed(self.epsilon, self.delta, int(self.errors[0]))

    def __str__(self) -> str:
        aim = f"errors on at most {self.epsilon:.3g} of slides, with confidence {1 - self.delta:.3g}"
        if self.index is None:
            return (
                f"{aim}: not achievable with {self.n_slides} slides; it takes {self.needed_slides} "
                "with no more errors than on these"
            )
        return f"{aim}: rule {self.index}, which errs on {self.errors[self.index]} of {self.n_slides} slides"


def control_risk(
    losses: np.ndarray,
    costs: Sequence[float] | np.ndarray,
    *,
    epsilon: float = 0.05,
    delta: float = 0.1,
    procedure: Procedure = "sequence",
) -> RiskControl:
    """Find the cheapest rule that errs on at most epsilon of all slides, with confidence 1 - delta.

    "sequence" tests the rules in their order, each at level delta, until one fails; it suits rules ordered
    from careful to fast. "holm" is Holm's step-down test for rules without such an order, of which the first
    must pass at level delta / R.

    Args:
        losses: 1 or true if a rule errs on a slide, else 0, (n, R).
        costs: Cost of each rule, in any unit, (R,).
        epsilon: Share of slides on which a rule may err, between 0 and 1.
        delta: Probability that a rule is certified that errs more often, between 0 and 1.
        procedure: The multiple test, "sequence" or "holm".

    Raises:
        ValueError: Losses are not 0 or 1, costs do not fit them, or another argument is out of range.
    """
    losses = _checked_losses(losses)
    n_slides, n_rules = losses.shape
    if not np.isin(losses, (0, 1)).all():
        raise ValueError("losses hold numbers other than 0 and 1; use control_expected_loss for those")
    costs = np.asarray(costs, dtype=np.float64)
    if costs.shape != (n_rules,) or not np.isfinite(costs).all():
        raise ValueError(f"costs are {costs}, expected a finite number for each of {n_rules} rules")
    _check_between_0_and_1(epsilon=epsilon, delta=delta)
    if procedure not in get_args(Procedure):
        raise ValueError(
            f"procedure is {procedure!r}, expected {' or '.join(map(repr, get_args(Procedure)))}"
        )
    errors = losses.sum(0).astype(np.int64)
    p_values = binom.cdf(errors, n_slides, epsilon)
    certify = _holm if procedure == "holm" else _fixed_sequence
    certified = certify(p_values, delta)
    return RiskControl(epsilon, delta, n_slides, procedure, costs, errors, p_values, certified)


def control_expected_loss(losses: np.ndarray, epsilon: float, *, largest: float = 1.0) -> int | None:
    """Find the fastest rule whose expected loss on the next slide is at most epsilon.

    This is conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster 2022): the last rule with
    (sum of its losses + largest) / (n + 1) <= epsilon. The theorem requires losses that never decrease from a
    rule to a faster one, so on each slide the loss of a rule is raised to the largest loss of the more
    careful rules. The held-out slides and the next one need only be exchangeable, but the expectation is over
    all of them: how often the held-out slides lead to a worse rule is not bounded.

    Args:
        losses: Losses from 0 to `largest`, (n, R), with the rules ordered from careful to fast.
        epsilon: Largest expected loss, more than 0.
        largest: Upper bound of all possible losses, known beforehand.

    Returns:
        Index of the rule; `None` if no rule qualifies, so that the reference itself must be used. If no rule
        errs on any slide, n >= largest / epsilon - 1 slides are enough.

    Raises:
        ValueError: Losses or another argument are out of range.
    """
    losses = _checked_losses(losses)
    if not 0 < epsilon < np.inf:
        raise ValueError(f"epsilon is {epsilon}, expected a finite number above 0")
    if not 0 < largest < np.inf:
        raise ValueError(f"largest is {largest}, expected a finite number above 0")
    if losses.min() < 0 or losses.max() > largest:
        raise ValueError(f"losses go from {losses.min()} to {losses.max()}, expected 0 to largest, {largest}")
    totals = np.maximum.accumulate(losses, axis=1).sum(0)
    # The totals do not decrease, so the rules that pass are the first ones.
    n_passed = int((totals + largest <= epsilon * (len(losses) + 1)).sum())
    return n_passed - 1 if n_passed else None


def slides_needed(epsilon: float, delta: float, errors: int = 0) -> int:
    """Number of slides needed to certify, at level delta, a rule that errs on `errors` of them.

    Without errors this is ln(delta) / ln(1 - epsilon), rounded up.

    Raises:
        ValueError: An argument is out of range.
    """
    _check_between_0_and_1(epsilon=epsilon, delta=delta)
    if errors < 0:
        raise ValueError(f"errors is {errors}, expected 0 or more")
    enough = ceil(2 * (errors - log(delta)) / epsilon)  # by Chernoff's bound on the lower tail
    return bisect_left(range(enough), True, key=lambda n: binom.cdf(errors, n, epsilon) <= delta)


def _fixed_sequence(p_values: np.ndarray, delta: float) -> np.ndarray:
    return np.logical_and.accumulate(p_values <= delta)


def _holm(p_values: np.ndarray, delta: float) -> np.ndarray:
    order = p_values.argsort(kind="stable")
    levels = delta / np.arange(len(p_values), 0, -1)
    certified = np.empty(len(p_values), dtype=bool)
    certified[order] = np.logical_and.accumulate(p_values[order] <= levels)
    return certified


def _checked_losses(losses: np.ndarray) -> np.ndarray:
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 2 or 0 in losses.shape:
        raise ValueError(
            f"losses have shape {losses.shape}, expected one row per slide and one column per rule"
        )
    if not np.isfinite(losses).all():
        raise ValueError("losses hold nan or infinity; count a slide without an answer as an error")
    return losses


def _check_between_0_and_1(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}, expected a number between 0 and 1")
