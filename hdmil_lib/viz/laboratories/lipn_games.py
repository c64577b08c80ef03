"""A game on LIPN: the reader chooses the tiles to read, as the network does."""

from collections.abc import Sequence

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure

from hdmil_lib.slides.reader import Slide
from hdmil_lib.slides.tiling import TileGrid
from hdmil_lib.viz import plots
from hdmil_lib.viz.laboratories.base import DPI
from hdmil_lib.viz.style import INK, SOURCES
from hdmil_lib.viz.viewer import Overlay, SlideViewer

N_DRAWS = 2000
"""Random choices of tiles that the reader is compared with."""


def found_share(rows: np.ndarray, tumor_share: np.ndarray) -> float:
    """Tumor in some tiles, as a share of the most that as many tiles can hold.

    Args:
        rows: Rows of the tiles, (n,).
        tumor_share: Share of tumor in each tile, (N,).

    Returns:
        A number from 0 to 1; 0 if there is no tumor or no tile.
    """
    best = np.sort(tumor_share)[::-1][: len(rows)].sum()
    return float(tumor_share[rows].sum() / best) if best > 0 else 0.0


class BeatLIPN(w.VBox):
    """The reader clicks the tiles to read under a budget, and is scored against LIPN and against chance.

    Only the slide is shown until the budget is spent; then the tumor and LIPN's scores can be drawn over it.
    A click with the shift key held gives a tile back.

    Attributes:
        viewer: The slide.
        budget: Number of tiles to choose.
        scores: What was found, from 0 to 1, by "you", "LIPN" and "chance"; empty until the budget is spent.
    """

    def __init__(
        self,
        slide: Slide,
        grid: TileGrid,
        lipn: np.ndarray,
        tumor_share: np.ndarray,
        budget: int = 20,
        seed: int = 0,
        source: str = "LIPN",
    ):
        """Start a game.

        Args:
            slide: The open slide.
            grid: Its N tiles.
            lipn: LIPN's score of each tile, (N,).
            tumor_share: Share of tumor in each tile, (N,), with some tumor in it.
            budget: Number of tiles to choose; at most N.
            seed: Seed of the random choices.
            source: Key of `style.SOURCES` of this LIPN, whose color its tiles get.

        Raises:
            ValueError: There is no tumor, or the numbers do not fit.
        """
        self.lipn, self.tumor_share = np.asarray(lipn, float), np.asarray(tumor_share, float)
        if not self.lipn.shape == self.tumor_share.shape == (len(grid),):
            raise ValueError(f"one score and one share of tumor are needed for each of the {len(grid)} tiles")
        if not 1 <= budget <= len(grid) or not self.tumor_share.any():
            raise ValueError(f"a budget of 1 to {len(grid)} tiles and a slide with tumor are needed")
        self.grid, self.source = grid, source
        self.budget, self.scores = budget, dict[str, float]()
        generator = np.random.default_rng(seed)
        draws = [generator.permutation(len(grid))[:budget] for _ in range(N_DRAWS)]
        self._one_draw = generator.permutation(len(grid))
        self._chance = np.array([found_share(rows, self.tumor_share) for rows in draws])
        self.viewer = SlideViewer(slide, grid)
        self.viewer.observe(self._clicked, names=["selected"])
        self.viewer.observe(self._chosen, names=["region"])
        again = w.Button(description="start again")
        again.on_click(lambda _button: self.restart())
        self.status = w.HTML()
        self.bars = {name: _bar(name, color) for name, color in _COLORS.items()}
        super().__init__([self.viewer, w.HBox([again, self.status]), w.VBox(list(self.bars.values()))])
        self.restart()

    def restart(self) -> None:
        """Take all tiles back."""
        self.scores = {}
        for name in ("tumor", "LIPN"):
            self.viewer.drop_overlay(name)
        self.viewer.selected = None
        self.viewer.region = []
        self._show()

    def film(self, budgets: Sequence[int]) -> Figure:
        """What LIPN and one random draw choose at several budgets, for places without widgets.

        The figure is not open in pyplot, so that a notebook shows it once, as the value of its cell.

        Args:
            budgets: Numbers of tiles, one column each.
        """
        choices = {"LIPN": np.argsort(-self.lipn, kind="stable"), "one random draw": self._one_draw}
        colors = {"LIPN": SOURCES[self.source]["color"], "one random draw": INK}
        figure = Figure(figsize=(3.4 * len(budgets), 6.2), dpi=DPI, layout="constrained")
        grid = figure.subplots(2, len(budgets), squeeze=False)
        for row, (name, order) in zip(grid, choices.items(), strict=True):
            for ax, budget in zip(row, budgets, strict=True):
                plots.truth_overlay(self.grid, self.tumor_share, ax)
                for tile in order[:budget]:
                    plots.mark_tile(self.grid, tile, ax, color=colors[name])
                found = found_share(order[:budget], self.tumor_share)
                ax.set_title(f"{name}, {budget} tiles:\n{found:.0%} of what they can hold")
                ax.get_legend().remove()
        return figure

    def _clicked(self, change: dict[str, int | None]) -> None:
        """Choose the tile."""
        row = change["new"]
        if row is not None and not self.scores and row not in self.viewer.region:
            self.viewer.region = [*self.viewer.region, row]

    def _chosen(self, _change: object) -> None:
        if not self.scores and len(self.viewer.region) >= self.budget:
            self._score()
        self._show()

    def _score(self) -> None:
        mine = np.array(self.viewer.region[: self.budget])
        theirs = np.argsort(-self.lipn, kind="stable")[: self.budget]
        self.scores = {
            "you": found_share(mine, self.tumor_share),
            "LIPN": found_share(theirs, self.tumor_share),
            "chance": float(self._chance.mean()),
        }
        self.viewer.set_overlay("tumor", Overlay(self.tumor_share, "share"))
        self.viewer.set_overlay("LIPN", Overlay(self.lipn, "rank"))
        self.viewer.overlay = "tumor"

    def _show(self) -> None:
        for name, bar in self.bars.items():
            bar.value = self.scores.get(name, 0.0)
            bar.layout.visibility = "visible" if self.scores else "hidden"
            bar.description = f"{name} {bar.value:.0%}"
        n = len(self.viewer.region)
        if not self.scores:
            self.status.value = f"Click the tiles that you would read: {n} of {self.budget} chosen."
            self.status.value += " A click with the shift key held gives a tile back."
            return
        beaten = (self._chance < self.scores["you"]).mean()
        self.status.value = (
            f"You found {self.scores['you']:.0%} of the tumor that {self.budget} tiles can hold, more than "
            f"{beaten:.0%} of {N_DRAWS:,} random choices."
        )


_COLORS = {
    "you": SOURCES["ground truth"]["color"],
    "LIPN": SOURCES["LIPN"]["color"],
    "chance": SOURCES["random"]["color"],
}


def _bar(name: str, color: str) -> w.FloatProgress:
    style = {"bar_color": color, "description_width": "8em"}
    return w.FloatProgress(min=0, max=1, description=name, style=style, layout=w.Layout(width="60%"))
