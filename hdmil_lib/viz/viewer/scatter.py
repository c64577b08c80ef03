"""A scatter plot of the tiles' features, in which a click on a point shows the tile in the viewer."""

from typing import Any

import anywidget
import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import traitlets as t

from hdmil_lib.viz.style import SEQUENTIAL
from hdmil_lib.viz.viewer.slide_viewer import HERE, SlideViewer


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


def link_scatter(
    viewer: SlideViewer, points: np.ndarray, values: np.ndarray | None = None
) -> ipywidgets.VBox:
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
    return ipywidgets.VBox([viewer, scatter])
