"""Laboratories on the tiles that are read: teacher and student, LIPN's threshold, maps of all methods."""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as w
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from scipy.special import logit
from sklearn.metrics import roc_auc_score

from hdmil_lib.viz import plots
from hdmil_lib.viz.laboratories.base import Laboratory
from hdmil_lib.viz.overlays import PIXELS, OnGrid, attention_cells, kept_cells, kept_title, truth_cells
from hdmil_lib.viz.style import BLUE, INK, MUTED, VERMILION, plain

TUMOR = 0.5
"""Share of tumor from which on a tile counts as a tumor tile."""
FURTHEST = 12.0
"""Log odds at which points are held, on either side."""


class TeacherStudent(Laboratory):
    """The answer from all tiles against the answer from a share r of them, one dot per slide, as r falls."""

    size = (10, 4.0)
    film_size = (3.0, 5.8)

    def __init__(
        self,
        ratios: Sequence[float],
        teacher: np.ndarray,
        student: Mapping[str, np.ndarray],
        labels: Sequence[int],
        classes: Sequence[str] = ("normal", "tumor"),
    ):
        """Make the laboratory.

        Args:
            ratios: Shares of tiles read, (R,), rising.
            teacher: Probability of the second of two classes from all tiles, (S,), one per slide.
            student: For each way to choose the tiles, the probability from each share of them, (R, S).
            labels: True class index of each slide, (S,), of both classes.
            classes: Class names.

        Raises:
            ValueError: The shapes do not fit.
        """
        self.ratios, self.labels, self.classes = list(ratios), np.asarray(labels), classes
        self.student = {name: np.asarray(values, float) for name, values in student.items()}
        self.teacher = _log_odds(np.asarray(teacher, float))
        shape = (len(self.ratios), len(self.labels))
        wrong = [name for name, values in self.student.items() if values.shape != shape]
        if wrong or self.teacher.shape != shape[1:]:
            raise ValueError(f"{shape[0]} shares and {shape[1]} slides need probabilities of shape {shape}")
        rows = [
            (name, ratio, roc_auc_score(self.labels, answers))
            for name, values in self.student.items()
            for ratio, answers in zip(self.ratios, values, strict=True)
        ]
        self.aucs = pd.DataFrame(rows, columns=["method", "keep_ratio", "auc"])
        super().__init__(
            r=w.SelectionSlider(
                options=[(f"{ratio:.0%}", ratio) for ratio in self.ratios],
                value=self.ratios[-1],
                description="share r of tiles read",
            ),
            tiles=w.Dropdown(options=list(self.student), description="tiles"),
        )

    def draw(self, axes: Sequence[Axes]) -> dict[str, Artist]:
        """Draw the teacher's answers and the AUC by share."""
        left, right = axes
        left.axline((0, 0), slope=1, color=MUTED, lw=1, ls=":")
        left.axhline(0, color=MUTED, lw=0.8)
        left.axvline(0, color=MUTED, lw=0.8)
        reach = (
            max(np.abs(self.teacher).max(), *(np.abs(_log_odds(p)).max() for p in self.student.values()))
            + 0.5
        )
        left.set(xlim=(-reach, reach), ylim=(-reach, reach))
        left.set(xlabel="teacher, log odds, all tiles", ylabel="student, log odds, share r")
        dots = {}
        for label, color in enumerate((BLUE, VERMILION)):
            x = self.teacher[self.labels == label]
            name = plain(f"true class: {self.classes[label]}")
            dots[f"dots {label}"] = left.scatter(x, x, s=20, color=color, alpha=0.75, label=name, zorder=3)
        left.legend(loc="lower right")
        plots.keep_ratio_curve(self.aucs, right)
        return dots | {
            "title": left.set_title(" \n "),
            "here": right.plot([], [], "o", ms=13, mfc="none", mec=INK, mew=2, zorder=5, clip_on=False)[0],
            "auc": right.set_title(" "),
        }

    def move(self, artists: Mapping[str, Any], *, r: float, tiles: str) -> None:
        """Bring the students' answers to a share and a way to choose."""
        answers = _log_odds(self.student[tiles][self.ratios.index(r)])
        for label in (0, 1):
            part = self.labels == label
            artists[f"dots {label}"].set_offsets(np.column_stack([self.teacher[part], answers[part]]))
        changed = int(((answers > 0) != (self.teacher > 0)).sum())
        artists["title"].set_text(f"r = {r:.0%}, {tiles}:\n{changed} of {len(answers)} labels change")
        found = self.aucs[(self.aucs["method"] == tiles) & (self.aucs["keep_ratio"] == r)]["auc"]
        artists["here"].set_data([r], found)
        artists["auc"].set_text(f"AUC {found.iloc[0]:.3f}")


