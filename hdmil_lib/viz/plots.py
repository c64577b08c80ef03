"""Every figure of the course: each function takes `ax`, draws one idea, labels its axes and returns them."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from numpy.polynomial import chebyshev
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score, roc_curve

from hdmil_lib.viz.hardware import program_grid, roofline
from hdmil_lib.viz.overlays import (
    attention_overlay,
    gallery,
    kept_overlay,
    mark_tile,
    slide_overview,
    tile_and_patch,
    tissue_tiles,
    truth_overlay,
)
from hdmil_lib.viz.pipeline import pipeline
from hdmil_lib.viz.style import (
    BLUE,
    CYCLE,
    GREEN,
    INK,
    MUTED,
    PALE,
    SEQUENTIAL,
    VERMILION,
    axes_or_new,
    use_style,
)

__all__ = [
    "attention_overlay",
    "chebyshev_polynomials",
    "gallery",
    "gumbel_sigmoid",
    "keep_ratio_curve",
    "kept_overlay",
    "mark_tile",
    "method_scores",
    "phi",
    "phi_fit",
    "pipeline",
    "program_grid",
    "roc",
    "roofline",
    "score_threshold",
    "slide_overview",
    "stage_times",
    "tile_and_patch",
    "tissue_tiles",
    "training_curves",
    "truth_overlay",
    "use_style",
]

TARGETS = {
    "step": lambda x: np.tanh(8 * x),
    "bump": lambda x: np.exp(-8 * (x - 0.2) ** 2),
    "wave": lambda x: np.sin(7 * x) * (0.6 + 0.4 * x),
    "line": lambda x: 0.8 * x,
}


def gumbel_sigmoid(tau: float = 0.7, gamma: float = 0.5, ax: Axes | None = None) -> Axes:
    """From attention logit to mask (paper, section 3.2): the noisy soft mask and the chance of being kept.

    The difference of two Gumbel variables is logistic, so the band and the chance are exact:
    P(kept | a) = sigmoid(a - tau * logit(gamma)). Without noise, at evaluation, a tile is kept where
    sigmoid(a) > gamma: the shaded side.

    Args:
        tau: Temperature of the sigmoid in training, > 0.
        gamma: Threshold on the soft mask, in (0, 1).
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax)
    a = np.linspace(-6, 6, 400)
    low, high = (expit((a + logit(quantile)) / tau) for quantile in (0.05, 0.95))
    ax.axvspan(np.clip(logit(gamma), -6, 6), 6, color=PALE, label="kept at evaluation")
    ax.fill_between(a, low, high, color=BLUE, alpha=0.18, lw=0, label="soft mask, 90 % of the noise")
    ax.plot(a, expit(a / tau), color=BLUE, label="soft mask without noise")
    ax.plot(a, expit(a - tau * logit(gamma)), color=VERMILION, label="chance of being kept in training")
    ax.axhline(gamma, color=MUTED, lw=1, ls="--")
    ax.text(-5.9, gamma + 0.02, f"γ = {gamma:g}", color=INK, fontsize=9, va="bottom")
    ax.set(xlabel="attention logit", ylabel="mask value, or probability", xlim=(-6, 6), ylim=(-0.02, 1.02))
    ax.set_title(f"Gumbel-sigmoid: τ = {tau:g}, γ = {gamma:g}")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def chebyshev_polynomials(degree: int = 12, ax: Axes | None = None) -> Axes:
    """T_0 to T_degree on [-1, 1], the basis of the CKA classifier (paper, section 3.3)."""
    ax = axes_or_new(ax)
    x = np.cos(np.linspace(np.pi, 0, 600))
    norm = plt.Normalize(0, max(degree, 1))
    for k in range(degree + 1):
        color = plt.get_cmap(SEQUENTIAL)(norm(k))
        ax.plot(x, chebyshev.chebval(x, np.eye(degree + 1)[k]), color=color, lw=1.3)
    bar = ax.figure.colorbar(plt.cm.ScalarMappable(norm, SEQUENTIAL), ax=ax, pad=0.02)
    bar.set_label("k")
    bar.locator = plt.MaxNLocator(integer=True)
    bar.update_ticks()
    ax.set(xlabel="x = tanh(embedding)", ylabel="$T_k(x)$", xlim=(-1, 1), ylim=(-1.08, 1.08))
    ax.set_title(f"Chebyshev polynomials up to degree {degree}")
    return ax


