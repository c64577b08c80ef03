"""Every figure of the course: each function draws one idea on `ax`, labels its axes and returns them."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.polynomial import chebyshev
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score, roc_curve

from hdmil_lib.viz.hardware import coalescing, gpu_times, occupancy, program_grid, roofline
from hdmil_lib.viz.overlays import (
    attention_overlay,
    gallery,
    kept_overlay,
    mark_tile,
    prediction_figure,
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
    STAGE_NAMES,
    STAGES,
    VERMILION,
    axes_or_new,
    looks,
    plain,
    use_style,
)

__all__ = [
    "attention_overlay",
    "chebyshev_polynomials",
    "coalescing",
    "cost_growth",
    "cost_of_screening",
    "gallery",
    "gpu_times",
    "gumbel_sigmoid",
    "keep_ratio_curve",
    "kept_overlay",
    "mark_tile",
    "method_scores",
    "occupancy",
    "phi",
    "phi_fit",
    "pipeline",
    "prediction_figure",
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


def gumbel_curves(tau: float, gamma: float) -> dict[str, np.ndarray]:
    """The curves of `gumbel_sigmoid`: logits `a` and, at each, `low`, `high`, `soft` and `chance`."""
    a = np.linspace(-6, 6, 400)
    low, high = (expit((a + logit(quantile)) / tau) for quantile in (0.05, 0.95))
    chance = expit(a - tau * logit(gamma))
    return {"a": a, "low": low, "high": high, "soft": expit(a / tau), "chance": chance}


def gumbel_sigmoid(tau: float = 0.7, gamma: float = 0.5, ax: Axes | None = None) -> Axes:
    """From attention logit to mask (paper, section 3.2): the noisy soft mask and the chance to be kept.

    The difference of two Gumbel variables is logistic, so the band and the chance are exact:
    P(kept | a) = sigmoid(a - tau * logit(gamma)). At evaluation there is no noise, and a tile is kept where
    sigmoid(a) > gamma: on the shaded side.

    Args:
        tau: Temperature of the sigmoid in training, > 0.
        gamma: Threshold on the soft mask, in (0, 1).
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax)
    curves = gumbel_curves(tau, gamma)
    a = curves["a"]
    ax.axvspan(np.clip(logit(gamma), -6, 6), 6, color=PALE, label="kept at evaluation")
    ax.fill_between(
        a, curves["low"], curves["high"], color=BLUE, alpha=0.18, lw=0, label="soft mask, 90 % of the noise"
    )
    ax.plot(a, curves["soft"], color=BLUE, label="soft mask without noise")
    ax.plot(a, curves["chance"], color=VERMILION, label="chance of being kept in training")
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
    norm = Normalize(0, max(degree, 1))
    for k in range(degree + 1):
        color = plt.get_cmap(SEQUENTIAL)(norm(k))
        ax.plot(x, chebyshev.chebval(x, np.eye(degree + 1)[k]), color=color, lw=1.3)
    bar = ax.figure.colorbar(plt.cm.ScalarMappable(norm, SEQUENTIAL), ax=ax, pad=0.02)
    bar.set_label("k")
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    ax.set(xlabel="x = tanh(embedding)", ylabel="$T_k(x)$", xlim=(-1, 1), ylim=(-1.08, 1.08))
    ax.set_title(f"Chebyshev polynomials up to degree {degree}")
    return ax


