"""Laboratories: their callbacks are called as clicks do, and the scores are counted by hand."""

import numpy as np
import pytest

from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.slides.sample import sample_slide
from hdmil_lib.viz.laboratories import BeatLIPN, found_share

TUMOR = {3: 1.0, 7: 0.5, 20: 0.25}


@pytest.fixture
def game():
    with Slide(sample_slide()) as slide:
        grid = TileGrid.from_slide(slide)
        tumor, lipn = np.zeros(len(grid)), np.linspace(0, 1, len(grid))
        tumor[list(TUMOR)] = list(TUMOR.values())
        lipn[7] = 5
        game = BeatLIPN(slide, grid, lipn, tumor, budget=3)
        yield game
        game.viewer.close()


def click(game: BeatLIPN, row: int) -> None:
    game.viewer.set_state({"selected": row})


def test_found_share_is_of_what_can_be_found():
    tumor = np.array([0.0, 1.0, 0.5, 0.0])
    assert found_share(np.array([1]), tumor) == 1
    assert found_share(np.array([0, 2]), tumor) == pytest.approx(0.5 / 1.5)
    assert found_share(np.array([0]), np.zeros(4)) == 0
    assert found_share(np.array([], int), tumor) == 0


def test_the_reader_is_scored_against_lipn_and_chance(game):
    assert list(game.viewer.overlays) == []  # nothing gives the tumor away
    for row in (3, 0, 3):
        click(game, row)
    assert game.viewer.region == [3, 0]
    assert "2 of 3 chosen" in game.status.value
    assert game.scores == {}
    click(game, 20)
    n = len(game.lipn)
    expected = 3 / n  # the mean share of the tumor in 3 of n tiles, all of which 3 tiles can hold
    assert game.scores["you"] == pytest.approx(1.25 / 1.75)
    assert game.scores["LIPN"] == pytest.approx(0.5 / 1.75)
    assert game.scores["chance"] == pytest.approx(expected, abs=0.02)
    assert game.viewer.overlay == "tumor"
    assert game.bars["you"].value == game.scores["you"]
    assert "71%" in game.status.value


def test_the_score_stands_and_a_new_game_hides_the_tumor(game):
    for row in (0, 1, 2):
        click(game, row)
    before = dict(game.scores)
    assert before["you"] == 0
    click(game, 3)
    assert game.scores == before
    game.restart()
    assert (game.scores, game.viewer.region, game.viewer.selected) == ({}, [], None)
    assert list(game.viewer.overlays) == []
    assert game.bars["you"].layout.visibility == "hidden"


def test_a_tile_can_be_given_back(game):
    click(game, 5)
    game.viewer.set_state({"region": []})  # as a click with the shift key does
    assert "0 of 3 chosen" in game.status.value


def test_a_game_without_tumor_or_of_a_wrong_size_is_refused(game):
    slide, grid, n = game.viewer.slide, game.viewer.grid, len(game.lipn)
    with pytest.raises(ValueError, match="slide with tumor"):
        BeatLIPN(slide, grid, game.lipn, np.zeros(n))
    with pytest.raises(ValueError, match="budget of 1 to 39"):
        BeatLIPN(slide, grid, game.lipn, game.tumor_share, budget=n + 1)
    with pytest.raises(ValueError, match="each of the 39 tiles"):
        BeatLIPN(slide, grid, game.lipn[:5], game.tumor_share)


def test_the_film_shows_lipn_and_one_draw_at_each_budget(game):
    figure = game.film([1, 3])
    titles = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]
    assert titles[0].startswith("LIPN, 1 tiles:\n50%")  # row 7, half tumor, is first
    assert len(titles) == 4
    frames = [len(ax.patches) for ax in figure.axes]
    assert frames == [1, 3, 1, 3]
