"""What laboratories share: controls above a figure whose artists are made once and then moved.

A slider of a laboratory draws nothing anew. The parts of the figure that stay are painted once and kept as
pixels; a step paints the moving artists over them. `film` draws the same artists at several values in one
figure, for places without widgets.
"""

import io
import traceback
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import ipywidgets as w
import numpy as np
import traitlets as t
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).parent
DPI = 90
MOST_COLUMNS = 4
"""Entries of a film's legend in one line."""


class Picture(anywidget.AnyWidget):
    """A PNG on which the pointer may draw.

    A stroke arrives as a message `{"points": [[x, y], ...]}`: places from 0 to 1, from the left and the top.

    Attributes:
        value: The picture as PNG.
        drawn_on: Whether strokes of the pointer are sent.
    """

    _esm = (HERE / "picture.js").read_text(encoding="utf-8")

    value = t.Bytes(b"").tag(sync=True)
    drawn_on = t.Bool(False).tag(sync=True)


class Laboratory(w.VBox):
    """Controls above one figure; moving a control moves the artists of the figure.

    A subclass says what is drawn once, `draw`, and what a step changes, `move`.

    Attributes:
        controls: The widgets with a `value`, by name.
        axes: The panels of the figure.
        artists: What moves, by name.
        picture: The figure as it stands.
        error: What went wrong in the last step, or "".
    """

    size: tuple[float, float] = (9, 3.6)
    """Width and height of the figure in inches."""
    panels: tuple[float, ...] = (1, 1)
    """Relative widths of the panels."""
    film_size: tuple[float, float] = (3.2, 5.4)
    """Width and height of one state of a film in inches."""
    film_in_rows: ClassVar[bool] = False
    """Whether the states of a film stand one under the other, each with its panels in a row."""
    drawn_on: ClassVar[bool] = False
    """Whether the pointer draws on the figure."""

    def __init__(self, **controls: w.Widget):
        self.controls = controls
        self.picture = Picture(drawn_on=self.drawn_on)
        self.error = w.HTML()
        for control in controls.values():
            control.style.description_width = "initial"
            control.observe(self._changed, names="value")
        figure = Figure(figsize=self.size, dpi=DPI, layout="constrained")
        self._canvas = FigureCanvasAgg(figure)
        self.axes: Sequence[Axes] = figure.subplots(
            1, len(self.panels), width_ratios=self.panels, squeeze=False
        )[0]
        self.artists = self.draw(self.axes)
        self.move(self.artists, **self.values)
        self._paint_background()
        super().__init__([self.header(), self.picture, self.error])
        self.step()

    @abstractmethod
    def draw(self, axes: Sequence[Axes]) -> dict[str, Artist]:
        """Draw everything once.

        Args:
            axes: One for each of `panels`.

        Returns:
            The artists that `move` changes, by name.
        """

    @abstractmethod
    def move(self, artists: Mapping[str, Any], *args: Any, **values: Any) -> None:
        """Bring the artists to values of the controls."""

    def header(self) -> w.Widget:
        """What stands above the figure: by default the controls in a row."""
        return w.HBox(list(self.controls.values()), layout=w.Layout(flex_flow="row wrap"))

    @property
    def values(self) -> dict[str, Any]:
        """The values of the controls, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def step(self) -> None:
        """Move the artists to the values of the controls and show the figure."""
        self.move(self.artists, **self.values)
        self._canvas.restore_region(self._background)
        for artist in self._in_order():
            artist.draw(self._canvas.get_renderer())
        buffer = io.BytesIO()
        pixels = np.asarray(self._canvas.buffer_rgba())[..., :3]
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        self.picture.value = buffer.getvalue()

    def film(self, states: Sequence[Mapping[str, Any]]) -> Figure:
        """The laboratory at several values of its controls side by side, in one figure.

        The figure is not open in pyplot, so that a notebook shows it once, as the value of its cell.

        Args:
            states: Values of controls by name, of one state after another; a control that is not named keeps
                its present value.

        Raises:
            KeyError: A name is no control.
        """
        unknown = {name for state in states for name in state} - set(self.controls)
        if unknown:
            raise KeyError(f"no control {', '.join(sorted(unknown))}; choose from {', '.join(self.controls)}")
        n, n_panels = len(states), len(self.panels)
        width, height = self.film_size
        if self.film_in_rows:
            figure = Figure(figsize=(width, height * n), dpi=DPI, layout="constrained")
            grid = figure.subplots(n, n_panels, squeeze=False, width_ratios=self.panels)
        else:
            figure = Figure(figsize=(width * n, height), dpi=DPI, layout="constrained")
            grid = figure.subplots(n_panels, n, squeeze=False, height_ratios=self.panels)
        strips = grid if self.film_in_rows else grid.T
        for number, (axes, state) in enumerate(zip(strips, states, strict=True)):
            self.move(self.draw(axes), **(self.values | dict(state)))
            if number and not self.film_in_rows:
                for ax in axes:
                    ax.set_ylabel("")
        _one_legend(figure, strips)
        return figure

    def _in_order(self) -> list[Artist]:
        return sorted(self.artists.values(), key=lambda artist: artist.get_zorder())

    def _paint_background(self) -> None:
        """Paint what stays. The layout is settled once, for it takes longer than the painting."""
        figure = self._canvas.figure
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for artist in self.artists.values():
            artist.set_animated(True)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(figure.bbox)

    def _changed(self, _change: object) -> None:
        try:
            self.step()
        except Exception:
            self.error.value = f"<pre>{traceback.format_exc()}</pre>"
            raise
        self.error.value = ""


def _one_legend(figure: Figure, strips: np.ndarray) -> None:
    """Put the legends of the first state under the film, and take those of all states away."""
    entries: dict[str, Artist] = {}
    for number, axes in enumerate(strips):
        for legend in filter(None, (ax.get_legend() for ax in axes)):
            if number == 0:
                names = [text.get_text() for text in legend.get_texts()]
                entries |= dict(zip(names, legend.legend_handles, strict=True))
            legend.remove()
    if entries:
        columns = min(len(entries), MOST_COLUMNS)
        figure.legend([*entries.values()], [*entries], loc="outside lower center", ncols=columns)
