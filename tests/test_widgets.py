"""Widgets: a control redraws the figure, and no error is swallowed."""

from types import SimpleNamespace

import ipywidgets
import numpy as np
import pytest

from hdmil_lib.viz import widgets

PNG = b"\x89PNG"


class Grid(SimpleNamespace):
    """What the widgets need of a `TileGrid`: 12 tiles on 3 rows."""

    def __len__(self) -> int:
        return len(self.rowcol)


@pytest.fixture
def grid() -> Grid:
    generator = np.random.default_rng(0)
    return Grid(
        thumbnail=generator.integers(0, 255, (48, 64, 3), np.uint8),
        rowcol=np.argwhere(np.ones((3, 4))),
        shape=(3, 4),
        patches=generator.integers(0, 255, (12, 16, 16, 3), np.uint8),
        patch_mpp=8.0,
        read_tile=lambda slide, i: np.full((256, 256, 3), 20 * i, np.uint8),
    )


def explorers(grid: Grid) -> dict[str, widgets.Explorer]:
    scores = np.arange(12.0)
    return {
        "gumbel_sigmoid": widgets.gumbel_sigmoid(),
        "phi": widgets.phi(),
        "mask_on_slide": widgets.mask_on_slide(grid, scores, scores > 9),
        "tile_browser": widgets.tile_browser(None, grid, scores),
    }


def test_every_control_redraws(grid):
    for name, explorer in explorers(grid).items():
        for control in explorer.controls.values():
            before = bytes(explorer.image.value)
            assert before.startswith(PNG)
            options = getattr(control, "options", None)
            control.value = options[0] if options else control.max
            after = bytes(explorer.image.value)
            assert after.startswith(PNG) and after != before, name


def test_tile_browser_starts_at_the_highest_score(grid):
    seen = []
    grid.read_tile = lambda slide, i: seen.append(i) or np.zeros((256, 256, 3), np.uint8)
    browser = widgets.tile_browser(None, grid, np.array([0.0] * 7 + [5.0] + [0.0] * 4))
    browser.controls["position"].value = 11
    assert seen[0] == 7 and len(set(seen)) == 2


def test_an_error_of_the_first_drawing_fails_the_cell():
    with pytest.raises(ZeroDivisionError):
        widgets.Explorer(lambda figure, x: 1 / 0, (1, 1), x=ipywidgets.IntSlider(1))


def test_a_later_error_is_shown_and_raised_and_goes_away():
    explorer = widgets.Explorer(lambda figure, x: 1 / x, (1, 1), x=ipywidgets.IntSlider(1))
    with pytest.raises(ZeroDivisionError):
        explorer.controls["x"].value = 0
    assert "ZeroDivisionError" in explorer.error.value
    explorer.controls["x"].value = 2
    assert explorer.error.value == ""
