"""Laboratories on single curves: the Gumbel-sigmoid, and a Chebyshev fit to a curve that the reader draws."""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as w
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from numpy.polynomial import chebyshev
from scipy.special import expit, logit

from hdmil_lib.viz import plots
from hdmil_lib.viz.laboratories.base import Laboratory
from hdmil_lib.viz.style import BLUE, INK, MUTED, VERMILION

N_DRAWS = 200
"""Values of the noise for one tile."""
HIGHEST_DEGREE = 24
DRAWN = "drawn by you"


class GumbelSigmoid(Laboratory):
    """Temperature, threshold and the attention logit of one tile, on the figure of `plots.gumbel_sigmoid`.

    The right panel shows the soft mask of that tile for 200 values of the noise, one from each two-hundredth
    of its distribution.
    """

    size = (10.5, 3.8)
    panels = (2, 1)
    film_size = (3.1, 5.2)

    def __init__(self, tau: float = 0.7, gamma: float = 0.5, attention: float = -1.0, seed: int = 0):
        """Make the laboratory.

        Args:
            tau: Temperature at the start, 0.1 to 3.
            gamma: Threshold at the start, 0.05 to 0.95.
            attention: Attention logit of the tile at the start, -5 to 5.
            seed: Seed of the places of the dots from left to right.
        """
        self.noise = logit((np.arange(N_DRAWS) + 0.5) / N_DRAWS)
        self._sideways = np.random.default_rng(seed).random(N_DRAWS)
        super().__init__(
            tau=w.FloatSlider(tau, min=0.1, max=3.0, step=0.1, description="temperature τ"),
            gamma=w.FloatSlider(gamma, min=0.05, max=0.95, step=0.05, description="threshold γ"),
            attention=w.FloatSlider(attention, min=-5, max=5, step=0.25, description="attention logit a"),
        )

    def draw(self, axes: Sequence[Axes]) -> dict[str, Artist]:
        """Draw the static figure, the tile in it, and the draws."""
        left, right = axes
        plots.gumbel_sigmoid(ax=left)
        left.legend(loc="upper left", bbox_to_anchor=(0, -0.17), ncols=2)
        soft, chance, threshold = left.lines
        right.set(xlim=(-0.05, 1.05), ylim=(-0.02, 1.02), xticks=[], ylabel="soft mask of the tile")
        return {
            "kept": left.patches[0],
            "band": left.collections[0],
            "soft": soft,
            "chance": chance,
            "threshold": threshold,
            "name": left.texts[0],
            "title": left.set_title(" "),
            "tile": left.axvline(0, color=INK, lw=1),
            "dot": left.plot([], [], "o", color=VERMILION, ms=8, zorder=5)[0],
            "draws": right.scatter(self._sideways, np.zeros(N_DRAWS), s=12, alpha=0.8),
            "cut": right.axhline(0.5, color=MUTED, lw=1, ls="--"),
            "count": right.set_title(" \n "),
        }

    def move(
        self,
        artists: Mapping[str, Any],
        *,
        tau: float,
        gamma: float,
        attention: float,
    ) -> None:
        """Bring the curves, the tile and its draws to the settings."""
        curves, cut = plots.gumbel_curves(tau, gamma), np.clip(logit(gamma), -6, 6)
        artists["kept"].set(x=cut, width=6 - cut)
        artists["band"].set_data(curves["a"], curves["low"], curves["high"])
        artists["soft"].set_ydata(curves["soft"])
        artists["chance"].set_ydata(curves["chance"])
        artists["threshold"].set_ydata([gamma, gamma])
        artists["name"].set(y=gamma + 0.02, text=f"γ = {gamma:g}")
        artists["title"].set_text(f"τ = {tau:g}, γ = {gamma:g}, a = {attention:g}")
        chance = expit(attention - tau * logit(gamma))
        artists["tile"].set_xdata([attention, attention])
        artists["dot"].set_data([attention], [chance])
        masks = expit((attention + self.noise) / tau)
        artists["draws"].set_offsets(np.column_stack([self._sideways, masks]))
        artists["draws"].set_facecolors([VERMILION if mask > gamma else MUTED for mask in masks])
        artists["cut"].set_ydata([gamma, gamma])
        verdict = "kept" if expit(attention) > gamma else "dropped"
        artists["count"].set_text(
            f"training keeps it in {np.mean(masks > gamma):.0%};\nevaluation: {verdict}"
        )


