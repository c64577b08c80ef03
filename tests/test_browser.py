"""A real browser on JupyterLab: what the widgets show, and what a click does in Python."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY
from nbformat.v4 import new_code_cell, new_notebook

COURSE = sorted((REPOSITORY / "notebooks").glob("[0-9]*.ipynb"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOKEN = "test"
JUPYTERLAB, NOTEBOOK_7 = "doc/tree", "notebooks"
"""Where the two front ends open a notebook."""
SECONDS = 30_000
"""Longest wait for anything on the page, in ms."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install -y chromium"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="no playwright: pip install playwright"
    ),
]

SET_UP = """
import hdmil_lib as hdmil
import ipywidgets
import numpy as np
from hdmil_lib.slides.sample import sample_slide
from hdmil_lib.viz.viewer import SlideViewer

slide = hdmil.Slide(sample_slide())
grid = hdmil.TileGrid.from_slide(slide)
attention = np.random.default_rng(0).normal(size=len(grid))
viewer = SlideViewer(slide, grid, {"attention": attention, "kept": attention > 0, "tissue": grid.tissue})
asked = []
receive = viewer._receive
viewer.on_msg(receive, remove=True)
def note(widget, message, buffers):
    asked.append(tuple(message.values()))
    receive(widget, message, buffers)
viewer.on_msg(note)
report = ipywidgets.Label("nothing yet")
def tell(change):
    tiles = [message for message in asked if message[0] == "tile"]
    twice = len(tiles) - len(set(tiles))
    marked = len(viewer.region)
    report.value = f"selected {viewer.selected}, marked {marked}, asked twice {twice} of {len(tiles)}"
viewer.observe(tell, names=["selected", "region"])
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a JupyterLab and its folder; the server is ended afterwards."""
    folder = tmp_path_factory.mktemp("lab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "HDMIL_CACHE": str(folder / "cache"),
        "HDMIL_BUILD": str(folder / "build"),
        "HDMIL_FAST": "1",
    }
    notebooks, settings = folder / "notebooks", folder / "config" / "labconfig"
    notebooks.mkdir()
    settings.mkdir(parents=True)
    disabled = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (settings / "page_config.json").write_text(json.dumps(disabled))
    tracker = folder / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps({"windowingMode": "none"}))  # all cells are on the page
    for name in ("benchmarks", "data_samples", "docs", "hdmil_lib", "tools"):
        (folder / name).symlink_to(REPOSITORY / name)  # beside the notebooks, as in a checkout
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += [
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={notebooks}",
        "--expose-app-in-browser",
        "--JupyterNotebookApp.expose_app_in_browser=True",
    ]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/api?token={TOKEN}", server, folder / "server.log")
        yield address, notebooks
    finally:
        server.terminate()
        server.wait(20)


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(120):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=2)
        except OSError:
            time.sleep(0.25)
        else:
            return
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def open_notebook(browser, lab: tuple[str, Path], name: str, cells: list[str], place: str = JUPYTERLAB):
    """A page of JupyterLab or Notebook 7 on a new notebook, all of whose cells are run."""
    address, folder = lab
    notebook = new_notebook(cells=[new_code_cell(cell.strip()) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / f"{name}.ipynb")
    page = browser.new_page(viewport={"width": 1280, "height": 1100})
    page.set_default_timeout(SECONDS)
    page.goto(f"{address}/{place}/{name}.ipynb?token={TOKEN}")
    run_all(page)
    return page


def run_all(page, wait: bool = False) -> None:
    """Run all cells of the notebook that a page shows; with `wait`, to the end, and save it."""
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function("window.jupyterapp?.commands.hasCommand('notebook:run-all-cells')")
    kernel = "window.jupyterapp.shell.currentWidget?.context?.sessionContext?.session?.kernel?.status"
    page.wait_for_function(f"{kernel} === 'idle'")
    run, save = (
        f"window.jupyterapp.commands.execute('{name}')"
        for name in ("notebook:run-all-cells", "docmanager:save")
    )
    page.evaluate(f"async () => {{ await {run}; await {save}; }}" if wait else f"() => {{ {run}; }}")


def tile_place(page, row: int, column: int) -> tuple[float, float]:
    """Where the center of a square of the sample slide's grid is, when all of the slide is shown."""
    box = page.locator(".slide-viewer canvas").first.bounding_box()
    width, height = 2220, 2967
    scale = min(box["width"] / width, box["height"] / height)
    left, top = box["x"] + (box["width"] - scale * width) / 2, box["y"] + (box["height"] - scale * height) / 2
    return left + (column + 0.5) * 256.5 * scale, top + (row + 0.5) * 256.5 * scale


def whole_slide(page) -> None:
    """Bring the viewer into the window, with all of the slide in it."""
    page.locator(".slide-viewer").scroll_into_view_if_needed()
    page.locator(".slide-fit").click()
    page.wait_for_timeout(800)  # it moves there


def drag_around(page, top: float, left: float, bottom: float, right: float) -> None:
    """Draw a line around squares of the grid, with the shift key held."""
    corners = [(top, left), (top, right), (bottom, right), (bottom, left), (top, left)]
    page.keyboard.down("Shift")
    page.mouse.move(*tile_place(page, *corners[0]))
    page.mouse.down()
    for corner in corners[1:]:
        page.mouse.move(*tile_place(page, *corner), steps=5)
    page.mouse.up()
    page.keyboard.up("Shift")


@pytest.mark.parametrize(
    "place", [JUPYTERLAB, pytest.param(NOTEBOOK_7, marks=pytest.mark.nightly)], ids=["lab", "notebook7"]
)
def test_the_viewer_shows_tiles_and_a_click_arrives_in_python(browser, lab, tmp_path, place):
    page = open_notebook(browser, lab, "viewer", [SET_UP, "viewer", "report"], place)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.wait_for_selector('.slide-viewer[data-drawn="true"]')

    whole_slide(page)
    page.mouse.click(*tile_place(page, 4, 3))
    page.get_by_text("row 4, column 3 of the grid").wait_for()
    page.get_by_text("selected 10, marked 0, asked twice 0 of").wait_for()
    page.wait_for_function("document.querySelector('.slide-tile').naturalWidth === 256")
    page.wait_for_function("document.querySelector('.slide-patch').naturalWidth === 16")
    page.screenshot(path=tmp_path / "selected.png")

    for _ in range(10):  # to the finest level and back: all that is shown again is there already
        page.mouse.wheel(0, -400)
        page.wait_for_timeout(150)
    page.screenshot(path=tmp_path / "zoomed.png")
    whole_slide(page)
    drag_around(page, 3.6, 2.6, 8.4, 5.4)
    page.get_by_text("selected 10, marked 15, asked twice 0 of").wait_for()
    page.select_option(".slide-overlay", "tissue")
    page.get_by_text("no tissue").wait_for()
    page.screenshot(path=tmp_path / "marked.png")

    assert page.locator('.jp-OutputArea-output[data-mime-type*="stderr"], .jp-mod-error').count() == 0
    assert problems == []
    page.close()


LABORATORY = """
from hdmil_lib.viz.laboratories import BeatLIPN
from hdmil_lib.viz.viewer import link_scatter

tumor = np.zeros(len(grid))
tumor[[10, 14]] = 1
game = BeatLIPN(slide, grid, attention, tumor, budget=2)
"""


def test_a_point_shows_its_tile_and_the_game_is_scored(browser, lab, tmp_path):
    points = "link_scatter(viewer, np.stack([np.arange(len(grid)), np.zeros(len(grid))], 1), attention)"
    page = open_notebook(browser, lab, "laboratory", [SET_UP, LABORATORY, points])
    page.wait_for_selector(".tile-scatter")
    page.locator(".tile-scatter").scroll_into_view_if_needed()
    page.locator(".tile-scatter").click(position={"x": 348, "y": 348})  # the last point
    page.get_by_text("tile 38 of 39").wait_for()
    page.screenshot(path=tmp_path / "scatter.png")
    page.close()

    page = open_notebook(browser, lab, "game", [SET_UP, LABORATORY, "game"])
    page.wait_for_selector('.slide-viewer[data-drawn="true"]')
    whole_slide(page)
    page.mouse.click(*tile_place(page, 4, 3))
    page.get_by_text("1 of 2 chosen").wait_for()
    page.mouse.click(*tile_place(page, 5, 3))
    page.get_by_text("You found 100%").wait_for()
    page.screenshot(path=tmp_path / "game.png")
    page.close()


def test_a_guess_is_answered(browser, lab, tmp_path):
    page = open_notebook(browser, lab, "quiz", ["from hdmil_lib.course import quiz", 'quiz("08")'])
    page.get_by_role("button", name="73").click()
    page.get_by_text("We will find: 81.").wait_for()
    assert page.get_by_role("button", name="63").is_disabled()
    page.screenshot(path=tmp_path / "quiz.png")
    page.close()


DRAWN_CURVE = """
import ipywidgets
from hdmil_lib.viz import plots
from hdmil_lib.viz.laboratories import CurveFit

plots.use_style()
lab = CurveFit(degree=3, target="line")
report = ipywidgets.Label("nothing yet")
def tell(_change):
    report.value = f"{lab.values['target']}, highest {lab.heights.max():.1f}, degree {lab.values['degree']}"
lab.picture.observe(tell, names="value")
"""


def test_a_curve_is_drawn_with_the_pointer_and_a_slider_moves_the_fit(browser, lab, tmp_path):
    page = open_notebook(browser, lab, "curve", [DRAWN_CURVE, "lab", "report"])
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    picture = page.locator(".laboratory-picture")
    picture.wait_for()
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    first = picture.get_attribute("src")
    top = box["y"] + 0.14 * box["height"]  # near the upper end of the left panel
    page.mouse.move(box["x"] + 0.15 * box["width"], top)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.35 * box["width"], top, steps=8)
    page.mouse.up()
    page.get_by_text("drawn by you, highest 1.2, degree 3").wait_for()
    assert picture.get_attribute("src") != first
    page.locator(".widget-slider .noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("drawn by you, highest 1.2, degree 4").wait_for()
    page.screenshot(path=tmp_path / "curve.png")
    assert problems == []
    page.close()


@pytest.mark.nightly
@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_each_notebook_runs_in_jupyterlab(browser, lab, path, tmp_path):
    """Run All without an error or a warning; the first slider then changes a picture."""
    address, folder = lab
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbformat.write(notebook, folder / path.name)
    page = browser.new_page(viewport={"width": 1280, "height": 1100})
    page.set_default_timeout(SECONDS)
    page.goto(f"{address}/{JUPYTERLAB}/{path.name}?token={TOKEN}")
    run_all(page, wait=True)
    page.screenshot(path=tmp_path / "end.png")
    cells = [
        cell for cell in nbformat.read(folder / path.name, as_version=4).cells if cell.cell_type == "code"
    ]
    for cell in cells:
        assert cell.execution_count
        assert [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"] == []
    sliders = page.locator(".widget-slider .noUi-handle")
    if sliders.count():
        pictures = "() => [...document.querySelectorAll('.jp-OutputArea img')].map((one) => one.src).join()"
        before = page.evaluate(pictures)
        sliders.first.scroll_into_view_if_needed()
        sliders.first.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(f"(before) => ({pictures})() !== before", arg=before)
        page.screenshot(path=tmp_path / "moved.png")
    page.close()
