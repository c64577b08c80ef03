"""Figures of the statistics: scores by fold, reliability, intervals, chance, AUC against the tiles read."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from scipy.stats import binomtest

from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.evaluation.out_of_fold import align_methods
from hdmil_lib.evaluation.reliability import expected_calibration_error, reliability
from hdmil_lib.evaluation.statistics import SIGNIFICANT, format_p
from hdmil_lib.methods import title
from hdmil_lib.viz.style import BLUE, INK, MUTED, PALE, SOURCES, VERMILION, axes_or_new, looks, plain

__all__ = [
    "SOURCES",
    "auc_intervals",
    "chance_plot",
    "difference_intervals",
    "reliability_plot",
    "score_against_keep_ratio",
    "scores_by_fold",
]


def reliability_plot(
    predictions: pd.DataFrame,
    ax: Axes | None = None,
    *,
    bins: int = 10,
    classes: Sequence[str] = ("normal", "tumor"),
) -> Axes:
    """Observed frequency against predicted probability, in bins with an equal number of slides.

    Calibrated probabilities lie on the diagonal. Bars are 95 % Wilson intervals of the frequency; the legend
    gives expected calibration errors.

    Args:
        predictions: Test predictions of a cross-validation; each method becomes a line, so choose a few.
        ax: Axes to draw on.
        bins: Number of bins.
        classes: Class names. With two, the figure is about the probability of the second; with more, about
            that of the predicted class.
    """
    ax = axes_or_new(ax, (6.4, 5.4))
    slides = align_methods(predictions)
    ax.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=":")
    ax.annotate("calibrated", (0.47, 0.5), color=MUTED, rotation=45, ha="center", va="center")
    for method, look in looks(slides.probabilities).items():
        answers = slides.labels, slides.probabilities[method]
        table = reliability(*answers, bins=bins)
        error = expected_calibration_error(*answers, bins=bins)
        hits = (table["observed"] * table["n_slides"]).round().astype(int)
        pairs = zip(hits, table["n_slides"], strict=True)
        low, high = np.transpose([binomtest(k, n).proportion_ci(method="wilson") for k, n in pairs])
        ax.vlines(table["predicted"], low, high, color=look["color"], lw=1, alpha=0.45)
        label = f"{plain(title(method))}: ECE {100 * error:.1f} %"
        ax.plot(table["predicted"], table["observed"], lw=1.4, label=label, **look)
    binary = len(next(iter(slides.probabilities.values())).T) == 2
    ax.set(
        xlabel=plain(f"predicted probability of {classes[1]}")
        if binary
        else "probability of the predicted class",
        ylabel=plain(f"share of slides with {classes[1]}")
        if binary
        else "share of slides predicted correctly",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    ax.set_aspect("equal")
    ax.legend(loc="upper left")
    return ax


def auc_intervals(scores: pd.DataFrame, ax: Axes | None = None, *, reference: str = "hdmil") -> Axes:
    """Pooled AUC of each method with its confidence interval, best first, against a reference.

    The mark of a method is filled where its adjusted p, which compares AUCs within folds, is below 0.05.

    Args:
        scores: The table of `score_table`.
        ax: Axes to draw on.
        reference: The reference of that table; its interval is shaded, its AUC a line.

    Raises:
        ValueError: The table has no row of the reference.
    """
    if reference not in scores.index:
        raise ValueError(
            f"reference '{reference}' is not in the table; choose from {', '.join(scores.index)}"
        )
    scores = scores.sort_values("pooled_auc", ascending=False, kind="stable")
    ax = axes_or_new(ax, (7.2, 0.9 + 0.38 * len(scores)))
    center = scores.loc[reference]
    ax.axvspan(center["pooled_low"], center["pooled_high"], color=PALE, zorder=0)
    ax.axvline(center["pooled_auc"], color=MUTED, lw=1, ls="--", zorder=1)
    for row, (method, line) in enumerate(scores.iterrows()):
        differs = bool(line["p_holm"] < SIGNIFICANT)
        ax.hlines(row, line["pooled_low"], line["pooled_high"], color=INK, lw=1.8)
        filled = INK if differs or method == reference else "white"
        marker = "D" if method == reference else "o"
        ax.plot(line["pooled_auc"], row, marker, ms=7, color=INK, mfc=filled, mew=1.6, zorder=3)
        note = "reference" if method == reference else format_p(line["p_holm"]) + " *" * differs
        ax.text(1.02, row, note, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
    ax.text(1.02, -1, "p (Holm)", transform=ax.get_yaxis_transform(), va="center", fontsize=9, weight="bold")
    ax.set_yticks(np.arange(len(scores)), [plain(title(name)) for name in scores.index])
    ax.tick_params(axis="y", length=0)
    ax.set(
        xlabel=f"pooled AUC with confidence interval (filled: p < {SIGNIFICANT:g})",
        ylim=(len(scores) - 0.4, -0.6),
    )
    return ax


def difference_intervals(scores: pd.DataFrame, ax: Axes | None = None, *, reference: str = "hdmil") -> Axes:
    """AUC of each method minus that of a reference, within folds, with its interval, best first.

    The mark of a method is filled where its adjusted p is below 0.05.

    Args:
        scores: The table of `score_table`.
        ax: Axes to draw on; differences are in points, hundredths of an AUC.
        reference: The reference of that table; it gets no row.

    Raises:
        ValueError: The table has no row of the reference.
    """
    if reference not in scores.index:
        raise ValueError(
            f"reference '{reference}' is not in the table; choose from {', '.join(scores.index)}"
        )
    others = scores.drop(index=reference).sort_values("difference", ascending=False, kind="stable")
    ax = axes_or_new(ax, (7.2, 0.9 + 0.38 * len(others)))
    ax.axvline(0, color=MUTED, lw=1, ls="--")
    for row, (_, line) in enumerate(others.iterrows()):
        value, low, high = 100 * line[["difference", "difference_low", "difference_high"]].astype(float)
        differs = bool(line["p_holm"] < SIGNIFICANT)
        ax.hlines(row, low, high, color=INK, lw=1.8)
        ax.plot(value, row, "o", ms=7, color=INK, mfc=INK if differs else "white", mew=1.6, zorder=3)
        note = format_p(line["p_holm"]) + " *" * differs
        ax.text(1.02, row, note, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
    ax.text(1.02, -1, "p (Holm)", transform=ax.get_yaxis_transform(), va="center", fontsize=9, weight="bold")
    ax.set_yticks(np.arange(len(others)), [plain(title(name)) for name in others.index])
    ax.tick_params(axis="y", length=0)
    ax.set(
        xlabel=f"AUC minus that of {plain(title(reference))}, points (filled: p < {SIGNIFICANT:g})",
        ylim=(len(others) - 0.4, -0.6),
    )
    return ax


def scores_by_fold(
    predictions: pd.DataFrame, ax: Axes | None = None, *, classes: Sequence[str] = ("normal", "tumor")
) -> Axes:
    """Probability of the second of two classes for each test slide, fold by fold, with the AUC of the fold.

    Args:
        predictions: Test predictions of one method of a cross-validation.
        ax: Axes to draw on; the slides of the first class stand left in their fold, the others right.
        classes: Class names.
    """
    ax = axes_or_new(ax, (7.2, 3.4))
    folds = sorted(predictions["fold"].unique())
    for place, fold in enumerate(folds):
        part = predictions[predictions["fold"] == fold]
        for label, color in enumerate((BLUE, VERMILION)):
            p = np.sort(part.loc[part["label"] == label, "p_1"])
            x = place + 0.4 * (label - 0.5) + np.resize([-0.06, 0.0, 0.06], len(p))
            ax.plot(x, p, "o", ms=4, color=color, alpha=0.7, mew=0)
        value = auc(part["label"].to_numpy(), part[["p_0", "p_1"]].to_numpy())
        ax.text(place, 1.06, f"AUC {value:.2f}", ha="center", fontsize=9)
    for label, color in enumerate((BLUE, VERMILION)):
        ax.plot([], [], "o", ms=5, color=color, label=plain(classes[label]))
    ax.set_xticks(range(len(folds)), [f"fold {fold}" for fold in folds])
    ax.set(ylabel=plain(f"probability of {classes[1]}"), ylim=(-0.03, 1.15))
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return ax


def chance_plot(samples: np.ndarray, measured: float, ax: Axes | None = None, *, xlabel: str = "AUC") -> Axes:
    """What luck alone gives, as a histogram, beside the measured value; the central 95 % are shaded.

    Args:
        samples: Values under the assumption that there is nothing to find, (B,).
        measured: The measured value.
        ax: Axes to draw on.
        xlabel: Name of the value.
    """
    ax = axes_or_new(ax, (5.6, 2.6))
    low, high = np.quantile(samples, (0.025, 0.975))
    ax.hist(samples, bins=30, color=PALE, edgecolor=MUTED, lw=0.6)
    ax.axvspan(low, high, color=MUTED, alpha=0.2, label="95 % of the repeats")
    ax.axvline(measured, color=INK, lw=2, label=f"measured: {measured:.3g}")
    ax.set(xlabel=xlabel, ylabel="number of repeats")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return ax


def score_against_keep_ratio(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """AUC as fewer tiles are read, by what chooses them: mean over folds, with a bar of ± one deviation.

    The bars of one budget stand side by side, so that none hides another.

    Args:
        table: One row per source, keep ratio and fold: `source` (a key of `SOURCES`), `keep_ratio` (share of
            tiles read, in (0, 1]), `auc`.
        ax: Axes to draw on; shares run from 1 on the left down on a logarithmic scale.

    Raises:
        ValueError: A source is unknown, or a keep ratio does not lie in (0, 1].
    """
    if unknown := sorted(set(table["source"]) - set(SOURCES)):
        raise ValueError(f"source: there is no {', '.join(unknown)}; choose from {', '.join(SOURCES)}")
    if not table["keep_ratio"].between(0, 1, inclusive="right").all():
        raise ValueError("keep_ratio: give shares in (0, 1]; other values have no place on the axis")
    ax = axes_or_new(ax)
    shown = [name for name in SOURCES if name in set(table["source"])]
    for place, source in enumerate(shown):
        folds = table[table["source"] == source].groupby("keep_ratio")["auc"]
        mean, deviation = folds.mean(), folds.std().fillna(0)
        look = SOURCES[source]
        beside = mean.index * 1.025 ** (place - (len(shown) - 1) / 2)
        ax.plot(beside, mean, label=source, ms=7, mec="white", mew=0.8, zorder=3, **look)
        barred = (mean.index < 1) | (place == 0)  # all tiles are the same for all sources
        low, high = mean - deviation, np.minimum(mean + deviation, 1)
        ax.vlines(beside[barred], low[barred], high[barred], color=look["color"], alpha=0.5)
    ratios = np.sort(table["keep_ratio"].unique())
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(ratios.tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set(
        xlabel="share of tiles read (logarithmic)",
        ylabel="AUC (mean ± sd over folds)",
        xlim=(ratios[-1] * 1.12, ratios[0] / 1.12),
    )
    ax.legend(title="tiles chosen by", loc="lower left", alignment="left", frameon=True, edgecolor="none")
    return ax
