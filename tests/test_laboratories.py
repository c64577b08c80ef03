"""Laboratories: a control moves the artists to where the static figure has them, quickly; films are whole."""

import io
import time

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import expit

from hdmil_lib.inference.anytime import Trajectory
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.slides.sample import sample_slide
from hdmil_lib.viz import plots
from hdmil_lib.viz.laboratories import (
    AttentionMaps,
    CurveFit,
    GumbelSigmoid,
    LIPNThreshold,
    StoppingGame,
    TeacherStudent,
    hindsight,
    stopping_points,
)

RATIOS = (0.1, 0.5, 1.0)
LABELS = np.array([0, 1, 0, 1])
TEACHER = np.array([0.2, 0.9, 0.4, 0.6])
MOST_SECONDS = 0.2
"""CPU time that a step may take."""


@pytest.fixture(scope="module")
def grid() -> TileGrid:
    with Slide(sample_slide()) as slide:
        return TileGrid.from_slide(slide)


def grown(*tumor: float) -> Trajectory:
    """A slide of 8 tiles per block with these probabilities of tumor after the blocks."""
    p = np.array(tumor, np.float32)
    return Trajectory(8 * np.arange(1, len(p) + 1), np.stack([1 - p, p], 1))


def gumbel(_grid: TileGrid) -> GumbelSigmoid:
    return GumbelSigmoid()


def curve(_grid: TileGrid) -> CurveFit:
    return CurveFit()


def students(_grid: TileGrid) -> TeacherStudent:
    falling = np.stack([0.5 + 0.2 * (TEACHER[::-1] - 0.5), TEACHER[[1, 0, 2, 3]], TEACHER])
    return TeacherStudent(RATIOS, TEACHER, {"attention": np.stack([TEACHER] * 3), "random": falling}, LABELS)


def threshold(grid: TileGrid) -> LIPNThreshold:
    n = len(grid)
    return LIPNThreshold(grid, np.arange(n) / n, (1.0, 0.5), np.arange(n) >= n - 4)


def maps(grid: TileGrid) -> AttentionMaps:
    n = len(grid)
    tumor = np.zeros(n)
    tumor[:4] = 1.0
    scores = {"down": -np.arange(n), "up": np.arange(n)}
    return AttentionMaps(
        {"a": grid, "b": grid},
        {"good": {"a": scores["down"], "b": scores["up"]}, "bad": {"a": scores["up"], "b": scores["down"]}},
        {"a": tumor, "b": tumor},
    )


def game(_grid: TileGrid) -> StoppingGame:
    return StoppingGame([grown(0.4, 0.6, 0.9, 0.95), grown(0.6, 0.3, 0.2, 0.1)], [1, 0], margin=2.0)


EVERY = (gumbel, curve, students, threshold, maps, game)


@pytest.mark.parametrize("make", EVERY)
def test_each_control_moves_the_same_artists_quickly(make, grid):
    lab = make(grid)
    before = {name: id(artist) for name, artist in lab.artists.items()}
    figure = lab.axes[0].figure
    for name, control in lab.controls.items():
        shown, options = lab.picture.value, getattr(control, "options", None)
        start = time.process_time()
        if options:
            last = options[-1]
            control.value = last[1] if isinstance(last, tuple) else last
            other = options[0][1] if isinstance(options[0], tuple) else options[0]
            control.value = other if lab.picture.value == shown else control.value
            changed = 2
        else:
            control.value = not control.value if isinstance(control.value, bool) else control.min
            changed = 1
            if control.value is not True and lab.picture.value == shown:
                control.value, changed = control.max, 2
        assert (time.process_time() - start) / changed < MOST_SECONDS, name
    assert {name: id(artist) for name, artist in lab.artists.items()} == before
    assert lab.axes[0].figure is figure
    assert lab.error.value == ""
    image = Image.open(io.BytesIO(lab.picture.value))
    assert image.size == figure.canvas.get_width_height()


@pytest.mark.parametrize("make", EVERY)
def test_a_film_has_every_panel_of_every_state_and_one_legend(make, grid):
    lab = make(grid)
    figure = lab.film([{}, {}, {}])
    assert isinstance(figure, Figure)
    assert len([ax for ax in figure.axes if not ax.get_label().startswith("<color")]) == 3 * len(lab.panels)
    assert all(ax.get_legend() is None for ax in figure.axes)
    assert len(figure.legends) <= 1
    with pytest.raises(KeyError, match="no control speed"):
        lab.film([{"speed": 1}])


def test_the_gumbel_artists_are_where_the_static_figure_has_them():
    lab = GumbelSigmoid()
    lab.controls["tau"].value, lab.controls["gamma"].value = 1.5, 0.8
    static = plots.gumbel_sigmoid(1.5, 0.8, Figure().subplots())
    moved = [lab.artists[name] for name in ("soft", "chance", "threshold")]
    for artist, line in zip(moved, static.lines, strict=True):
        np.testing.assert_allclose(artist.get_ydata(), line.get_ydata())
    np.testing.assert_allclose(
        lab.artists["band"].get_paths()[0].vertices, static.collections[0].get_paths()[0].vertices
    )
    assert lab.artists["kept"].get_x() == pytest.approx(static.patches[0].get_x())


def test_the_draws_are_kept_as_often_as_the_formula_says():
    lab = GumbelSigmoid(tau=0.7, gamma=0.7, attention=-1.0)
    expected = expit(-1 - 0.7 * np.log(0.7 / 0.3))
    masks = lab.artists["draws"].get_offsets()[:, 1]
    assert np.mean(masks > 0.7) == pytest.approx(expected, abs=1 / 200)  # one of 200 equal parts
    assert f"{np.mean(masks > 0.7):.0%}" in lab.artists["count"].get_text()


