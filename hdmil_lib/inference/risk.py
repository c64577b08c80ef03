"""Which fast rule may be used: chosen on held-out slides, with a guarantee on how often it errs.

A rule is one fixed way to classify a slide: the networks with one setting of LIPN's thresholds, of a keep
ratio, or of the margin at which reading stops. It errs where its label differs from a reference: that of all
tiles (HDMIL†, "dagger"), or the truth.

`control_risk` is Learn-then-Test (Angelopoulos, Bates, Candès, Jordan and Lei 2021) for losses of 0 or 1.
Rule j errs on a share R_j of the population's slides, and on k_j of the n slides at hand. The p-value of
"R_j > epsilon" is exact: P(Binomial(n, epsilon) <= k_j). A multiple test certifies rules so that, with
probability at least 1 - delta, none of them has R_j > epsilon; hence any certified rule may be taken.

It needs:

- Slides drawn independently from the population of those to come. Slides of one patient are not: take one of
  each patient. Another scanner, stain or hospital is another population.
- Slides that served for nothing else: not to train the networks, to stop training or to calibrate thresholds.
  Pooled out-of-fold predictions come from several networks, each trained on slides that the others are tried
  on: no single rule made them, and what is computed from them is an estimate without the guarantee.
- Rules, their order, epsilon, delta and the procedure fixed before a look at these slides. Only the costs may
  come from them. A second try, on more slides or with another epsilon, shares delta with the first.

Nothing is asked of how R_j changes with j. To control missed positives, give the positive slides alone: they
are the population, and n is their number.

It does not say that R is near epsilon; that of the chosen rules at most a share delta mislead, for draws that
choose none count too; that each class or subgroup errs no more than that; or, where dagger is the reference,
that the labels are right.
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
    """Which of R rules may be used, and why.

    Attributes:
        epsilon: Share of slides on which a rule may err.
        delta: Probability, over the draw of the slides, that a rule is certified that errs more often.
        n_slides: Slides that the rules were tried on, n.
        procedure: The multiple test.
        costs: Of each rule, float64 (R,).
        errors: Slides on which each rule errs, int64 (R,).
        p_values: Of "this rule errs on more than epsilon of all slides", float64 (R,).
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
        """The certified rule of least cost, the first of equals; `None` if there is none: read all tiles."""
        return int(np.where(self.certified, self.costs, np.inf).argmin()) if self.certified.any() else None

    @property
    def upper_bounds(self) -> np.ndarray:
        """Clopper-Pearson bound on each rule's risk, with confidence 1 - delta for that rule alone, (R,).

        It is at most epsilon exactly where the p-value is at most delta. Of a rule chosen among several,
        epsilon is guaranteed, and no smaller bound.
        """
        correct = self.n_slides - self.errors
        return np.where(correct == 0, 1.0, beta.isf(self.delta, self.errors + 1, np.maximum(correct, 1)))

    @property
    def needed_slides(self) -> int:
        """Slides it takes to certify a rule that errs on as many of them as the one tested first does here.

        More than `n_slides` exactly where no rule is certified.
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

    "sequence" tests the rules in their order, each at level delta, and ends at the first that fails: for
    rules that go from careful to fast. "holm" is Holm's step-down test, for rules without such an order; the
    first of R rules to pass must do so at level delta / R.

    Args:
        losses: 1 or true where a rule errs on a slide, else 0, (n, R).
        costs: Of each rule, in any unit, (R,).
        epsilon: Share of slides, between 0 and 1.
        delta: Probability, between 0 and 1.
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
    (sum of its losses + largest) / (n + 1) <= epsilon. The theorem needs losses that never fall from a rule
    to a faster one. So, slide by slide, a rule's loss is raised to the largest of the more careful rules',
    which can only make the choice more careful. The slides and the next one need only be exchangeable, but
    the expectation is over all of them: it does not bound how often the slides lead to a worse rule.

    Args:
        losses: From 0 to `largest`, (n, R), in the order from careful to fast.
        epsilon: Expected loss, more than 0.
        largest: What no loss on any slide can exceed, known beforehand.

    Returns:
        Number of the rule; `None` if no rule qualifies, and then one without loss must be used: the reference
        itself. Where no rule errs at all, n >= largest / epsilon - 1 slides are enough.

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
    n_passed = int((totals + largest <= epsilon * (len(losses) + 1)).sum())  # totals ascend: the first ones
    return n_passed - 1 if n_passed else None


def slides_needed(epsilon: float, delta: float, errors: int = 0) -> int:
    """Count the slides it takes to certify, at level delta, a rule that errs on `errors` of them.

    Without errors that is ln(delta) / ln(1 - epsilon), rounded up.

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
        raise ValueError(f"losses have shape {losses.shape}, expected a row a slide and a column a rule")
    if not np.isfinite(losses).all():
        raise ValueError("losses hold nan or infinity; count a slide without an answer as an error")
    return losses


def _check_between_0_and_1(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}, expected a number between 0 and 1")
