"""A scatter plot of the tiles' features, in which a click on a point shows the tile in the viewer."""

import base64
import io
from typing import Any

import anywidget
import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import traitlets as t
from PIL import Image, ImageDraw

from hdmil_lib.viz.style import INK, MUTED, ORANGE, SEQUENTIAL
from hdmil_lib.viz.viewer.slide_viewer import HERE, SlideViewer

MARGIN = 12
"""Pixels between a point and the edge of the plot, as in `scatter.js`."""


class TileScatter(anywidget.AnyWidget):
    """One point per tile, of which a click selects the nearest.

    Attributes:
        selected: Row of the selected tile, or None.
        region: Rows of marked tiles.
        size: Side of the plot in pixels.
    """

    _esm = (HERE / "scatter.js").read_text(encoding="utf-8")

    selected = t.Int(None, allow_none=True).tag(sync=True)
    region = t.List(t.Int()).tag(sync=True)
    size = t.Int(360, min=100).tag(sync=True)
    _points = t.Bytes(b"").tag(sync=True)
    _colors = t.Bytes(b"").tag(sync=True)

    def __init__(self, points: np.ndarray, values: np.ndarray | None = None, **traits: Any):
        """Make a plot.

        Args:
            points: Places of the tiles in the plane, (N, 2), such as the first principal components.
            values: Values of the tiles, (N,), which color the points by rank.
            **traits: Values of the traits above.

        Raises:
            ValueError: The shapes do not fit.
        """
        points = np.asarray(points, np.float64)
        values = np.zeros(len(points)) if values is None else np.asarray(values, np.float64)
        if points.ndim != 2 or points.shape[1] != 2 or values.shape != (len(points),):
            raise ValueError(
                f"points are {points.shape} and values {values.shape}; (N, 2) and (N,) are needed"
            )
        low, high = points.min(axis=0), points.max(axis=0)
        scaled = (points - low) / np.where(high > low, high - low, 1)
        ranks = values.argsort().argsort() / max(len(values) - 1, 1)
        colors = plt.get_cmap(SEQUENTIAL)(ranks if np.ptp(values) else np.full(len(values), 0.3))
        super().__init__(
            _points=scaled.astype("<f4").tobytes(),
            _colors=np.rint(255 * colors[:, :3]).astype(np.uint8).tobytes(),
            **traits,
        )


class LinkedScatter(ipywidgets.VBox):
    """A viewer with a scatter plot of its tiles below; places without widgets get a picture of both.

    Args:
        viewer: The viewer.
        scatter: The plot.
    """

    def __init__(self, viewer: SlideViewer, scatter: TileScatter):
        self.viewer, self.scatter = viewer, scatter
        super().__init__([viewer, scatter])

    def frame(self, side: int = 360) -> bytes:
        """The viewer's frame and the plot beside each other as PNG.

        Args:
            side: Side of the plot, and longer side of the frame, in pixels.
        """
        picture = Image.open(io.BytesIO(self.viewer.frame(side)))
        points = np.frombuffer(self.scatter._points, "<f4").reshape(-1, 2)
        colors = np.frombuffer(self.scatter._colors, np.uint8).reshape(-1, 3)
        both = Image.new("RGB", (picture.width + 16 + side, max(picture.height, side)), "white")
        both.paste(picture, (0, 0))
        draw = ImageDraw.Draw(both)
        left, reach = picture.width + 16, side - 2 * MARGIN
        draw.rectangle((left, 0, left + side - 1, side - 1), outline=MUTED)
        places = np.c_[left + MARGIN + points[:, 0] * reach, side - MARGIN - points[:, 1] * reach]
        for place, color in zip(places, colors.tolist(), strict=True):
            draw.circle(tuple(place), 5, fill=tuple(color))
        for row in self.scatter.region:
            draw.circle(tuple(places[row]), 7, outline=INK, width=2)
        if self.scatter.selected is not None:
            draw.circle(tuple(places[self.scatter.selected]), 9, outline=ORANGE, width=3)
        buffer = io.BytesIO()
        both.save(buffer, "PNG")
        return buffer.getvalue()

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return super()._repr_mimebundle_(**kwargs) | {"image/png": base64.b64encode(self.frame()).decode()}


def link_scatter(viewer: SlideViewer, points: np.ndarray, values: np.ndarray | None = None) -> LinkedScatter:
    """Put a scatter plot under a viewer: a click in one selects in both, and marked tiles are marked in both.

    Args:
        viewer: A viewer with a grid of N tiles.
        points: Places of the tiles in the plane, (N, 2).
        values: Values of the tiles, (N,), which color the points by rank.

    Returns:
        Both widgets.

    Raises:
        ValueError: There is not one point per tile.
    """
    if len(points) != viewer.n_tiles:
        raise ValueError(
            f"{len(points)} points, but the viewer has {viewer.n_tiles} tiles; one each is needed"
        )
    scatter = TileScatter(points, values)
    for name in ("selected", "region"):
        t.link((viewer, name), (scatter, name))
    return LinkedScatter(viewer, scatter)
