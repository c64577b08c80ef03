"""What reading fewer tiles does: how the answer on a slide grows, and how often a fast rule errs."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from hdmil_lib.viz.style import BLUE, INK, MUTED, ORANGE, PALE, VERMILION, axes_or_new, plain

if TYPE_CHECKING:  # drawing needs no model: its import would take seconds
    from hdmil_lib.inference.anytime import Trajectory
    from hdmil_lib.inference.risk import RiskControl


def log_odds(trajectory: "Trajectory") -> np.ndarray:
    """Log odds of the second of two classes after each block of tiles, float64 (T,)."""
    return np.diff(np.log(trajectory.probabilities.astype(np.float64).clip(min=1e-37)))[:, 0]


def anytime_curves(
    trajectories: "Sequence[Trajectory]",
    labels: Sequence[int],
    ax: Axes | None = None,
    *,
    margin: float = math.inf,
    classes: Sequence[str] = ("normal", "tumor"),
) -> Axes:
    """Log odds of the second of two classes as tiles are read; a dot marks where reading stops.

    Args:
        trajectories: One for each slide, of two classes.
        labels: True class index of each slide.
        ax: Axes to draw on.
        margin: Margin at which reading stops; the dotted lines fall from it to 0.
        classes: Class names.
    """
    ax = axes_or_new(ax)
    for grown, label in zip(trajectories, labels, strict=True):
        share = grown.n_read / grown.n_read[-1]
        lead = log_odds(grown)
        stop, color = grown.stop(margin), (BLUE, VERMILION)[label]
        ax.plot(share, lead, color=color, lw=0.8, alpha=0.3)
        ax.plot(share[: stop + 1], lead[: stop + 1], color=color, lw=1.3)
        ax.plot(share[stop], lead[stop], "o", ms=4, color=color)
    for label, color in enumerate((BLUE, VERMILION)):
        ax.plot([], [], color=color, label=plain(f"true class: {classes[label]}"))
    ax.axhline(0, color=MUTED, lw=1)
    if margin < math.inf:
        for sign in (-1, 1):
            ax.plot([0, 1], [sign * margin, 0], color=MUTED, lw=1, ls=":")
    ax.set(xlabel="share of tiles read", ylabel=plain(f"log odds of {classes[1]}"), xlim=(0, 1.02))
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %", decimals=0))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return ax


def risk_curve(control: "RiskControl", ax: Axes | None = None) -> Axes:
    """Share of wrong slides of each rule, with its confidence bound, against cost; the chosen rule is marked.

    Args:
        control: The rules that were tried; their costs are shares of tiles read.
        ax: Axes to draw on; the most careful rules are on the left. Bounds above the upper end are cut off.
    """
    ax = axes_or_new(ax, (7.2, 4.0))
    errors = control.errors / control.n_slides
    top = max(2.5 * control.epsilon, 1.15 * float(np.min(control.upper_bounds)))
    ax.axhspan(0, control.epsilon, color=PALE, zorder=0)
    ax.text(1.02, control.epsilon, f"allowed: ε = {control.epsilon:.3g}", va="bottom")
    for good, color, name in ((True, BLUE, "certified"), (False, MUTED, "not certified")):
        rules = control.certified == good
        x, low, high = control.costs[rules], errors[rules], control.upper_bounds[rules]
        ax.vlines(x, low, high, color=color, lw=0.8, alpha=0.5)
        ax.plot(x, high, "_", ms=7, mew=1.8, color=color)
        ax.plot(x, low, "o", ms=5, color=color, mfc=color if good else "white", label=f"{name}: errors")
    ax.plot([], [], "_", ms=9, mew=1.8, color=INK, label=f"upper bound, {1 - control.delta:.0%} confidence")
    if control.index is not None:
        cost = control.costs[control.index]
        ax.plot(cost, errors[control.index], "o", ms=12, mfc="none", mec=ORANGE, mew=2.2, clip_on=False)
        ax.annotate(
            f"chosen: reads {cost:.0%}",
            (cost, errors[control.index]),
            (cost, 0.62 * top),
            ha="right" if cost < 0.5 else "left",
            arrowprops={"arrowstyle": "-", "color": ORANGE, "shrinkB": 8},
        )
    ax.set(
        xlabel="share of tiles read (careful rules on the left, fast ones on the right)",
        ylabel=f"share of {control.n_slides} slides with another label",
        xlim=(1.03, 0),
        ylim=(-0.03 * top, top),
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=" %", decimals=0))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return ax