def phi(coefficients: np.ndarray, ax: Axes | None = None, *, limit: float = 3.0) -> Axes:
    """What a CKA head does to single embedding values: sum_k T_k(tanh e) * coefficient k.

    Args:
        coefficients: (K + 1,) for one input, or (Q, K + 1) for several: `Omega[:, o]` of a head.
        ax: Axes to draw on.
        limit: Largest embedding value, and minus the smallest one.
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


def chebyshev_points(n: int = 400) -> np.ndarray:
    """Points of [-1, 1] that lie closer together towards the ends, in rising order, (n,)."""
    return np.cos(np.linspace(np.pi, 0, n))


def phi_fit(degree: int = 12, target: str = "bump", ax: Axes | None = None) -> Axes:
    """How well one Chebyshev activation of a degree follows a target shape, by least squares.

    Args:
        degree: Degree K; 1 is a linear layer on tanh(e).
        target: A key of `TARGETS`.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax)
    x = chebyshev_points()
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
    """Histogram of the scores of a slide's tiles, and where the threshold cuts it.

    Args:
        scores: One score per tile, (N,).
        threshold: Tiles with this score or a higher one are kept.
        tumor_share: Share of tumor in each tile, (N,): tumor tiles are then drawn apart, with their recall.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax)
    kinds, colors = np.full(len(scores), "all tiles"), {"all tiles": BLUE}
    if tumor_share is not None:
        tumor = np.asarray(tumor_share) > 0
        kinds = np.where(tumor, "tumor tiles", "other tiles")
        colors = {"other tiles": BLUE, "tumor tiles": VERMILION}
        recall = f"{np.mean(scores[tumor] >= threshold):.0%}" if tumor.any() else "the slide has none"
        ax.set_title(f"tumor tiles kept: {recall}")
    sns.histplot(
        x=scores,
        hue=kinds,
        palette=colors,
        hue_order=colors,
        bins=30,
        stat="proportion",
        common_norm=False,
        element="step",
        alpha=0.4,
        ax=ax,
    )
    ax.axvline(threshold, color=INK, lw=1.5, ls="--")
    ax.set(xlabel=f"score; kept at {threshold:.3g} and above", ylabel="share of the tiles of each kind")
    return ax


def training_curves(history: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """The history of a training in three panels: loss and its terms, validation AUC, keep ratio.

    Args:
        history: One row per epoch, as in `history.csv`: `epoch`, `train_<term>`, `train_loss`, `val_loss`,
            `val_auc`, `keep_ratio`.
        axes: Three axes.
    """
    if axes is None:
        axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")[1]
    names = {"train_loss": "training, sum", "val_loss": "validation"}
    terms = [c for c in history if c.startswith("train_") and c not in names]
    names |= {term: plain(term.removeprefix("train_")) for term in terms}
    losses = history.set_index("epoch")[list(names)].rename(columns=names)
    colors = [color for color in CYCLE if color not in (INK, VERMILION)]
    palette = [INK, VERMILION, *(colors[i % len(colors)] for i in range(len(terms)))]
    sns.lineplot(losses, palette=palette, lw=1.6, dashes=["", ""] + [(3, 1)] * len(terms), ax=axes[0])
    sns.lineplot(history, x="epoch", y="val_auc", color=BLUE, ax=axes[1])
    sns.lineplot(history, x="epoch", y="keep_ratio", color=GREEN, ax=axes[2])
    for ax, label in zip(axes, ("loss", "validation AUC", "share of tiles kept"), strict=True):
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    sns.move_legend(axes[0], "lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, title=None)
    for ax in axes[1:]:
        ax.set_ylim(0, 1.02)
    return axes


def roc(labels: Sequence[np.ndarray], scores: Sequence[np.ndarray], ax: Axes | None = None) -> Axes:
    """ROC curves of a cross-validation: a thin gray line per fold, a thick one for all slides together.

    Args:
        labels: For each fold, the label of each slide, 0 or 1.
        scores: For each fold, the probability of class 1 of each slide.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax, (4.2, 4.0))
    ax.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=":")
    for fold, (truth, score) in enumerate(zip(labels, scores, strict=True)):
        ax.plot(*roc_curve(truth, score)[:2], color=MUTED, lw=1, label=None if fold else "one fold")
    truth, score = np.concatenate(labels), np.concatenate(scores)
    pooled = f"pooled, AUC {roc_auc_score(truth, score):.3f}"
    ax.plot(*roc_curve(truth, score)[:2], color=BLUE, lw=2.2, label=pooled)
    ax.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1), ylim=(0, 1.01))
    ax.set_aspect("equal")
    ax.legend(loc="lower right")
    return ax