def phi(coefficients: np.ndarray, ax: Axes | None = None, *, limit: float = 3.0) -> Axes:
    """What a CKA head does to single embedding values: sum_k T_k(tanh e) * coefficient k.

    Args:
        coefficients: (K + 1,) for one input, or (Q, K + 1) for several: `Omega[:, o]` of a head.
        ax: Axes to draw on.
        limit: Embedding values run from -limit to limit.
    """
    ax = axes_or_new(ax)
    coefficients = np.atleast_2d(coefficients)
    embedding = np.linspace(-limit, limit, 500)
    curves = chebyshev.chebval(np.tanh(embedding), coefficients.T)
    for i, curve in enumerate(curves):
        ax.plot(embedding, curve, color=CYCLE[i % len(CYCLE)], lw=1.4, alpha=0.9)
    ax.axhline(0, color=MUTED, lw=0.8)
    ax.set(xlabel="embedding value $e$", ylabel="contribution to the logit", xlim=(-limit, limit))
    ax.set_title(f"Φ of degree {coefficients.shape[1] - 1}: {len(curves)} learnable activation(s)")
    return ax


def phi_fit(degree: int = 12, target: str = "bump", ax: Axes | None = None) -> Axes:
    """How well one Chebyshev activation of a degree follows a target shape, by least squares.

    Args:
        degree: K; 1 is a linear layer on tanh(e).
        target: A key of `TARGETS`.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax)
    x = np.cos(np.linspace(np.pi, 0, 400))
    wanted = TARGETS[target](x)
    fitted = chebyshev.chebval(x, chebyshev.chebfit(x, wanted, degree))
    error = np.sqrt(np.mean((fitted - wanted) ** 2))
    ax.plot(x, wanted, color=MUTED, lw=4, alpha=0.5, label=f"target: {target}")
    ax.plot(x, fitted, color=VERMILION, label=f"Φ of degree {degree}")
    ax.set(xlabel="x = tanh(embedding)", ylabel="Φ(x)", xlim=(-1, 1), ylim=(-1.5, 1.5))
    ax.set_title(f"degree {degree}: {degree + 1} weights, rms error {error:.3f}")
    ax.legend(loc="upper left")
    return ax


def score_threshold(
    scores: np.ndarray, threshold: float, tumor_share: np.ndarray | None = None, ax: Axes | None = None
) -> Axes:
    """How the tiles' scores are spread and where the threshold cuts them.

    Args:
        scores: (N,) one score a tile.
        threshold: Tiles at or above it are kept.
        tumor_share: (N,) share of tumor in each tile: tumor tiles are then drawn apart, with their recall.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax)
    bins = np.linspace(np.min(scores), np.max(scores), 31)
    kinds = {"all tiles": np.ones(len(scores), bool)}
    if tumor_share is not None:
        tumor = np.asarray(tumor_share) > 0
        kinds = {"other tiles": ~tumor, "tumor tiles": tumor}
        recall = f"{np.mean(scores[tumor] >= threshold):.0%}" if tumor.any() else "the slide has none"
        ax.set_title(f"tumor tiles kept: {recall}")
    for (name, members), color in zip(kinds.items(), (BLUE, VERMILION), strict=False):
        weights = np.full(members.sum(), 1 / max(members.sum(), 1))
        ax.hist(scores[members], bins, weights=weights, color=color, alpha=0.55, label=name)
    ax.legend()
    ax.axvline(threshold, color=INK, lw=1.5, ls="--")
    ax.set(xlabel=f"score; kept at {threshold:.3g} and above", ylabel="share of tiles of a kind")
    return ax