class LIPNThreshold(Laboratory):
    """The threshold on LIPN's scores: which tiles of a slide are read, what is lost, and the time saved."""

    size = (12, 3.8)
    panels = (1.3, 1, 0.8)
    film_size = (3.4, 7.2)

    def __init__(
        self,
        grid: OnGrid,
        scores: np.ndarray,
        seconds: tuple[float, float],
        tumor_share: np.ndarray | None = None,
        keep_ratio: float = 0.6,
    ):
        """Make the laboratory.

        Args:
            grid: A `TileGrid`, `Prediction` or `Bag` of N tiles.
            scores: Score of each tile, (N,): its highest LIPN output over the branches.
            seconds: Seconds for the slide that do not depend on the tiles read, and seconds per tile read.
            tumor_share: Share of tumor in each tile, (N,), to show what is lost; only for teaching.
            keep_ratio: Share of tiles kept at the start.

        Raises:
            ValueError: There is not one score per tile.
        """
        self.grid, self.scores, self.seconds = grid, np.asarray(scores, float), seconds
        if self.scores.shape != (len(grid.rowcol),):
            raise ValueError(f"{len(grid.rowcol)} tiles need as many scores, not {self.scores.shape}")
        self.tumor_share = None if tumor_share is None else np.asarray(tumor_share, float)
        slider = w.FloatSlider(keep_ratio, min=0.05, max=1.0, step=0.05, description="keep ratio r")
        super().__init__(keep_ratio=slider)

    def draw(self, axes: Sequence[Axes]) -> dict[str, Artist]:
        """Draw slide, histogram and time at the lowest threshold."""
        place, histogram, time = axes
        plots.kept_overlay(self.grid, np.ones(len(self.scores), bool), place)
        plots.score_threshold(self.scores, self.scores.min(), self.tumor_share, histogram)
        histogram.set_xlabel("score; dashed: the threshold")
        whole = self._seconds(len(self.scores))
        bars = time.barh(["all tiles", "kept tiles"], [whole, whole], color=[MUTED, BLUE], height=0.5)
        time.invert_yaxis()
        time.set(xlabel="seconds for the slide", xlim=(0, 1.05 * whole))
        return {
            "map": place.images[1],
            "count": place.set_title(" ", pad=22),
            "threshold": histogram.lines[-1],
            "recall": histogram.set_title(" \n "),
            "bar": bars[1],
            "saved": time.set_title(" "),
        }

    def move(self, artists: Mapping[str, Any], *, keep_ratio: float) -> None:
        """Cut at the threshold that keeps a share of the tiles."""
        threshold = np.quantile(self.scores, 1 - keep_ratio)
        kept = self.scores >= threshold
        artists["map"].set_data(kept_cells(self.grid, kept))
        artists["count"].set_text(kept_title(kept))
        artists["threshold"].set_xdata([threshold, threshold])
        artists["recall"].set_text(f"threshold {threshold:.3g}{self._lost(kept)}")
        needed, whole = self._seconds(int(kept.sum())), self._seconds(len(kept))
        artists["bar"].set_width(needed)
        artists["saved"].set_text(f"{needed:.2f} s, {1 - needed / whole:.0%} saved")

    def _seconds(self, n_read: int) -> float:
        return self.seconds[0] + self.seconds[1] * n_read

    def _lost(self, kept: np.ndarray) -> str:
        if self.tumor_share is None or not (self.tumor_share > 0).any():
            return ""
        return f"\nkeeps {kept[self.tumor_share > 0].mean():.0%} of the tumor tiles"


