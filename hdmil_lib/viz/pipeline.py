"""The picture of the whole method that opens every notebook, with the step of that notebook highlighted."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, FancyBboxPatch, Rectangle
from numpy.polynomial.chebyshev import chebval

from hdmil_lib.viz.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, VERMILION, axes_or_new

WIDTH, HEIGHT = 1.5, 1.3
LIT_FILL, LIT_EDGE = "#fff3d6", ORANGE
Point = tuple[float, float]


def _slide(ax: Axes, x: float, y: float) -> None:
    ax.add_patch(Rectangle((x - 0.5, y - 0.26), 1.0, 0.52, fc="white", ec=MUTED, lw=1))
    ax.add_patch(Ellipse((x - 0.06, y), 0.62, 0.38, angle=12, fc=PURPLE, ec="none", alpha=0.55))
    ax.add_patch(Ellipse((x + 0.1, y + 0.03), 0.2, 0.14, fc=VERMILION, ec="none"))


def _tiles(ax: Axes, x: float, y: float, *, cell: float = 0.17, coarse: bool = False) -> None:
    shades = np.array([[0.2, 0.5, 0.3, 0.2], [0.4, 0.9, 0.7, 0.3], [0.2, 0.5, 0.4, 0.2]])
    for (row, column), shade in np.ndenumerate(shades):
        left, bottom = x + (column - 2) * cell, y + (row - 1.5) * cell
        gap = 0.0 if coarse else 0.03
        color = VERMILION if shade == shades.max() else PURPLE
        ax.add_patch(Rectangle((left, bottom), cell - gap, cell - gap, fc=color, ec="none", alpha=shade))


def _patches(ax: Axes, x: float, y: float) -> None:
    _tiles(ax, x, y, cell=0.11, coarse=True)


def _features(ax: Axes, x: float, y: float) -> None:
    heights = (0.25, 0.42, 0.15, 0.34, 0.5, 0.22, 0.38)
    for i, height in enumerate(heights):
        ax.add_patch(Rectangle((x + (i - 3.5) * 0.13, y - 0.25), 0.09, height, fc=BLUE, ec="none"))


def _teacher_student(ax: Axes, x: float, y: float) -> None:
    for offset, radius, color, letter in ((-0.3, 0.23, BLUE, "T"), (0.32, 0.18, GREEN, "S")):
        ax.add_patch(Circle((x + offset, y), radius, fc=color, ec="none"))
        ax.text(x + offset, y - 0.01, letter, color="white", ha="center", va="center", weight="bold")
    ax.add_patch(_arrow((x - 0.06, y), (x + 0.13, y), INK))


def _polynomials(ax: Axes, x: float, y: float) -> None:
    grid = np.linspace(-1, 1, 100)
    for degree, color in ((1, MUTED), (2, BLUE), (5, VERMILION)):
        ax.plot(x + 0.5 * grid, y + 0.24 * chebval(grid, np.eye(degree + 1)[degree]), color=color, lw=1.4)


def _network(ax: Axes, x: float, y: float) -> None:
    columns = [
        [(x - 0.4, y + h) for h in (-0.2, 0, 0.2)],
        [(x, y + h) for h in (-0.12, 0.12)],
        [(x + 0.4, y)],
    ]
    for left, right in zip(columns, columns[1:], strict=False):
        for start in left:
            for end in right:
                ax.plot(*zip(start, end, strict=True), color=MUTED, lw=0.9, zorder=2)
    for node in sum(columns, []):
        ax.add_patch(Circle(node, 0.06, fc=GREEN, ec="none", zorder=3))


def _stopwatch(ax: Axes, x: float, y: float) -> None:
    ax.add_patch(Rectangle((x - 0.05, y + 0.2), 0.1, 0.09, fc=INK, ec="none"))
    ax.add_patch(Circle((x, y - 0.03), 0.24, fc="white", ec=INK, lw=1.6))
    ax.plot([x, x, x + 0.11], [y + 0.13, y - 0.03, y + 0.04], color=VERMILION, lw=1.8, solid_capstyle="round")


def _roc(ax: Axes, x: float, y: float) -> None:
    grid = np.linspace(0, 1, 60)
    ax.plot([x - 0.4, x - 0.4, x + 0.4], [y + 0.26, y - 0.25, y - 0.25], color=MUTED, lw=1)
    ax.plot([x - 0.4, x + 0.4], [y - 0.25, y + 0.25], color=MUTED, lw=1, ls=":")
    ax.plot(x - 0.4 + 0.8 * grid, y - 0.25 + 0.5 * grid**0.22, color=BLUE, lw=1.8)


@dataclass(frozen=True)
class _Step:
    center: Point
    title: str
    caption: str
    icon: Callable[[Axes, float, float], None]


STEPS = {
    "slide": _Step((0.9, 2.75), "Slide", "gigapixel pyramid", _slide),
    "tiles": _Step((2.95, 2.75), "Tiles", "256 × 256, 0.5 µm/px", _tiles),
    "features": _Step((5.0, 2.75), "Features", "frozen encoder", _features),
    "dmin": _Step((7.05, 2.75), "DMIN", "teacher and student", _teacher_student),
    "cka": _Step((9.1, 2.75), "CKA classifier", "Chebyshev–KAN", _polynomials),
    "patches": _Step((2.95, 0.8), "Patches", "16 × 16, 8 µm/px", _patches),
    "lipn": _Step((5.0, 0.8), "LIPN", "which tiles matter?", _network),
    "inference": _Step((7.05, 0.8), "Fast inference", "kept tiles only", _stopwatch),
    "evaluation": _Step((9.1, 0.8), "Evaluation", "accuracy and seconds", _roc),
}


def _arrow(
    start: Point, end: Point, color: str = MUTED, *, bend: float = 0.0, dashed: bool = False
) -> FancyArrowPatch:
    return FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=11,
        color=color,
        lw=1.4,
        shrinkA=0,
        shrinkB=0,
        ls=(0, (3, 2)) if dashed else "-",
        connectionstyle=f"arc3,rad={bend}",
    )


def _connect(ax: Axes) -> None:
    half_w, half_h = WIDTH / 2 + 0.08, HEIGHT / 2 + 0.08
    rows = (("slide", "tiles", "features", "dmin", "cka"), ("patches", "lipn", "inference", "evaluation"))
    for row in rows:
        for left, right in zip(row, row[1:], strict=False):
            (x0, y), (x1, _) = STEPS[left].center, STEPS[right].center
            ax.add_patch(_arrow((x0 + half_w, y), (x1 - half_w, y)))
    (x0, y0), (x1, y1) = STEPS["slide"].center, STEPS["patches"].center
    ax.plot([x0, x0], [y0 - half_h, y1], color=MUTED, lw=1.4)
    ax.add_patch(_arrow((x0, y1), (x1 - half_w, y1)))
    (x0, y0), (x1, y1) = STEPS["dmin"].center, STEPS["lipn"].center
    ax.add_patch(_arrow((x0 - 0.5, y0 - half_h), (x1 + 0.5, y1 + half_h), GREEN, dashed=True))
    ax.text(5.62, 1.78, "masks teach", color=GREEN, fontsize=9, ha="right", va="center", style="italic")
    (x2, y2) = STEPS["tiles"].center
    ax.add_patch(_arrow((x1 - 0.5, y1 + half_h), (x2 + 0.5, y2 - half_h), GREEN))
    ax.text(3.62, 1.78, "chooses tiles", color=GREEN, fontsize=9, ha="right", va="center", style="italic")
    ax.add_patch(_arrow((x0 + 0.3, y0 - half_h), (x0 + 0.3, y1 + half_h)))
    ax.text(x0 + 0.42, 1.78, "weights", color=MUTED, fontsize=9, va="center", style="italic")


def pipeline(step: str | Collection[str] = (), ax: Axes | None = None) -> Axes:
    """The method from slide to result, with one or several steps highlighted.

    Args:
        step: Keys of `STEPS` to highlight: slide, tiles, features, dmin, cka, patches, lipn, inference,
            evaluation; none by default.
        ax: Axes to draw on; a new figure that is readable at 900 px if not given.

    Raises:
        ValueError: The picture has no such step.
    """
    lit = {step} if isinstance(step, str) else set(step)
    if unknown := lit - STEPS.keys():
        raise ValueError(f"no step {sorted(unknown)} in the pipeline; choose from {', '.join(STEPS)}")
    ax = axes_or_new(ax, (10, 3.6))
    _connect(ax)
    for name, item in STEPS.items():
        x, y = item.center
        on = name in lit
        box = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0.04,rounding_size=0.12",
            fc=LIT_FILL if on else "white",
            ec=LIT_EDGE if on else "#c9ccd2",
            lw=2.6 if on else 1.0,
        )
        ax.add_patch(box)
        item.icon(ax, x, y + 0.3)
        ax.text(x, y - 0.24, item.title, ha="center", va="center", fontsize=11, weight="bold", color=INK)
        ax.text(x, y - 0.5, item.caption, ha="center", va="center", fontsize=9, color=INK)
    ax.set(xlim=(0, 10), ylim=(0, 3.55), aspect="equal")
    ax.axis("off")
    return ax
