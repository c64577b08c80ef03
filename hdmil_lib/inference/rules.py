"""Fast rules with a guarantee: LIPN's thresholds and the margin to stop at, chosen on held-out slides.

A rule may be used where it gives at most a share epsilon of all slides another label than reading every tile
does (or than the truth), with probability 1 - delta over the draw of the held-out slides. What that asks of
the slides, and what it does not say, stands in `risk`.
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

MARGINS = (math.inf, *(round(40 / 1.1**step, 2) for step in range(39)))
"""From careful to fast, in equal ratios down to 1; the first one reads everything."""

LOGIT_STEPS = tuple(step / 10 for step in range(-30, 21))

Value = TypeVar("Value")


@dataclass(frozen=True)
class LearnedRule(Generic[Value]):
    """A rule and what speaks for it.

    Attributes:
        value: The thresholds or the margin; those that read everything where no faster rule is certified.
        keep_ratio: Mean share of tiles that it reads on the slides at hand.
        control: The test of all candidates.
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
    """The margin of least cost at which anytime prediction may stop.

    Args:
        trajectories: How the answer grows on each held-out slide.
        margins: Candidates, falling: the test goes from careful to fast and ends at the first that fails.
        labels: True class indices to be met; by default the label that all tiles lead to.
        **options: `epsilon`, `delta` and `procedure` of `control_risk`.

    Raises:
        ValueError: No trajectories, margins that do not fall, or numbers out of range.
    """
    if not trajectories:
        raise ValueError("trajectories is empty: a margin is learned on held-out slides")
    if any(b >= a for a, b in zip(margins, margins[1:], strict=False)):
        raise ValueError("margins must fall, from careful to fast")
    stops = [[t.stop(margin) for margin in margins] for t in trajectories]
    said = np.array([t.probabilities[at].argmax(1) for t, at in zip(trajectories, stops, strict=True)])
    shares = np.array([t.n_read[at] / t.n_read[-1] for t, at in zip(trajectories, stops, strict=True)])
    dagger = np.array([t.probabilities[-1].argmax() for t in trajectories])
    return _learn(margins, said, shares, _truth(labels, dagger), read_all=math.inf, options=options)


def threshold_ladder(thresholds: Sequence[float]) -> list[Thresholds]:
    """Candidates around a model's thresholds that depend on no slide: all tiles, then ever fewer.

    Each threshold is moved along the logit, from 3 below to 2 above; where that is 0 or 1, it stays.
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
    """The thresholds of least cost with which LIPN may choose the tiles that are read.

    Args:
        model: The model; its own thresholds are not used, only those that training chose.
        bags: Bags of held-out slides.
        candidates: Thresholds from careful to fast, fixed before a look at these slides; the test ends at the
            first that fails. By default `threshold_ladder` around those that training chose.
        labels: True class indices to be met; by default the label that all tiles lead to.
        **options: `epsilon`, `delta` and `procedure` of `control_risk`.

    Raises:
        ValueError: There are no bags or candidates, or numbers are out of range.
    """
    if candidates is None:
        candidates = threshold_ladder(model.trained_thresholds.tolist())
    if not bags or not candidates:
        raise ValueError("bags or candidates are empty: thresholds are learned on held-out slides")
    shape = len(bags), len(candidates)
    said, shares, dagger = np.empty(shape, int), np.empty(shape), np.empty(len(bags), int)
    model.eval()
    with torch.inference_mode():
        for i, bag in enumerate(bags):
            features = torch.as_tensor(bag.features).float().to(model.device)
            logits = model.lipn_logits(torch.as_tensor(bag.known_patches).to(model.device))
            one_bag = Segments([len(bag)], model.device)
            dagger[i] = model.dmin(features).logits.argmax()
            for j, thresholds in enumerate(candidates):
                kept = keep_mask(logits, torch.tensor(thresholds), one_bag).any(1)
                said[i, j], shares[i, j] = model.dmin(features[kept]).logits.argmax(), kept.float().mean()
    read_all = (0.0,) * model.n_classes
    return _learn(candidates, said, shares, _truth(labels, dagger), read_all=read_all, options=options)


def _truth(labels: Sequence[int] | None, dagger: np.ndarray) -> np.ndarray:
    if labels is None:
        return dagger
    if len(labels) != len(dagger):
        raise ValueError(f"there are {len(labels)} labels for {len(dagger)} slides")
    return np.asarray(labels)


def _learn(
    values: Sequence[Value],
    said: np.ndarray,
    shares: np.ndarray,
    truth: np.ndarray,
    *,
    read_all: Value,
    options: dict[str, Any],
) -> LearnedRule[Value]:
    """The certified rule of least cost, from what R rules said of n slides (n, R) and the tiles they read."""
    costs = shares.mean(0)
    control = control_risk(said != truth[:, None], costs, **options)
    if control.index is None:
        return LearnedRule(read_all, 1.0, control)
    return LearnedRule(values[control.index], float(costs[control.index]), control)