@pytest.mark.parametrize("target", plots.TARGETS)
def test_the_fit_is_that_of_the_static_figure(target):
    lab = CurveFit()
    lab.controls["degree"].value, lab.controls["target"].value = 5, target
    wanted, fitted = plots.phi_fit(5, target, Figure().subplots()).lines
    np.testing.assert_allclose(lab.artists["wanted"].get_ydata(), wanted.get_ydata())
    np.testing.assert_allclose(lab.artists["fitted"].get_ydata(), fitted.get_ydata())


def test_a_stroke_of_the_pointer_changes_the_curve_where_it_passes():
    lab = CurveFit(target="line")
    ax = lab.axes[0]
    width, height = ax.figure.canvas.get_width_height()
    places = ax.transData.transform([(-0.5, 1.0), (0.0, -1.0), (0.0, 5.0)]) / (width, height)
    shares = [[x, 1 - y] for x, y in places]
    lab._drawn(lab.picture, {"points": shares[:2]}, [])
    assert lab.controls["target"].value == "drawn by you"
    inside = (lab.x > -0.49) & (lab.x < -0.01)
    np.testing.assert_allclose(lab.heights[inside], -1 - 4 * lab.x[inside], atol=1e-6)
    outside = np.abs(lab.x) > 0.52
    np.testing.assert_allclose(lab.heights[outside], 0.8 * lab.x[outside])
    lab._drawn(lab.picture, {"points": shares[2:]}, [])
    assert lab.heights.max() == 1.5  # held within the axes
    kept = lab.heights.copy()
    lab._drawn(lab.picture, {"points": [[0.99, 0.5]]}, [])  # beside the panel
    np.testing.assert_array_equal(lab.heights, kept)
    np.testing.assert_allclose(lab.artists["wanted"].get_ydata(), kept)


def test_the_student_falls_away_from_the_teacher(grid):
    lab = students(grid)
    assert "0 of 4 labels" in lab.artists["title"].get_text()
    lab.controls["tiles"].value, lab.controls["r"].value = "random", 0.5
    normal = lab.artists["dots 0"].get_offsets()
    answers = TEACHER[[1, 0, 2, 3]]
    np.testing.assert_allclose(expit(normal[:, 0]), TEACHER[LABELS == 0])
    np.testing.assert_allclose(expit(normal[:, 1]), answers[LABELS == 0])
    assert "2 of 4 labels" in lab.artists["title"].get_text()
    assert lab.artists["auc"].get_text() == "AUC 0.250"  # one of four pairs is in order
    with pytest.raises(ValueError, match="3 shares and 4 slides"):
        TeacherStudent(RATIOS, TEACHER, {"random": np.zeros((2, 4))}, LABELS)


def test_the_threshold_counts_tiles_tumor_and_seconds(grid):
    lab, n = threshold(grid), len(grid)
    lab.controls["keep_ratio"].value = 0.05
    kept = int((lab.scores >= np.quantile(lab.scores, 0.95)).sum())
    assert kept == 2
    whole = 1 + 0.5 * n
    assert lab.artists["bar"].get_width() == pytest.approx(2.0)
    assert f"{1 - 2 / whole:.0%} saved" in lab.artists["saved"].get_text()
    assert "keeps 50% of the tumor" in lab.artists["recall"].get_text()
    assert f"2 of {n}" in lab.artists["count"].get_text()
    with pytest.raises(ValueError, match=f"{n} tiles need as many scores"):
        LIPNThreshold(grid, np.zeros(3), (1.0, 0.5))


def test_the_maps_count_tumor_among_the_tiles_shown(grid):
    lab = maps(grid)
    text = {name: lab.artists[f"title {name}"].get_text() for name in ("truth", "good", "bad")}
    assert text["good"].endswith("4 of 4 tumor tiles")
    assert text["bad"].endswith("0 of 4 tumor tiles")
    assert text["truth"].startswith(f"truth: 4 of {len(grid)}")
    shown = lab.artists["map good"].get_array()[..., 3] > 0
    assert shown.sum() == round(0.1 * len(grid))
    lab.controls["slide"].value = "b"
    assert lab.artists["title good"].get_text().endswith("0 of 4 tumor tiles")


def test_points_of_a_stop():
    late = grown(0.4, 0.6, 0.9, 0.95)
    assert [stopping_points(late, block) for block in range(4)] == [-1, 0.5, 0.25, 0]
    assert hindsight(late) == 1


def test_the_game_hides_the_end_and_scores_against_the_rule(grid):
    lab = game(grid)
    assert not lab.artists["rest"].get_visible()
    assert lab.artists["line"].get_color() == lab.artists["dot"].get_color()
    lab.stop_here()  # after the first block of a slide that turns
    rule = stopping_points(lab.trajectories[0], lab.trajectories[0].stop(2.0))
    assert lab.scores == pytest.approx({"you": -1, "the margin": rule, "hindsight": 0.5})
    assert lab.artists["rest"].get_visible()
    lab.stop_here()
    lab.read_on()
    assert (lab.scores["you"], lab.values["block"]) == (-1, 0)
    lab.next_slide()
    for _ in range(3):
        lab.read_on()
    assert lab.values["stopped"]  # all tiles are read
    assert lab.scores["you"] == -1
    assert lab.onward.description == "play again"
    lab.next_slide()
    assert (lab.values["slide"], lab.scores["you"]) == (0, 0)
    with pytest.raises(ValueError, match="one label per slide"):
        StoppingGame([grown(0.5)], [0, 1], margin=2.0)


def test_an_error_in_a_step_is_shown_and_raised(monkeypatch):
    lab = GumbelSigmoid()
    monkeypatch.setattr(lab, "move", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lab.controls["tau"].value = 2.0
    assert "ZeroDivisionError" in lab.error.value
