"""One look for every figure: colors that color-blind readers can tell apart (Okabe and Ito 2008), thin axes.

seaborn keeps its theme in matplotlib's settings, so `use_style` sets the theme of its figures too, without
the seconds that importing seaborn takes: maps on a slide are drawn without it.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from typing import TypedDict

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.rcsetup import cycler

INK = "#2b2f36"
MUTED = "#8a8f98"
PALE = "#eceef1"
ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, VERMILION, PURPLE = "#0072b2", "#d55e00", "#cc79a7"
CYCLE = (BLUE, VERMILION, PURPLE, ORANGE, SKY, GREEN, INK)
MARKERS = "osD^vP*"
SEQUENTIAL = "viridis"


class Look(TypedDict):
    """How the line of a method or source is drawn."""

    color: str
    marker: str
    ls: str


SOURCES: Mapping[str, Look] = {
    "ground truth": {"color": VERMILION, "marker": "D", "ls": "-."},
    "DMIN attention": {"color": BLUE, "marker": "o", "ls": "-"},
    "LIPN": {"color": GREEN, "marker": "s", "ls": "-"},
    "LIPN, evidence": {"color": "#6fa30e", "marker": "v", "ls": "--"},
    "random": {"color": INK, "marker": "^", "ls": ":"},
}
"""What chooses the tiles that are read, from the most informed to the least, and how its line is drawn.

These colors mean the same in every figure: vermilion the tumor, blue DMIN, green LIPN.
"""

METHODS: Mapping[str, Look] = {
    "hdmil_dagger": SOURCES["DMIN attention"],
    "hdmil": SOURCES["LIPN"],
    "hdmil_evidence": SOURCES["LIPN, evidence"],
    "random": SOURCES["random"],
}
"""The systems whose answers differ by what chooses their tiles: they have its color and line."""

STAGES: Mapping[str, str] = {
    "thumbnail": MUTED,
    "lipn": SOURCES["LIPN"]["color"],
    "crop": SKY,
    "features": PURPLE,
    "dmin": SOURCES["DMIN attention"]["color"],
}
"""Colors of the stages of inference, in their order."""

STAGE_NAMES: Mapping[str, str] = {"lipn": "LIPN", "crop": "cropping", "features": "encoding", "dmin": "DMIN"}
"""What figures call the stages whose keys are no plain words."""


def use_style() -> None:
    """Make this look the default of matplotlib and seaborn; notebooks call it once in their set-up cell."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 90,
            "figure.facecolor": "white",
            "savefig.dpi": 150,
            "savefig.bbox": "tight",
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": MUTED,
            "axes.facecolor": "white",
            "axes.grid": False,
            "axes.labelcolor": INK,
            "axes.linewidth": 0.8,
            "axes.prop_cycle": cycler(color=CYCLE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "image.cmap": SEQUENTIAL,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "legend.title_fontsize": 9,
            "lines.linewidth": 1.8,
            "xtick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.color": MUTED,
            "ytick.labelcolor": INK,
        }
    )


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in this look within a block, and leave matplotlib's settings as they were."""
    with plt.rc_context():
        use_style()
        yield


def axes_or_new(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    """The caller's axes, or those of a new figure of `size` inches."""
    if ax is not None:
        return ax
    return plt.subplots(figsize=size, layout="constrained")[1]


def plain(text: object) -> str:
    """Text that matplotlib draws as it is, never as markup.

    Names of slides, classes and methods come from files: a `$` in them would start a formula, and a byte that
    is no UTF-8 could not be drawn.
    """
    return str(text).encode("utf-8", "replace").decode().replace("$", r"\$")


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Color, marker and line style of each name: those of `SOURCES` and `METHODS`, others get a free color.

    Vermilion, the color of tumor, is never free.
    """
    names = list(names)
    known = {name: look for name, look in {**SOURCES, **METHODS}.items() if name in names}
    taken = {VERMILION} | {look["color"] for look in known.values()}
    free = cycle([color for color in CYCLE if color not in taken])
    markers = cycle(MARKERS)
    return {
        name: known.get(name) or {"color": next(free), "marker": next(markers), "ls": "-"} for name in names
    }
