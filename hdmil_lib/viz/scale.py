"""Figures of runs that several workers share: who did what when, and what limits more workers."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from hdmil_lib.viz.style import INK, MUTED, PALE, VERMILION, axes_or_new, looks, plain


def worker_timeline(done: pd.DataFrame, ax: Axes | None = None, *, killed: float | None = None) -> Axes:
    """The slides of each process as bars over time, a row and a color per process in the order of their ids.

    Args:
        done: One row per slide: `pid`, `begin` and `end`, in seconds since the run began. Rows with a true
            `lost` are slides that a killed process did not end. With a column `slide_id`, bars that are wide
            enough have its name, and lost slides always.
        ax: Axes to draw on.
        killed: When a process was killed, in seconds since the run began.
    """
    lost = done["lost"].eq(True) if "lost" in done else pd.Series(False, done.index)
    processes = sorted(done["pid"].unique())
    ax = axes_or_new(ax, (8, 0.9 + 0.45 * len(processes)))
    for row, look in enumerate(looks(map(str, processes)).values()):
        for rows, color, edge, hatch in (
            (~lost, look["color"], "white", ""),
            (lost, PALE, VERMILION, "////"),
        ):
            own = done[rows & (done["pid"] == processes[row])]
            width = own["end"] - own["begin"]
            ax.barh(row, width, left=own["begin"], color=color, edgecolor=edge, hatch=hatch)
    if "slide_id" in done:
        _name_bars(ax, done.assign(lost=lost, row=done["pid"].map(processes.index)))
    if killed is not None:
        ax.axvline(killed, color=VERMILION, lw=1.5, ls="--")
        ax.annotate(
            "SIGKILL", (killed, -0.55), color=VERMILION, ha="center", va="bottom", annotation_clip=False
        )
    ax.set_yticks(range(len(processes)), [f"process {pid}" for pid in processes])
    ax.set(xlabel="seconds since the run began", xlim=(0, None), ylim=(len(processes) - 0.5, -0.5))
    return ax


def _name_bars(ax: Axes, slides: pd.DataFrame) -> None:
    wide = 0.045 * slides["end"].max()
    for slide in slides.itertuples():
        name = plain(slide.slide_id)
        if slide.lost:
            ax.text(slide.end, slide.row, f"  {name} lost", color=VERMILION, va="center")
        elif slide.end - slide.begin > wide:
            middle = (slide.begin + slide.end) / 2
            ax.text(middle, slide.row, name, color="white", fontsize=8, ha="center", va="center")


def saturation(
    per_core: Mapping[str, float], limits: Mapping[str, float], ax: Axes | None = None, *, most: int = 1024
) -> Axes:
    """What many cores together read over each network, at most what it gives; both axes logarithmic.

    The line of a work branches off at each network: beyond that dot, whose number of cores is written beside
    it, more cores only wait.

    Args:
        per_core: MB/s that one core reads, by the name of the work.
        limits: MB/s that a storage or network gives, by its name.
        ax: Axes to draw on.
        most: Largest number of cores.
    """
    ax = axes_or_new(ax)
    cores = np.geomspace(1, most, 50)
    for name, look in looks(per_core).items():
        ax.plot(cores, cores * per_core[name], color=look["color"], label=plain(name))
        for full in (limit / per_core[name] for limit in limits.values()):
            if 1 <= full <= most:
                height = full * per_core[name]
                ax.plot([full, most], [height, height], color=look["color"], lw=3.5, alpha=0.35)
                ax.plot(full, height, "o", ms=6, color=look["color"])
                ax.annotate(f"{int(full):,}", (full, height), (-5, 4), textcoords="offset points", ha="right")
    for name, limit in limits.items():
        ax.axhline(limit, color=MUTED, lw=1, ls=":", zorder=0)
        ax.text(1.1, limit * 1.08, plain(name), color=INK, fontsize=9, va="bottom")
    ax.set(xscale="log", yscale="log", xlabel="cores, one worker each", ylabel="MB/s read from the slides")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.legend(loc="lower right")
    return ax