class AttentionMaps(Laboratory):
    """One slide, the truth and the tiles of highest score of each method, side by side."""

    film_in_rows = True

    def __init__(
        self,
        grids: Mapping[str, OnGrid],
        scores: Mapping[str, Mapping[str, np.ndarray]],
        truth: Mapping[str, np.ndarray],
        share: float = 0.1,
    ):
        """Make the laboratory.

        Args:
            grids: The slides that can be chosen, by name: a `Bag`, `TileGrid` or `Prediction` each, all with
                tiles of one size.
            scores: For each method, the score of each tile of each slide, (N,).
            truth: Share of tumor in each tile of each slide, (N,).
            share: Share of the tiles shown at the start, those of highest score.

        Raises:
            ValueError: A method has no score for a tile.
        """
        self.grids, self.scores, self.truth = dict(grids), scores, truth
        for method, of_slides in scores.items():
            for name, grid in self.grids.items():
                if len(of_slides[name]) != len(grid.rowcol):
                    raise ValueError(
                        f"{method} has {len(of_slides[name])} scores for {name}, which has others"
                    )
        self._thumbnails = _on_one_canvas([grid.thumbnail for grid in self.grids.values()])
        self.panels = (1.0,) * (1 + len(scores))
        height, width = self._thumbnails.shape[1:3]
        panel = 2.3
        self.size = (panel * len(self.panels), panel * height / width + 1.0)
        self.film_size = self.size
        super().__init__(
            slide=w.Dropdown(options=list(self.grids), description="slide"),
            share=w.FloatSlider(
                share, min=0.02, max=1.0, step=0.02, readout_format=".0%", description="tiles shown"
            ),
        )

    def draw(self, axes: Sequence[Axes]) -> dict[str, Artist]:
        """Draw the slide once for the truth and once for each method."""
        first = next(iter(self.grids.values()))
        mm = first.tile_um / PIXELS / 1000
        height, width = self._thumbnails.shape[1:3]
        artists: dict[str, Artist] = {}
        for name, ax in zip(("truth", *self.scores), axes, strict=True):
            plots.slide_overview(self._thumbnails[0], 1000 * mm, ax)
            artists[f"slide {name}"] = ax.images[0]
            cells = np.zeros((1, 1, 4))
            artists[f"map {name}"] = ax.imshow(
                cells, extent=(0, width * mm, height * mm, 0), interpolation="nearest"
            )
            dots = ax.plot([], [], "o", ms=2.5, color=VERMILION, mec="white", mew=0.4)
            artists[f"tumor {name}"] = dots[0]
            artists[f"title {name}"] = ax.set_title(" \n ", fontsize=9)
            ax.set(xlim=(0, width * mm), ylim=(height * mm, 0), ylabel="", xlabel="", xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        return artists

    def move(self, artists: Mapping[str, Any], *, slide: str, share: float) -> None:
        """Show a slide and the tiles of highest score."""
        grid, truth = self.grids[slide], np.asarray(self.truth[slide], float)
        side, tumor = grid.tile_um / 1000, np.asarray(self.truth[slide]) >= TUMOR
        thumbnail = self._thumbnails[list(self.grids).index(slide)]
        rows, columns = grid.shape
        centers = (grid.rowcol[tumor] + 0.5) * side
        cells = {"truth": truth_cells(grid, truth)}
        titles = {"truth": f"truth: {tumor.sum()} of {len(tumor)}\ntiles are tumor"}
        for method, of_slides in self.scores.items():
            scores = np.asarray(of_slides[slide], float)
            shown = _highest(scores, share)
            cells[method] = attention_cells(grid, np.where(shown, scores, np.nan))
            titles[method] = f"{plain(method)}\n{shown[tumor].sum()} of {tumor.sum()} tumor tiles"
        for name, image in cells.items():
            artists[f"slide {name}"].set_data(thumbnail)
            artists[f"map {name}"].set_data(image)
            artists[f"map {name}"].set_extent((0, columns * side, rows * side, 0))
            artists[f"tumor {name}"].set_data(centers[:, 1], centers[:, 0])
            artists[f"title {name}"].set_text(titles[name])


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    return np.clip(logit(probabilities), -FURTHEST, FURTHEST)


def _highest(scores: np.ndarray, share: float) -> np.ndarray:
    """The tiles of highest score, at least one, bool (N,)."""
    shown = np.zeros(len(scores), bool)
    shown[np.argsort(-scores, kind="stable")[: max(1, round(share * len(scores)))]] = True
    return shown


def _on_one_canvas(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures uint8 (H, W, 3) of several sizes on white ones of one size, (n, H, W, 3)."""
    height, width = np.max([picture.shape[:2] for picture in pictures], axis=0)
    canvas = np.full((len(pictures), height, width, 3), 255, np.uint8)
    for place, picture in zip(canvas, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture
    return canvas