def stage_times(seconds: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Table 2 as bars: seconds per slide by stage, one bar per method.

    Args:
        seconds: Mean seconds per slide, methods by stages, both in the order in which they are drawn. A
            column "total" is the number written beside a bar, where it is not the sum of the stages, as with
            medians.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax, (6.4, 0.7 + 0.55 * len(seconds)))
    totals = (seconds["total"] if "total" in seconds else seconds.sum(axis=1)).to_numpy()
    seconds = seconds.drop(columns="total", errors="ignore")
    names = seconds.rename(index=plain, columns=lambda stage: plain(STAGE_NAMES.get(stage, stage)))
    colors = [STAGES.get(stage, CYCLE[i % len(CYCLE)]) for i, stage in enumerate(seconds)]
    names.plot.barh(stacked=True, color=colors, width=0.6, ax=ax)
    for row, total in enumerate(totals):
        saved = f" (−{1 - total / totals[0]:.0%})" if row and total < totals[0] else ""
        ax.text(total, row, f"  {total:.2f} s{saved}", va="center", fontsize=9)
    ax.set(xlabel="seconds per slide", ylabel="", xlim=(0, totals.max() * 1.25))
    ax.invert_yaxis()
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(seconds.columns), borderaxespad=0.2)
    return ax


def cost_growth(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Seconds per slide against its tiles, both logarithmic; a line of slope 1 is proportional.

    Args:
        table: Seconds by the number of tiles of the slides (index) and by method (columns).
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax)
    for name, look in looks(table).items():
        slope = np.polyfit(np.log(table.index), np.log(table[name]), 1)[0]
        ax.plot(table.index, table[name], label=f"{plain(name)}, slope {slope:.2f}", **look)
    ax.set(xscale="log", yscale="log", xlabel="tiles of the slide", ylabel="seconds per slide")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_minor_formatter(NullFormatter())
    ax.set_xticks(table.index)
    ax.legend(loc="upper left")
    return ax


def keep_ratio_curve(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """AUC against the share of tiles read, one line per method.

    Args:
        table: Columns `method`, `keep_ratio` (share of tiles) and `auc`. Several rows of one method and
            ratio, such as those of folds, become their mean in a band of ± one standard deviation. Methods
            that are keys of `SOURCES` have their colors.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax)
    for method, look in looks(table["method"].unique()).items():
        rows = table[table["method"] == method]
        sns.lineplot(rows, x="keep_ratio", y="auc", errorbar="sd", label=plain(method), ms=7, ax=ax, **look)
    ax.set(xlabel="share of tiles read", ylabel="AUC", xlim=(0, 1.03))
    ax.legend(loc="lower right")
    return ax


def cost_of_screening(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """AUC against the milliseconds that a tile of the slide costs on average, one line per way to choose.

    Args:
        table: Columns `source` (what chooses the tiles), `milliseconds` per tile of the slide, the screening
            of all tiles and the reading of some in full together, and `auc`.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax)
    for source, look in looks(table["source"].unique()).items():
        rows = table[table["source"] == source].sort_values("milliseconds")
        ax.plot(rows["milliseconds"], rows["auc"], label=plain(source), ms=6, **look)
    ax.set(xscale="log", xlabel="milliseconds per tile of the slide", ylabel="AUC")
    ax.set_xticks([0.25, 0.5, 1, 2, 4])
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(loc="lower right")
    return ax


def method_scores(table: pd.DataFrame, ax: Axes | None = None, *, metric: str = "auc") -> Axes:
    """Methods side by side: mean over folds with its standard deviation, and every fold as a dot.

    Args:
        table: One row per method and fold, with columns `method` and `metric`.
        ax: Axes to draw on.
        metric: Column to show, in [0, 1].
    """
    places = {"x": table[metric], "y": table["method"].map(plain)}
    ax = axes_or_new(ax, (6.4, 0.8 + 0.42 * table["method"].nunique()))
    look = {"color": BLUE, "marker": "D", "ms": 6, "ls": "none", "err_kws": {"lw": 1.8}}
    sns.pointplot(**places, errorbar="sd", capsize=0.2, ax=ax, **look)
    sns.stripplot(**places, color=MUTED, size=5, linewidth=0.6, edgecolor="white", jitter=False, ax=ax)
    if table[metric].min() < 0.5 < table[metric].max():
        ax.axvline(0.5, color=MUTED, lw=1, ls=":")
    ax.set(xlabel=f"{metric.upper()} (mean ± sd over folds; dots: folds)", ylabel="")
    return ax