class CurveFit(Laboratory):
    """A curve that the reader draws with the pointer, and the best Chebyshev activation of a degree for it.

    Attributes:
        x: Where the curve has its values, (400,), from -1 to 1.
        heights: The drawn curve, (400,).
    """

    size = (10, 3.8)
    film_size = (3.0, 5.0)
    drawn_on = True

    def __init__(self, degree: int = 12, target: str = "bump"):
        """Make the laboratory.

        Args:
            degree: Degree at the start, 1 to 24.
            target: A key of `plots.TARGETS`, the curve at the start.
        """
        self.x = plots.chebyshev_points()
        self.heights = plots.TARGETS[target](self.x)
        super().__init__(
            degree=w.IntSlider(degree, min=1, max=HIGHEST_DEGREE, description="degree K"),
            target=w.Dropdown(options=[*plots.TARGETS, DRAWN], value=target, description="curve"),
        )
        self.picture.on_msg(self._drawn)

    def header(self) -> w.Widget:
        """The controls, and what to do."""
        return w.VBox([super().header(), w.Label("Draw your own curve in the left panel with the pointer.")])

    def draw(self, axes: Sequence[Axes]) -> dict[str, Artist]:
        """Draw the static figure of the fit, and the weights beside it."""
        left, right = axes
        plots.phi_fit(ax=left)
        wanted, fitted = left.lines
        wanted.set_label("the curve to follow")
        fitted.set_label("best Φ of this degree")
        left.legend(loc="lower left")
        right.axhline(0, color=MUTED, lw=0.8)
        right.set(xlabel="k", ylabel="weight of $T_k$", xlim=(-1, HIGHEST_DEGREE + 1), ylim=(-1.5, 1.5))
        right.set_title("weight of each polynomial")
        return {
            "wanted": wanted,
            "fitted": fitted,
            "title": left.set_title(" "),
            "stems": right.vlines([], [], [], color=BLUE, lw=2),
            "heads": right.plot([], [], "o", color=BLUE, ms=4)[0],
        }

    def move(self, artists: Mapping[str, Any], *, degree: int, target: str) -> None:
        """Fit the curve."""
        wanted = self._curve(target)
        weights = chebyshev.chebfit(self.x, wanted, degree)
        fitted = chebyshev.chebval(self.x, weights)
        error = np.sqrt(np.mean((fitted - wanted) ** 2))
        artists["wanted"].set_ydata(wanted)
        artists["fitted"].set_ydata(fitted)
        artists["title"].set_text(f"K = {degree}: rms error {error:.3f}")
        k = np.arange(degree + 1)
        artists["stems"].set_segments([[(i, 0), (i, weight)] for i, weight in enumerate(weights)])
        artists["heads"].set_data(k, weights)

    def stroke(self, points: Sequence[Sequence[float]]) -> None:
        """Draw a line through points; the curve changes where the line passes, and stays elsewhere.

        Args:
            points: Places (x, y), in the order in which the line passes them; x from -1 to 1.
        """
        heights = self._curve(self.controls["target"].value).copy()
        for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[-1]], strict=True):
            if x1 < x0:
                x0, y0, x1, y1 = x1, y1, x0, y0
            between = (self.x >= x0) & (self.x <= x1)
            heights[between] = np.interp(self.x[between], [x0, x1], [y0, y1]) if x1 > x0 else y0
            heights[np.abs(self.x - x0).argmin()] = y0
        self.heights = heights.clip(-1.5, 1.5)
        if self.controls["target"].value == DRAWN:
            self.step()
        else:
            self.controls["target"].value = DRAWN

    def _curve(self, target: str) -> np.ndarray:
        return self.heights if target == DRAWN else plots.TARGETS[target](self.x)

    def _drawn(self, _widget: object, message: Mapping[str, Any], _buffers: object) -> None:
        """A stroke on the picture, in shares of its width and height."""
        box = self.axes[0].bbox
        width, height = self.axes[0].figure.canvas.get_width_height()
        pixels = np.asarray(message["points"], float) * (1, -1) + (0, 1)
        pixels *= (width, height)
        inside = (pixels[:, 0] >= box.x0) & (pixels[:, 0] <= box.x1)
        if inside.any():
            self.stroke(self.axes[0].transData.inverted().transform(pixels[inside]).tolist())
