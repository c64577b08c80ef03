"""One look for every figure: colors that the color-blind tell apart (Okabe and Ito), thin axes, SI units."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

INK = "#2b2f36"
MUTED = "#8a8f98"
PALE = "#eceef1"
ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, VERMILION, PURPLE = "#0072b2", "#d55e00", "#cc79a7"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
SEQUENTIAL = "viridis"


def use_style() -> None:
    """Make this look matplotlib's default; notebooks call it once in their set-up cell."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 90,
            "savefig.dpi": 150,
            "savefig.bbox": "tight",
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "axes.linewidth": 0.8,
            "axes.prop_cycle": plt.cycler(color=CYCLE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "image.cmap": SEQUENTIAL,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "xtick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.color": MUTED,
            "ytick.labelcolor": INK,
        }
    )


def axes_or_new(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    """The caller's axes, or those of a new figure of `size` inches."""
    if ax is not None:
        return ax
    return plt.subplots(figsize=size, layout="constrained")[1]
