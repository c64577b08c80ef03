"""A game on stopping: the reader sees the answer grow tile by tile, and says when it is sure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets as w
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from hdmil_lib.viz import guarantee
from hdmil_lib.viz.laboratories.base import Laboratory
from hdmil_lib.viz.style import BLUE, INK, VERMILION, plain

if TYPE_CHECKING:  # drawing needs no model: its import would take seconds
    from hdmil_lib.inference.anytime import Trajectory

LOST = -1.0
"""Points for a slide whose label at the stop is another than from all tiles."""


def stopping_points(trajectory: "Trajectory", block: int) -> float:
    """What a stop is worth: the share of tiles not read, or -1 where the label is not that from all tiles.

    Args:
        trajectory: The answers after each block.
        block: Index of the last block that was read.
    """
    answers = trajectory.probabilities.argmax(axis=1)
    return (
        float(1 - trajectory.n_read[block] / trajectory.n_read[-1]) if answers[block] == answers[-1] else LOST
    )


def hindsight(trajectory: "Trajectory") -> int:
    """Index of the first block whose label is that from all tiles: the best stop of one who knows the end."""
    answers = trajectory.probabilities.argmax(axis=1)
    return int(np.flatnonzero(answers == answers[-1])[0])


class StoppingGame(Laboratory):
    """When would you stop reading? The log odds of a slide grow block by block, and the reader ends it.

    A stop earns the share of tiles that were not read. If all tiles give another label, it costs one point.
    The same is counted for the rule of the margin and for hindsight.

    Attributes:
        scores: Points so far of "you", "the margin" and "hindsight".
    """

    size = (7.5, 4.0)
    panels = (1,)
    film_size = (3.4, 3.4)

    def __init__(
        self,
        trajectories: "Sequence[Trajectory]",
        labels: Sequence[int],
        margin: float,
        classes: Sequence[str] = ("normal", "tumor"),
    ):
        """Start a game.

        Args:
            trajectories: One for each slide, of two classes, in the order of the game.
            labels: True class index of each slide.
            margin: Margin of the rule that the reader is scored against.
            classes: Class names.

        Raises:
            ValueError: There is no slide, or not one label per slide.
        """
        if not trajectories or len(trajectories) != len(labels):
            raise ValueError(
                f"{len(trajectories)} trajectories and {len(labels)} labels; one label per slide is needed"
            )
        self.trajectories, self.labels = list(trajectories), list(labels)
        self.margin, self.classes = margin, classes
        self.scores = dict.fromkeys(("you", "the margin", "hindsight"), 0.0)
        self.status = w.HTML()
        self.read = _button("read more", self.read_on)
        self.stop = _button("stop here", self.stop_here)
        self.onward = _button("next slide", self.next_slide)
        last = max(len(grown.n_read) for grown in self.trajectories) - 1
        super().__init__(
            slide=w.BoundedIntText(0, min=0, max=len(self.trajectories) - 1),
            block=w.BoundedIntText(0, min=0, max=last),
            stopped=w.Checkbox(False),
        )
        self._tell()

    def header(self) -> w.Widget:
        """The buttons and the score."""
        return w.VBox([w.HBox([self.read, self.stop, self.onward]), self.status])

    def draw(self, axes: Sequence[Axes]) -> dict[str, Artist]:
        """Draw the empty axes of the static figure, and its parts for one slide."""
        (ax,) = axes
        guarantee.anytime_curves([], [], ax, margin=self.margin, classes=self.classes)
        upper, lower = ax.lines[-2:]
        reach = 1.1 * max(np.abs(guarantee.log_odds(grown)).max() for grown in self.trajectories)
        ax.set_ylim(-reach, reach)
        ax.plot([], [], "D", color=INK, mfc="white", label="where the margin stops")
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=3)
        return {
            "upper": upper,
            "lower": lower,
            "rest": ax.plot([], [], lw=1.2, alpha=0.35)[0],
            "line": ax.plot([], [], lw=2)[0],
            "dot": ax.plot([], [], "o", ms=8)[0],
            "rule": ax.plot([], [], "D", ms=7, color=INK, mfc="white", zorder=4)[0],
            "title": ax.set_title(" \n "),
        }

    def move(self, artists: Mapping[str, Any], *, slide: int, block: int, stopped: bool) -> None:
        """Show what is known after a block, and once stopped what would have followed."""
        grown = self.trajectories[slide]
        block = min(block, len(grown.n_read) - 1)
        share, odds = grown.n_read / grown.n_read[-1], guarantee.log_odds(grown)
        color = (BLUE, VERMILION)[self.labels[slide]] if stopped else INK
        artists["line"].set(data=(share[: block + 1], odds[: block + 1]), color=color)
        artists["dot"].set(data=(share[[block]], odds[[block]]), color=color)
        artists["rest"].set(data=(share[block:], odds[block:]), color=color)
        rule = grown.stop(self.margin)
        artists["rule"].set_data(share[[rule]], odds[[rule]])
        for name in ("rest", "rule", "upper", "lower"):
            artists[name].set_visible(stopped)
        title = f"{share[block]:.0%} read,\nP({plain(self.classes[1])}) {grown.probabilities[block, 1]:.2f}"
        earned = (
            f":\n{stopping_points(grown, block):+.2f} points, the margin {stopping_points(grown, rule):+.2f}"
            if stopped
            else ""
        )
        artists["title"].set_text(f"stopped at {share[block]:.0%}{earned}" if stopped else title)

    def read_on(self) -> None:
        """Read one block more; after the last one the game on this slide is over."""
        if self.values["stopped"]:
            return
        self.controls["block"].value += 1
        if self.values["block"] >= len(self._grown.n_read) - 1:
            self.stop_here()

    def stop_here(self) -> None:
        """End the reading of this slide and count the points."""
        if self.values["stopped"]:
            return
        grown = self._grown
        self.scores["you"] += stopping_points(grown, self.values["block"])
        self.scores["the margin"] += stopping_points(grown, grown.stop(self.margin))
        self.scores["hindsight"] += stopping_points(grown, hindsight(grown))
        self.controls["stopped"].value = True
        self._tell()

    def next_slide(self) -> None:
        """Go on to the next slide; after the last one the game starts anew."""
        if not self.values["stopped"]:
            return
        following = self.values["slide"] + 1
        if following == len(self.trajectories):
            following, self.scores = 0, dict.fromkeys(self.scores, 0.0)
        self.controls["stopped"].value = False
        self.controls["block"].value = 0
        self.controls["slide"].value = following
        self._tell()

    @property
    def _grown(self) -> "Trajectory":
        return self.trajectories[self.values["slide"]]

    def _tell(self) -> None:
        stopped, number, n = self.values["stopped"], self.values["slide"] + 1, len(self.trajectories)
        self.read.disabled = self.stop.disabled = stopped
        self.onward.disabled = not stopped
        self.onward.description = "play again" if number == n else "next slide"
        score = ", ".join(f"{name} {value:+.2f}" for name, value in self.scores.items())
        self.status.value = f"Slide {number} of {n}. Points: {score}."


def _button(name: str, action: Any) -> w.Button:
    button = w.Button(description=name)
    button.on_click(lambda _button: action())
    return button
