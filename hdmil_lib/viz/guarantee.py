"""What fewer tiles do to the answer: how it grows on one slide, and how often a fast rule errs on many."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from hdmil_lib.inference.anytime import Trajectory
from hdmil_lib.inference.risk import RiskControl
from hdmil_lib.viz.style import BLUE, MUTED, ORANGE, VERMILION, axes_or_new


def anytime_curves(
    trajectories: Sequence[Trajectory],
    labels: Sequence[int],
    ax: Axes | None = None,
    *,
    margin: float = 1.0,
    classes: Sequence[str] = ("normal", "tumor"),
) -> Axes:
    """P(last class) of slides as their tiles are read, most promising first; a mark where reading stops.

    Args:
        trajectories: Of the slides.
        labels: Their true class indices.
        ax: Axes to draw on.
        margin: Lead of the first class over the second at which reading stops.
        classes: Class names.
    """
    ax = axes_or_new(ax)
    colors = {c: BLUE for c in range(len(classes))} | {len(classes) - 1: VERMILION}
    for grown, label in zip(trajectories, labels, strict=True):
        share, probability = grown.n_read / grown.n_read[-1], grown.probabilities[:, -1]
        stop = grown.stop(margin)
        ax.plot(share, probability, color=colors[label], lw=0.8, alpha=0.35)
        ax.plot(share[: stop + 1], probability[: stop + 1], color=colors[label], lw=1.4)
        ax.plot(share[stop], probability[stop], "o", ms=4, color=colors[label])
    for label in sorted(set(labels)):
        ax.plot([], [], color=colors[label], label=f"true class: {classes[label]}")
    if margin < 1 and len(classes) == 2:
        for level in (0.5 - margin / 2, 0.5 + margin / 2):
            ax.axhline(level, color=MUTED, lw=1, ls=":")
    ax.set(xlabel="share of tiles read", ylabel=f"P({classes[-1]})", xlim=(0, 1.02), ylim=(-0.03, 1.03))
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %", decimals=0))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(set(labels)), borderaxespad=0.2)
    return ax


def risk_curve(control: RiskControl, ax: Axes | None = None) -> Axes:
    """Errors of rules against their cost, each with its confidence bound; the one chosen is marked.

    Args:
        control: Costs are shares of tiles read.
        ax: Axes to draw on; the careful rules stand on the left.
    """
    ax = axes_or_new(ax)
    share = control.errors / control.n_slides
    for cost, low, high, good in zip(
        control.costs, share, control.upper_bounds, control.certified, strict=True
    ):
        ax.plot([cost, cost], [low, high], color=BLUE if good else MUTED, lw=1.4)
        ax.plot(cost, low, "o", ms=6, color=BLUE if good else MUTED, mfc=BLUE if good else "white")
    ax.axhline(control.epsilon, color=VERMILION, lw=1.2)
    ax.annotate(
        f"ε = {control.epsilon:g}", (1, control.epsilon), (2, 3), textcoords="offset points", color=VERMILION
    )
    if control.index is not None:
        place = control.costs[control.index], share[control.index]
        ax.plot(*place, "o", ms=13, mfc="none", mec=ORANGE, mew=2.2)
    ax.plot([], [], "o-", color=BLUE, label="certified")
    ax.plot([], [], "o-", color=MUTED, mfc="white", label="not certified")
    ax.plot([], [], "o", ms=11, mfc="none", mec=ORANGE, mew=2.2, ls="none", label="chosen")
    top = max(2.5 * control.epsilon, 1.15 * float(np.min(control.upper_bounds)))
    ax.set(
        xlabel="share of tiles read",
        ylabel=f"share of {control.n_slides} slides with another label,\nand its upper bound",
        xlim=(1.03, 0),
        ylim=(-0.03 * top, top),
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=" %", decimals=0))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return ax
