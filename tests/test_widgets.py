"""Widgets: a control redraws the figure, and no error is swallowed."""

import subprocess
import sys
from types import SimpleNamespace

import ipywidgets
import numpy as np
import pytest

from hdmil_lib.inference.anytime import AnytimeStep
from hdmil_lib.viz import widgets

PNG = b"\x89PNG"


def test_drawing_loads_no_model():
    """Notebooks draw before they choose how Triton runs, which its import would settle."""
    slow = {"timm", "torch", "triton", "hdmil_lib.models"}
    code = f"import sys, hdmil_lib.viz.widgets; print(*{slow} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.split() == []


class Grid(SimpleNamespace):
    """The parts of a `TileGrid` that widgets use: 12 tiles in 3 rows."""

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
        tile_um=128.0,
        read_tile=lambda slide, i: np.full((256, 256, 3), 20 * i, np.uint8),
    )


def explorers(grid: Grid) -> dict[str, widgets.Explorer]:
    scores = np.arange(12.0)
    return {
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
            assert after.startswith(PNG), name
            assert after != before, name


def steps():
    """Two steps of a slide of 40 tiles."""
    yield AnytimeStep(
        np.arange(10), 40, np.array([0.4, 0.6]), {"thumbnail": 0.5, "crop": 3.0, "total": 2.0}, None
    )
    yield AnytimeStep(
        np.arange(20), 40, np.array([0.1, 0.9]), {"thumbnail": 0.5, "crop": 1.0, "total": 4.0}, "margin"
    )


def test_a_live_slide_shows_where_the_seconds_go():
    live = widgets.LiveSlide(("normal", "tumor"))
    shown = []
    for step in steps():
        live.show(step)
        bars = [live.tiles, live.stages["thumbnail"], live.stages["crop"], live.stages["dmin"]]
        shown.append([bar.value for bar, _ in bars] + [bar.value for bar, _ in live.answer])
    np.testing.assert_allclose(shown, [[0.25, 0.25, 1, 0, 0.4, 0.6], [0.5, 0.125, 0.25, 0, 0.1, 0.9]])
    assert live.tiles[1].value == "20 of 40"
    assert live.stages["crop"][1].value == "1.00 s"
    assert live.status.value == "4.0 s, stopped: margin"


def test_watching_returns_the_last_step_and_closes_when_stopped(monkeypatch):
    monkeypatch.setattr(widgets, "display", lambda _: None)
    assert widgets.watch(steps(), ("normal", "tumor")).end == "margin"
    running = steps()
    monkeypatch.setattr(widgets.LiveSlide, "show", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        widgets.watch(running, ("normal", "tumor"))
    assert list(running) == []


def test_tile_browser_starts_at_the_highest_score(grid):
    seen = []
    grid.read_tile = lambda slide, i: seen.append(i) or np.zeros((256, 256, 3), np.uint8)
    browser = widgets.tile_browser(None, grid, np.array([0.0] * 7 + [5.0] + [0.0] * 4))
    browser.controls["position"].value = 11
    assert seen[0] == 7
    assert len(set(seen)) == 2


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
