"""Every notebook runs from nothing in its small size and keeps to the limits; so do the tools for them."""

import base64
import io
import json
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import REPOSITORY
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

sys.path.insert(0, str(REPOSITORY / "tools"))
import notebooks as tool

COURSE = tool.find()
SOLUTIONS = tool.find(solutions=True)
pytestmark = pytest.mark.xdist_group("notebooks")


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("path", [*COURSE, *SOLUTIONS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_runs_from_nothing(path, module_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HDMIL_FAST", "1")
    monkeypatch.setenv("HDMIL_CACHE", str(module_cache))
    monkeypatch.setenv("HDMIL_BUILD", str(tmp_path / "build"))
    run = tool.execute(path, tmp_path)
    assert run.error is None, run.error


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_keeps_to_the_limits(path):
    assert list(tool.check(path, COURSE)) == []


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_pictures_of_solutions_have_alternative_texts(path):
    assert list(tool.check_alt_texts(path)) == []


def test_numbers_and_solutions_are_complete():
    assert list(tool.check_order(COURSE)) == []


# The tool


@pytest.fixture
def course(tmp_path, monkeypatch) -> Path:
    """Two short notebooks in a folder of their own, with navigation."""
    monkeypatch.setattr(tool, "NOTEBOOKS", tmp_path)
    for name in ("00_start_here", "01_slides_and_tiling"):
        cells = [new_markdown_cell("# Does it run?"), new_code_cell("x = 1"), new_code_cell("print(x)")]
        nbformat.write(new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    tool.nav_command(None)
    return tmp_path


def append(path: Path, *cells) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1:-1] = cells
    nbformat.write(notebook, path)


def test_run_leaves_a_whole_copy_and_skips_it_until_something_changes(course, tmp_path):
    path, out = tool.find(["00"])[0], tmp_path / "out"
    first = tool.execute(path, out)
    assert first.error is None
    assert not first.skipped
    cells = nbformat.read(out / path.name, as_version=4).cells
    assert cells[3].outputs[0].text == "1\n"
    assert tool.execute(path, out).skipped
    append(path, new_code_cell("print(2)"))
    assert not tool.execute(path, out).skipped
    assert sorted(file.name for file in out.iterdir()) == [path.name]


def test_a_failing_cell_is_named_and_leaves_no_copy(course, tmp_path):
    path, out = tool.find(["01"])[0], tmp_path / "out"
    append(path, new_code_cell("wrong = 1 / 0"))
    run = tool.execute(path, out)
    assert "cell 5 of 6" in run.error
    assert "wrong = 1 / 0" in run.error
    assert "ZeroDivisionError" in run.error
    assert [file.name for file in out.iterdir()] == ["01_slides_and_tiling.failed.ipynb"]


def test_outputs_written_back_pass_as_one_clean_run(course, tmp_path):
    path, out = tool.find(["00"])[0], tmp_path / "out"
    assert any("Run All" in fault for fault in tool.check(path, tool.find()))
    tool.execute(path, out)
    tool.write_back(path, out)
    assert not any("Run All" in fault for fault in tool.check(path, tool.find()))
    assert "hdmil" not in nbformat.read(path, as_version=4).metadata


def test_a_widget_that_brings_a_picture_leaves_it():
    """The slide viewer sends a picture of itself for places without widgets."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "purple").save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    data = {tool.WIDGET_VIEW: {"model_id": "1"}, "image/png": picture, "text/plain": "SlideViewer('a')"}
    cell = new_code_cell("viewer", outputs=[new_output("display_data", data)])
    tool._tidy(new_notebook(cells=[cell]))
    (output,) = cell.outputs
    assert set(output.data) - {"text/plain"} in ({"image/png"}, {"image/jpeg"})
    assert output.data["text/plain"] == "SlideViewer('a')"


def test_widgets_and_figures_read_well_without_a_kernel(course, tmp_path):
    path, out = tool.find(["00"])[0], tmp_path / "out"
    code = (
        "from tqdm.auto import tqdm\nfrom ipywidgets import Image, VBox\nfor _ in tqdm(range(2)):\n    pass\n"
    )
    append(path, new_code_cell(code + "VBox([Image()])"))
    tool.execute(path, out)
    notebook = nbformat.read(out / path.name, as_version=4)
    assert [output.data for output in notebook.cells[4].outputs] == [{"text/plain": tool.WIDGET_NOTE}]
    assert "widgets" not in notebook.metadata


def test_navigation_links_the_neighbours_at_head_and_foot(course):
    first, second = (nbformat.read(path, as_version=4) for path in tool.find())
    assert first.cells[0].source == "**00 Start here** · [01 Slides and tiling →](01_slides_and_tiling.ipynb)"
    assert second.cells[-1].source == "[← 00 Start here](00_start_here.ipynb) · **01 Slides and tiling**"
    before = [path.read_bytes() for path in tool.find()]
    tool.nav_command(None)
    assert [path.read_bytes() for path in tool.find()] == before


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        ([new_code_cell("\n".join(["x = 1"] * 26))], "longest code cell: 26"),
        ([new_code_cell("\n".join(["x = 1"] * 7)) for _ in range(5)], "median code lines: 7"),
        ([new_code_cell("x = 1") for _ in range(36)], "code cells: 38"),
        ([new_markdown_cell("word " * 121)], "words: 121"),
        ([new_markdown_cell("![x](data:" + "x" * 500_000 + ")")], "kilobytes: 50"),
        ([new_code_cell("x")], "assert"),
    ],
)
def test_check_finds(course, cells, fault):
    path = tool.find()[0]
    append(path, *cells)
    assert any(fault in found for found in tool.check(path, tool.find()))


def test_check_finds_gaps_and_solutions_without_a_notebook(course):
    (course / "solutions").mkdir()
    (course / "01_slides_and_tiling.ipynb").rename(course / "solutions" / "02_slides_and_tiling.ipynb")
    faults = list(tool.check_order(tool.find()))
    assert faults == ["solutions/02_slides_and_tiling.ipynb has no notebook of that name"]
    (course / "00_start_here.ipynb").rename(course / "03_start_here.ipynb")
    assert "not numbered 00, 01" in next(tool.check_order(tool.find()))


def test_an_unknown_name_is_refused(course):
    with pytest.raises(FileNotFoundError, match="no notebook starts with '07' among: 00_start_here"):
        tool.find(["07"])


def test_pictures_have_a_text_for_those_who_cannot_see_them(course, tmp_path):
    path, out = tool.find(["00"])[0], tmp_path / "out"
    append(path, new_code_cell(f"from IPython.display import Image\nImage({PIXEL!r})", id="dot"))
    tool.execute(path, out)
    tool.write_back(path, out)
    assert list(tool.check_alt_texts(path)) == ["cell 5 (dot) has 1 pictures, alt_texts.json 0 texts for it"]
    texts = {"00_start_here": {"dot": "A white dot.", "gone": "A line."}}
    (course / tool.ALT_TEXTS).write_text(json.dumps(texts))
    assert list(tool.check_alt_texts(path)) == ["alt_texts.json describes cell gone, which does not exist"]
    tool.alt_command(None)
    output = nbformat.read(path, as_version=4).cells[4].outputs[0]
    assert output.metadata == {"image/png": {"alt": "A white dot."}}
    assert output.data["text/plain"] == "A white dot."
    texts = {"00_start_here": {"dot": "A black dot."}}
    (course / tool.ALT_TEXTS).write_text(json.dumps(texts))
    assert ["old alternative text" in fault for fault in tool.check_alt_texts(path)] == [True]
    assert tool.execute(path, tmp_path / "again").error is None
    output = nbformat.read(tmp_path / "again" / path.name, as_version=4).cells[4].outputs[0]
    assert output.metadata["image/png"]["alt"] == "A black dot."


def as_png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PIXEL = base64.b64decode(as_png(np.full((1, 1, 3), 255, np.uint8)))


def test_pictures_of_tissue_become_jpeg_and_drawings_stay_png():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 16, 3), np.uint8)
    tissue = as_png(np.asarray(Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC)))
    drawing = np.full((256, 256, 3), 255, np.uint8)
    drawing[100:104] = 0
    assert list(tool._smaller(tissue)) == ["image/jpeg"]
    assert list(tool._smaller(as_png(drawing))) == ["image/png"]
    assert len(tool._smaller(tissue)["image/jpeg"]) < len(tissue) / 2
