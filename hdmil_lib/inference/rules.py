"""LIPN's thresholds and the margin of `stream`, chosen on held-out slides with a guarantee.

With probability 1 - delta over the draw of the held-out slides, the chosen rule gives at most a share epsilon
of all slides another label than all tiles do (or than the truth). `risk` describes what this requires.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from hdmil_lib.bags import Bag
from hdmil_lib.inference.anytime import Trajectory
from hdmil_lib.inference.risk import RiskControl, control_risk
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import HDMIL
from hdmil_lib.models.lipn import keep_mask

Thresholds = tuple[float, ...]

MARGINS = (math.inf, *(round(40 / 1.1**step, 2) for step in range(48)))
"""Candidates from careful to fast: infinity, which reads everything, and a geometric sequence to 0.45."""

LOGIT_STEPS = tuple(step / 10 for step in range(-30, 21))

Value = TypeVar("Value")


@dataclass(frozen=True)
class LearnedRule(Generic[Value]):
    """A rule with its cost and the test of all candidates.

    Attributes:
        value: Thresholds or margin; if no rule is certified, the value that reads everything.
        keep_ratio: Mean share of tiles that the rule reads on the held-out slides.
        control: Test of all candidates.
    """

    value: Value
    keep_ratio: float
    control: RiskControl


def learn_margin(
    trajectories: Sequence[Trajectory],
    margins: Sequence[float] = MARGINS,
    *,
    labels: Sequence[int] | None = None,
    **options: Any,
) -> LearnedRule[float]:
    """Learn the margin of lowest cost at which `stream` may stop.

    Args:
        trajectories: Predictions after each block, for each held-out slide.
        margins: Decreasing candidates, that is, from careful to fast; the test ends at the first that fails.
        labels: True class indices as the reference; by default it is the label from all tiles.
        **options: `epsilon`, `delta` and `procedure` of `control_risk`.

    Raises:
        ValueError: There are no trajectories, margins do not decrease, or numbers are out of range.
    """
    if not trajectories:
        raise ValueError("trajectories is empty: a margin is learned on held-out slides")
    if any(b >= a for a, b in zip(margins, margins[1:], strict=False)):
        raise ValueError("margins must fall, from careful to fast")
    stops = [[t.stop(margin) for margin in margins] for t in trajectories]
    predicted = np.array([t.probabilities[at].argmax(1) for t, at in zip(trajectories, stops, strict=True)])
    shares = np.array([t.n_read[at] / t.n_read[-1] for t, at in zip(trajectories, stops, strict=True)])
    dagger = np.array([t.probabilities[-1].argmax() for t in trajectories])
    return _learn(margins, predicted, shares, _truth(labels, dagger), read_all=math.inf, options=options)


def threshold_ladder(thresholds: Sequence[float]) -> list[Thresholds]:
    """Candidates from careful to fast: 0, which reads everything, and shifted thresholds of a model.

    The logits of the thresholds are shifted by -3 to 2; thresholds of 0 and 1 stay. The candidates do not
    depend on any slide.
    """
    from scipy.special import expit, logit

    logits = logit(np.asarray(thresholds, float))
    return [(0.0,) * len(logits)] + [tuple(expit(logits + step).tolist()) for step in LOGIT_STEPS]


def learn_thresholds(
    model: HDMIL,
    bags: Sequence[Bag],
    candidates: Sequence[Thresholds] | None = None,
    *,
    labels: Sequence[int] | None = None,
    **options: Any,
) -> LearnedRule[Thresholds]:
    """Learn the thresholds of lowest cost with which LIPN may select the tiles to read.

    Args:
        model: The model; of its thresholds only `trained_thresholds` are used.
        bags: Bags of held-out slides.
        candidates: Thresholds from careful to fast, chosen independently of these slides; the test ends at
            the first that fails. By default `threshold_ladder` of the `trained_thresholds`.
        labels: True class indices as the reference; by default it is the label from all tiles.
        **options: `epsilon`, `delta` and `procedure` of `control_risk`.

    Raises:
        ValueError: There are no bags or candidates, numbers are out of range, or the model has a second look.
    """
    if model.looks_again:
        raise ValueError(
            "the model has a second look, so that LIPN's thresholds alone do not say what is read: learn the "
            "margin of `stream`, or make the model without its look"
        )
    if candidates is None:
        candidates = threshold_ladder(model.trained_thresholds.tolist())
    if not bags or not candidates:
        raise ValueError("bags or candidates are empty: thresholds are learned on held-out slides")
    shape = len(bags), len(candidates)
    predicted, shares, dagger = np.empty(shape, int), np.empty(shape), np.empty(len(bags), int)
    model.eval()
    with torch.inference_mode():
        for i, bag in enumerate(bags):
            features = torch.as_tensor(bag.features).float().to(model.device)
            logits = model.lipn_logits(torch.as_tensor(bag.known_patches).to(model.device))
            one_bag = Segments([len(bag)], model.device)
            dagger[i] = model.dmin(features).logits.argmax()
            for j, thresholds in enumerate(candidates):
                kept = keep_mask(logits, torch.tensor(thresholds), one_bag).any(1)
                predicted[i, j] = model.dmin(features[kept]).logits.argmax()
                shares[i, j] = kept.float().mean()
    read_all = (0.0,) * model.n_classes
    return _learn(candidates, predicted, shares, _truth(labels, dagger), read_all=read_all, options=options)


def _truth(labels: Sequence[int] | None, dagger: np.ndarray) -> np.ndarray:
    if labels is None:
        return dagger
    if len(labels) != len(dagger):
        raise ValueError(f"there are {len(labels)} labels for {len(dagger)} slides")
    return np.asarray(labels)


def _learn(
    values: Sequence[Value],
    predicted: np.ndarray,
    shares: np.ndarray,
    truth: np.ndarray,
    *,
    read_all: Value,
    options: dict[str, Any],
) -> LearnedRule[Value]:
    """The certified rule of lowest cost, given predicted labels and shares of tiles read, (n, R)."""
    costs = shares.mean(0)
    control = control_risk(predicted != truth[:, None], costs, **options)
    if control.index is None:
        return LearnedRule(read_all, 1.0, control)
    return LearnedRule(values[control.index], float(costs[control.index]), control)
