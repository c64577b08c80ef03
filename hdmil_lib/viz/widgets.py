"""Widgets over the plot functions: moving a control draws the same figure again.

A figure is shown as an image below its controls, so that redrawing needs no special matplotlib backend. The
first drawing happens in the cell: an error there fails the cell. A later error is shown below the figure and
raised again.
"""

import io
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import ipywidgets as w
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure

from hdmil_lib.slides.reader import Slide
from hdmil_lib.slides.tiling import TileGrid
from hdmil_lib.viz import plots
from hdmil_lib.viz.overlays import OnGrid
from hdmil_lib.viz.style import BLUE, MUTED, VERMILION

if TYPE_CHECKING:  # drawing needs no model: its import would take seconds
    from hdmil_lib.inference.anytime import AnytimeStep


class Explorer(w.VBox):
    """Controls above one figure.

    Args:
        draw: Called with a figure and the controls' values by name; draws on the figure.
        size: Width and height of the figure in inches.
        live: Whether to redraw while a slider moves; if not, when it is released.
        controls: Widgets with a `value`.
    """

    def __init__(
        self,
        draw: Callable[..., object],
        size: tuple[float, float],
        *,
        live: bool = True,
        **controls: w.Widget,
    ):
        self.draw, self.size, self.controls = draw, size, controls
        self.image = w.Image(format="png", layout=w.Layout(max_width="100%", object_fit="scale-down"))
        self.error = w.HTML()
        for control in controls.values():
            control.style.description_width = "initial"
            if hasattr(control, "continuous_update"):
                control.continuous_update = live
            control.observe(self._changed, names="value")
        super().__init__([w.HBox(list(controls.values())), self.image, self.error])
        self.redraw()

    def redraw(self) -> None:
        """Draw the figure from the controls' present values."""
        figure = Figure(figsize=self.size, layout="constrained")
        self.draw(figure, **{name: control.value for name, control in self.controls.items()})
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=plt.rcParams["figure.dpi"])
        self.image.value = buffer.getvalue()

    def _changed(self, _change: object) -> None:
        try:
            self.redraw()
        except Exception:
            self.error.value = f"<pre>{traceback.format_exc()}</pre>"
            raise
        self.error.value = ""


class LiveSlide(w.VBox):
    """A slide while it is classified: seconds of each stage, tiles read, and the answer so far.

    Args:
        classes: Class names.
    """

    STAGES = ("thumbnail", "lipn", "crop", "features", "dmin")

    def __init__(self, classes: Sequence[str]):
        self.tiles = _bar("tiles", MUTED)
        self.stages = {name: _bar(name, BLUE) for name in self.STAGES}
        self.answer = [_bar(f"P({name})", VERMILION) for name in classes]
        self.status = w.HTML()
        columns = [
            w.VBox([w.HBox(list(pair)) for pair in bars])
            for bars in (self.stages.values(), [self.tiles, *self.answer])
        ]
        super().__init__([w.HBox(columns), self.status])

    def show(self, step: "AnytimeStep") -> None:
        """Set every bar to the state of a step."""
        n_read, total = len(step.rows), step.seconds["total"]
        _set_bar(self.tiles, n_read / step.n_tiles, f"{n_read:,} of {step.n_tiles:,}")
        for name, pair in self.stages.items():
            seconds = step.seconds.get(name, 0.0)
            _set_bar(pair, seconds / total, f"{seconds:.2f} s")
        for pair, probability in zip(self.answer, step.probabilities, strict=True):
            _set_bar(pair, float(probability), f"{probability:.3f}")
        self.status.value = f"{total:.1f} s" + (f", stopped: {step.end}" if step.end else "")


def _bar(name: str, color: str) -> tuple[w.FloatProgress, w.Label]:
    bar = w.FloatProgress(min=0, max=1, description=name, style={"bar_color": color})
    return bar, w.Label(layout=w.Layout(width="9em"))


def _set_bar(pair: tuple[w.FloatProgress, w.Label], value: float, text: str) -> None:
    pair[0].value, pair[1].value = min(value, 1.0), text


def watch(steps: "Generator[AnytimeStep, None, None]", classes: Sequence[str]) -> "AnytimeStep":
    """Show a slide while it is classified; the notebook's stop button ends it.

    Args:
        steps: Steps of `HDMIL.stream`, at least one.
        classes: Class names.

    Returns:
        The last step.
    """
    live = LiveSlide(classes)
    display(live)
    with closing(steps):
        for step in steps:
            live.show(step)
    return step


def mask_on_slide(
    grid: OnGrid, scores: np.ndarray, tumor_share: np.ndarray | None = None, keep_ratio: float = 0.6
) -> Explorer:
    """The keep ratio r: which tiles are kept, and the threshold on the scores that keeps them.

    Args:
        grid: A `TileGrid`, `Prediction` or `Bag`.
        scores: Score of each tile, (N,): its highest LIPN output, or attention, over the branches.
        tumor_share: Share of tumor in each tile, (N,), to show what is lost; only for teaching.
        keep_ratio: Keep ratio at the start.
    """

    def draw(figure: Figure, keep_ratio: float) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        threshold = np.quantile(scores, 1 - keep_ratio)
        plots.kept_overlay(grid, scores >= threshold, left)
        plots.score_threshold(scores, threshold, tumor_share, right)

    slider = w.FloatSlider(keep_ratio, min=0.05, max=1.0, step=0.05, description="keep ratio r")
    return Explorer(draw, (10, 4.4), live=False, keep_ratio=slider)


def tile_browser(slide: Slide, grid: TileGrid, scores: np.ndarray | None = None) -> Explorer:
    """The tiles of a slide, one at a time: the place on the slide, the tile, and its patch.

    Args:
        slide: The slide, which must stay open while the widget is used.
        grid: The tiles of the slide.
        scores: Score of each tile, (N,): tiles then come highest first.
    """
    order = np.arange(len(grid)) if scores is None else np.argsort(-np.asarray(scores))

    def draw(figure: Figure, position: int) -> None:
        i = int(order[position])
        place, *pair = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
        plots.mark_tile(grid, i, plots.slide_overview(grid.thumbnail, grid.patch_mpp, place))
        place.set_title(f"tile {i}" + ("" if scores is None else f", score {scores[i]:.3g}"))
        plots.tile_and_patch(grid.read_tile(slide, i), grid.patches[i], pair)

    name = "tile" if scores is None else "rank of the tile"
    slider = w.IntSlider(0, min=0, max=len(grid) - 1, description=name, layout=w.Layout(width="60%"))
    return Explorer(draw, (10, 3.4), live=False, position=slider)


def program_grid() -> Explorer:
    """Which program of a kernel owns which elements, and the share of elements that a mask hides."""
    sizes = [16, 32, 64, 128]
    return Explorer(
        lambda figure, rows, columns, height, width: plots.program_grid(
            rows, columns, (height, width), figure.subplots()
        ),
        (6.4, 3.2),
        rows=w.IntSlider(100, 1, 300, description="rows"),
        columns=w.IntSlider(300, 1, 600, description="columns"),
        height=w.Dropdown(options=sizes, value=32, description="block rows"),
        width=w.Dropdown(options=sizes, value=64, description="block columns"),
    )