def training_curves(history: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """A trainer's history in three panels: loss and its terms, validation AUC, keep ratio.

    Args:
        history: One row an epoch, as `train_model` returns it: `epoch`, `train_<term>`, `train_loss`,
            `val_loss`, `val_auc`, `keep_ratio`.
        axes: Three axes.
    """
    if axes is None:
        axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")[1]
    epoch = history["epoch"]
    axes[0].plot(epoch, history["train_loss"], color=INK, label="training, sum")
    axes[0].plot(epoch, history["val_loss"], color=VERMILION, label="validation")
    terms = [c for c in history if c.startswith("train_") and c != "train_loss"]
    for term in terms:
        axes[0].plot(epoch, history[term], lw=1.1, ls="--", label=term.removeprefix("train_"))
    axes[0].legend(fontsize=8)
    axes[1].plot(epoch, history["val_auc"])
    axes[2].plot(epoch, history["keep_ratio"], color=GREEN)
    for ax, label in zip(axes, ("loss", "validation AUC", "share of tiles kept"), strict=True):
        ax.set(xlabel="epoch", ylabel=label)
    axes[1].set_ylim(0, 1.02)
    axes[2].set_ylim(0, 1.02)
    return axes


def roc(labels: Sequence[np.ndarray], scores: Sequence[np.ndarray], ax: Axes | None = None) -> Axes:
    """ROC curves of a cross-validation: one thin line a fold, the pooled one thick.

    Args:
        labels: For each fold, 0 or 1 a slide.
        scores: For each fold, the probability of class 1 a slide.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax, (4.2, 4.0))
    ax.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=":")
    for fold, (truth, score) in enumerate(zip(labels, scores, strict=True)):
        rates = roc_curve(truth, score)
        ax.plot(rates[0], rates[1], color=BLUE, lw=0.9, alpha=0.45, label="one fold" if fold == 0 else None)
    truth, score = np.concatenate(labels), np.concatenate(scores)
    rates = roc_curve(truth, score)
    ax.plot(
        rates[0], rates[1], color=VERMILION, lw=2.2, label=f"pooled, AUC {roc_auc_score(truth, score):.3f}"
    )
    ax.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1), ylim=(0, 1.01))
    ax.set_aspect("equal")
    ax.legend(loc="lower right")
    return ax


def stage_times(seconds: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Table 2 as bars: seconds a slide by stage, one bar a method.

    Args:
        seconds: Index: methods; columns: stages in order; values: mean seconds a slide.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax, (6.4, 0.7 + 0.55 * len(seconds)))
    left = np.zeros(len(seconds))
    for i, stage in enumerate(seconds):
        values = seconds[stage].fillna(0).to_numpy()
        ax.barh(seconds.index, values, left=left, color=CYCLE[i % len(CYCLE)], label=stage, height=0.6)
        left = left + values
    for row, total in enumerate(left):
        saved = f"  {total:.2f} s" + (f" (−{1 - total / left[0]:.0%})" if row and total < left[0] else "")
        ax.text(total, row, saved, va="center", fontsize=9)
    ax.set(xlabel="seconds a slide", xlim=(0, left.max() * 1.25))
    ax.invert_yaxis()
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(seconds.columns), borderaxespad=0.2)
    return ax


def cost_growth(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Seconds a slide against its tiles, both logarithmic, with the slope of each line: 1 is proportional.

    Args:
        table: Index: tiles of the slides; columns: methods; values: seconds.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax)
    for i, (name, seconds) in enumerate(table.items()):
        slope = np.polyfit(np.log(table.index), np.log(seconds), 1)[0]
        ax.plot(table.index, seconds, marker="osD^v"[i % 5], ms=5, label=f"{name}, slope {slope:.2f}")
    ax.set(xscale="log", yscale="log", xlabel="tiles of the slide", ylabel="seconds a slide")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_minor_formatter(NullFormatter())
    ax.set_xticks(table.index)
    ax.legend(loc="upper left")
    return ax


def keep_ratio_curve(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy against the share of tiles read, one line a method.

    Args:
        table: Columns `method`, `keep_ratio` (share), `auc`, and optionally `auc_sd`.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax)
    for i, (method, rows) in enumerate(table.groupby("method", sort=False)):
        rows = rows.sort_values("keep_ratio")
        errors = rows.get("auc_sd")
        color, marker = CYCLE[i % len(CYCLE)], "osD^v"[i % 5]
        ax.errorbar(
            rows["keep_ratio"], rows["auc"], errors, color=color, marker=marker, capsize=3, label=method
        )
    ax.set(xlabel="share of tiles kept", ylabel="AUC", xlim=(0, 1.03))
    ax.legend(loc="lower right")
    return ax


def method_scores(table: pd.DataFrame, ax: Axes | None = None, *, metric: str = "auc") -> Axes:
    """Methods side by side: mean over folds with its standard deviation, and every fold as a dot.

    Args:
        table: One row a method and fold, with columns `method` and `metric`.
        ax: Axes to draw on.
        metric: Column to show, in [0, 1].
    """
    groups = table.groupby("method", sort=False)[metric]
    mean, sd = groups.mean(), groups.std()
    ax = axes_or_new(ax, (6.4, 0.8 + 0.42 * len(mean)))
    for row, (_, values) in enumerate(groups):
        ax.scatter(values, np.full(len(values), row), color=MUTED, s=14, alpha=0.7, zorder=1)
    ax.errorbar(mean, np.arange(len(mean)), xerr=sd, fmt="o", color=VERMILION, capsize=4, ms=7, zorder=2)
    ax.set_yticks(np.arange(len(mean)), mean.index)
    if table[metric].min() < 0.5 < table[metric].max():
        ax.axvline(0.5, color=MUTED, lw=1, ls=":")
    ax.set(xlabel=f"{metric.upper()} (mean ± sd over folds; dots: folds)")
    ax.invert_yaxis()
    return ax
