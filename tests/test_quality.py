"""What is on a slide and what a run would take of it; contact sheets, the report, and the doctor."""

import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from model_factory import ColorEncoder, write_textured_slide
from PIL import Image
from slide_factory import write_slide
from tissue_factory import UM, Drawing, section
from typer.testing import CliRunner

from hdmil_lib import doctor
from hdmil_lib.bags import bag_info
from hdmil_lib.cli import app
from hdmil_lib.cli.options import tissue_of
from hdmil_lib.encoders.extraction import extract
from hdmil_lib.errors import HDMILError, SlideError
from hdmil_lib.slides import PRESETS, Slide, TileGrid, TileSettings, tissue_mask, tissue_settings
from hdmil_lib.slides.focus import BLURRED, sharpness
from hdmil_lib.slides.quality import Square, fold_mask, slide_quality
from hdmil_lib.viz.quality import contact_sheet, preset_sheet
from hdmil_lib.viz.report import write_report

HE = {"hematoxylin": 0.15, "eosin": 0.2}


def hdmil(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


COARSE = TileSettings(allow_upsampling=True)
"""Small slides of 1 um/px are enough where only tissue counts."""


def write_thumbnail(path: Path, thumbnail: np.ndarray, mpp: float = 1.0) -> Path:
    """A slide of which this is the thumbnail at 8 um/px."""
    factor = round(UM / mpp)
    return write_slide(path, thumbnail.repeat(factor, 0).repeat(factor, 1), (mpp, mpp), tile=256)


@pytest.fixture(scope="module")
def marked(tmp_path_factory) -> Path:
    """A section with a pen stroke below it and a black border on the left."""
    drawing = section(HE)
    drawing.stroke("green", [(600, 3600), (4700, 3500)])
    thumbnail = drawing.render()
    thumbnail[:, :32] = 0
    return write_thumbnail(tmp_path_factory.mktemp("slides") / "marked.tif", thumbnail)


def textured(path: Path, blurred_columns: int = 0) -> Path:
    """4 x 6 tiles of grainy tissue at 0.5 um/px, of which the first columns are out of focus."""
    write_textured_slide(path, 4, 6)
    with Slide(path) as slide:
        pixels = slide.read_field(0, 0, slide.dimensions, 0.5)
    grain = np.random.default_rng(0).normal(0, 25, (*(n // 4 for n in pixels.shape[:2]), 1))
    pixels = (pixels + cv2.resize(grain, pixels.shape[1::-1], interpolation=cv2.INTER_CUBIC)[..., None]).clip(
        0, 255
    )
    width = 256 * blurred_columns
    if width:
        pixels[:, :width] = cv2.GaussianBlur(pixels, (0, 0), 10)[:, :width]  # 5 um
    return write_slide(path, pixels.astype(np.uint8))


def test_each_square_says_what_it_is(marked):
    with Slide(marked) as slide:
        quality = slide_quality(slide, "he", focus=False)
        grid = TileGrid.from_slide(slide, tissue="he", allow_upsampling=True)
        plain = slide_quality(slide, focus=False)
    assert quality.n_tiles == len(grid)
    assert (quality.squares[grid.rowcol[:, 0], grid.rowcol[:, 1]] == Square.KEPT).all()
    rows, cols = quality.squares.shape
    assert (quality.squares[:, :2] == Square.BLACK).all()
    # The stroke is 500 um wide and ends 300 um from the rim: its middle row is ink from one end to the other.
    stroke = quality.squares[3550 // 128, 7:35]
    assert (stroke == Square.INK).all()
    counted = sum(quality.count(kind) for kind in Square)
    assert counted == rows * cols
    little = np.argwhere(quality.squares == Square.LITTLE_TISSUE)
    shares = [quality.tissue[16 * r : 16 * r + 16, 16 * c : 16 * c + 16].mean() for r, c in little]
    assert all(0 < share < 0.25 for share in shares)
    assert any("pen ink covers" in warning for warning in quality.warnings)
    assert any("black" in warning for warning in quality.warnings)
    # The default takes the stroke for tissue, which is said.
    (note,) = [warning for warning in plain.warnings if "tiles lie on pen ink" in warning]
    assert int(note.split()[0]) > 60
    assert not any("tiles lie on pen ink" in warning for warning in quality.warnings)


def test_extract_says_that_tiles_lie_on_ink(marked, tmp_path):
    for name, noted in (("default", True), ("he", False)):
        table = extract([marked], ColorEncoder(), tmp_path / name, tissue=name, tiles=COARSE, progress=False)
        assert ("tiles lie on pen ink; --tissue he" in table.note[0]) == noted


def test_a_slide_without_tissue_has_an_error_and_is_none(tmp_path):
    blank = write_slide(tmp_path / "blank.tif", np.full((600, 600, 3), 245, np.uint8))
    small = write_slide(tmp_path / "small.tif", np.full((100, 100, 3), 120, np.uint8))
    with Slide(blank) as slide:
        quality = slide_quality(slide)
    assert quality.n_tiles == 0
    assert quality.error.startswith("no tile has 25% tissue")
    assert contact_sheet(quality).axes
    with Slide(small) as slide:
        quality = slide_quality(slide)
    assert "smaller than a tile" in quality.error
    assert contact_sheet(quality).axes


def test_sharpness_falls_with_blur_and_not_with_stain():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 40, (128, 128, 1))
    field = (160 + cv2.GaussianBlur(noise, (0, 0), 1.0)[..., None] * 3).repeat(3, 2).clip(0, 255)
    values = [sharpness(cv2.GaussianBlur(field, (0, 0), s).astype(np.uint8)) for s in (0.5, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 2 * BLURRED
    assert values[-1] < BLURRED
    pale = 255 - (255 - field) * 0.4
    # The 50 that are added to the variance take a sixth of it, where the stain has fallen to two fifths.
    assert sharpness(pale.astype(np.uint8)) == pytest.approx(sharpness(field.astype(np.uint8)), rel=0.2)
    assert sharpness(np.full((64, 64, 3), 200, np.uint8)) == 0
    white_noise = rng.normal(128, 30, (256, 256)).clip(0, 255).astype(np.uint8)
    # A Laplacian of independent values has 4 * 4 + 4 = 20 times their variance.
    assert sharpness(white_noise[..., None].repeat(3, 2)) == pytest.approx(20, rel=0.05)


def test_tiles_out_of_focus_are_left_out_when_asked(tmp_path):
    path = textured(tmp_path / "soft.tif", blurred_columns=3)
    with Slide(path) as slide:
        everything = TileGrid.from_slide(slide)
        sharp = TileGrid.from_slide(slide, tissue=tissue_settings(min_sharpness=BLURRED))
        quality = slide_quality(slide)
        strict = slide_quality(slide, tissue_settings(min_sharpness=BLURRED))
        tile = sharp.read_tile(slide, 0)
        with pytest.raises(SlideError, match="none of 24 tiles has a sharpness of 50"):
            TileGrid.from_slide(slide, tissue=tissue_settings(min_sharpness=50.0))
    assert len(everything) == 24
    assert sorted(set(sharp.rowcol[:, 1].tolist())) == [3, 4, 5]
    assert len(sharp) == len(sharp.patches) == len(sharp.coords) == 12
    assert tile.shape == (256, 256, 3)
    assert any("12 of 24 tiles looked at are out of focus" in warning for warning in quality.warnings)
    assert (strict.squares[:, :3] == Square.BLURRED).all()
    assert strict.n_tiles == 12


def test_a_fold_is_reported(tmp_path):
    drawing = section(HE)
    line = np.rint(np.array([(900, 1400), (1500, 1800), (2000, 2500)]) / UM).astype(np.int32)
    fold = np.zeros(drawing.truth.shape, np.uint8)
    cv2.polylines(fold, [line], False, 1, round(140 / UM))
    folded = (fold > 0) & drawing.truth
    plain = drawing.render()
    drawing.density[folded] *= 2.5
    thumbnail = drawing.render()
    mask = tissue_mask(thumbnail, UM, PRESETS["he"].settings)
    found = fold_mask(thumbnail, mask, UM)
    assert not fold_mask(plain, mask, UM).any()
    assert (found & folded).sum() > 0.4 * folded.sum()
    assert (found & ~folded).sum() < 0.2 * folded.sum()
    assert not fold_mask(thumbnail, np.zeros_like(mask), UM).any()
    with Slide(write_thumbnail(tmp_path / "fold.tif", thumbnail)) as slide:
        quality = slide_quality(slide, "he", focus=False)
    assert any("may be folded" in warning for warning in quality.warnings)
    assert (quality.tissue & folded).sum() > 0.95 * folded.sum()  # it stays tissue


def test_a_follicle_is_no_fold():
    drawing = section(HE)
    drawing.density[drawing.blob((1500, 1900), 300)] *= 2.5
    thumbnail = drawing.render()
    assert not fold_mask(thumbnail, drawing.truth, UM).any()


def test_extract_takes_presets_and_records_them(tmp_path):
    drawing = Drawing.blank()
    drawing.stain(drawing.blob((1500, 1500), 50), HE).stain(drawing.blob((3000, 2500), 50), HE)
    path = (
        write_thumbnail(tmp_path / "slides" / "bits.tif", drawing.render())
        if ((tmp_path / "slides").mkdir() is None)
        else None
    )

    def run(**options):
        return extract(
            [path], ColorEncoder(), tmp_path / "bags", tiles=COARSE, progress=False, **options
        ).iloc[0]

    refused = run()
    assert refused.status == "failed"
    assert "--tissue default, he, faint, ihc, biopsy, tma" in refused.error
    assert run(tissue="biopsy").status == "done"
    info = bag_info(tmp_path / "bags" / "bits.h5")
    assert (info["tissue"], info["min_tissue"]) == ("biopsy", 0.1)
    assert run(tissue="biopsy").status == "skipped"
    assert "made with tissue 'biopsy' instead of 'tma'" in run(tissue="tma", min_tissue=0.1).error
    with pytest.raises(HDMILError, match="no tissue preset 'biospy' .did you mean 'biopsy'"):
        run(tissue="biospy")


def test_options_of_tissue():
    settings = tissue_of("ihc", 0.3, 20, 0.004, 0.01, 0.05)
    assert (settings.min_tissue, settings.min_saturation, settings.max_saturation) == (0.3, 20, 20)
    assert (settings.min_object_um2, settings.max_hole_um2) == (4000.0, 10_000.0)
    assert settings.min_sharpness == 0.05
    assert tissue_of("tma", None, None, None, None, None) == PRESETS["tma"].settings


def test_tissue_draws_the_presets(marked, tmp_path):
    broken = tmp_path / "broken.svs"
    broken.write_text("no slide")
    printed = hdmil("tissue", marked, broken, "--out", tmp_path / "t", code=1)
    assert "error:" in printed.stderr
    assert all(f"{name} " in printed.stdout for name in PRESETS)
    with Image.open(tmp_path / "t" / "marked.png") as picture:
        assert min(picture.size) > 500
    one = hdmil("tissue", marked, "--preset", "he", "--out", tmp_path / "t").stdout
    assert "ihc" not in one
    assert "did you mean 'ihc'" in hdmil("tissue", marked, "--preset", "ich", code=1).stderr


class Page(HTMLParser):
    """The tags, the addresses and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_report_opens_offline_and_escapes_names(marked, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    evil = "<script>alert(1)</script> & {0} $x$".replace("/", "-")
    (folder / f"{evil}.tif").write_bytes(marked.read_bytes())
    (folder / "<img src=x onerror=y>.svs").write_text("no slide")
    textured(folder / "good.tif")
    extract([folder / "good.tif"], ColorEncoder(), tmp_path / "bags", progress=False)
    arguments = ("report", folder, "--out", tmp_path / "r", "--bags", tmp_path / "bags")
    printed = hdmil(*arguments, code=1)
    assert "3 slides" in printed.stdout
    assert "1 failed" in printed.stdout

    page = Page((tmp_path / "r" / "index.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.tags.count("img") == 2
    assert evil in page.text
    assert "<img src=x onerror=y>" in page.text
    for link in page.links:
        assert link.startswith("#") or (tmp_path / "r" / link).is_file(), link
    assert "not a slide that OpenSlide can read" in page.text
    assert "it has no bag" in page.text

    table = pd.read_csv(tmp_path / "r" / "slides.csv").set_index("slide_id")
    assert len(table) == 3
    good = table.loc["good"]
    assert (good["n_tiles"], good["bag_tiles"], good["mpp"]) == (24, 24, 0.5)
    assert good[["warnings", "error"]].isna().all()
    assert "tiles lie on pen ink" in table.loc[evil, "warnings"]
    sheets = sorted(path.name for path in (tmp_path / "r" / "sheets").iterdir())
    assert len(sheets) == 2
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in sheets)


def test_the_report_says_where_a_bag_differs(tmp_path):
    path = textured(tmp_path / "a.tif", blurred_columns=3)
    extract([path], ColorEncoder(), tmp_path / "bags", progress=False)
    table = write_report(
        path, tmp_path / "r", tissue=tissue_settings(min_sharpness=BLURRED), bags=tmp_path / "bags",
        progress=False,
    )  # fmt: skip
    assert "its bag has 24 tiles (tissue default), this report finds 12" in table.loc[0, "warnings"]
    (tmp_path / "bags" / "a.h5").write_bytes(b"damaged")
    table = write_report(path, tmp_path / "r", bags=tmp_path / "bags", progress=False)
    assert "a.h5: damaged" in table.loc[0, "warnings"]


@pytest.mark.parametrize("shape", [(300, 2400), (2400, 300)])
def test_sheets_of_long_slides(tmp_path, shape):
    """A strip of tissue: names in the margins are not cut off, and the scale bar has a round length."""
    thumbnail = np.full((shape[0] // 4, shape[1] // 4, 3), 243, np.uint8)
    thumbnail[10:-10, 10:-10] = (190, 130, 180)
    with Slide(write_thumbnail(tmp_path / "long.tif", thumbnail)) as slide:
        quality = slide_quality(slide, focus=False)
    for figure in (contact_sheet(quality), preset_sheet("long", {"he": quality, "tma": quality})):
        figure.canvas.draw()
        width, height = figure.get_size_inches()
        assert 3 < width < 20
        assert 2 < height < 20
        box = figure.bbox
        for ax in figure.axes:
            assert box.contains(*ax.bbox.min)
            assert box.contains(*ax.bbox.max)


def test_the_doctor_finds_everything_in_order(marked):
    checks = {check.name: check for check in doctor.examine(marked)}
    assert {check.state for check in checks.values()} <= {"ok", "warning"}
    assert "torch" in checks["libraries"].finding
    assert "efficientnet_lite0" in checks["encoders"].finding
    assert "GiB free" in checks["cache"].finding
    assert checks["slide marked"].state == "ok"
    assert "1 um/px" in checks["slide marked"].finding
    result = hdmil("doctor", marked)
    assert "0 fail" in result.stdout


def test_the_doctor_says_what_to_do(marked, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "marked.tif").write_bytes(marked.read_bytes())
    (tmp_path / "a" / "broken.svs").write_text("no slide")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HDMIL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(doctor, "has_openvino", lambda: False)
    monkeypatch.setattr(doctor, "_requirements", lambda: ["torch>=99", "no-such-library"])
    result = hdmil("doctor", tmp_path / "a", tmp_path / "marked.tif", marked, code=1)
    lines = result.stdout.splitlines()
    assert any(line.startswith("fails") and "set HDMIL_CACHE to a folder" in line for line in lines)
    assert any(line.startswith("fails") and "pip install 'torch>=99'" in line for line in lines)
    assert any(line.startswith("fails") and "no-such-library is missing" in line for line in lines)
    assert any(line.startswith("warning") and "pip install 'hdmil[fast]'" in line for line in lines)
    assert any(line.startswith("fails") and "slide broken" in line for line in lines)
    assert any(line.startswith("fails") and "2 slides are called marked" in line for line in lines)


def test_the_doctor_wants_room_in_the_cache(monkeypatch, tmp_path):
    usage = {"free": 5 * 2**30}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), usage))
    assert doctor._cache().state == "warning"
    usage["free"] = 2**29
    assert doctor._cache().state == "fails"
    assert "make room" in doctor._cache().finding


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_doctor_without_a_gpu():
    checks = [check for check in doctor.examine() if check.name == "GPU"]
    assert len(checks) == 1


def test_unreadable_folders_are_one_line(tmp_path):
    error = hdmil("report", tmp_path, "--out", tmp_path / "r", code=1).stderr
    assert "no slides in it" in error
    (tmp_path / "file").write_text("")
    assert "is a file already" in hdmil("report", tmp_path, "--out", tmp_path / "file", code=1).stderr
    missing = hdmil("report", tmp_path, "--out", tmp_path / "r", "--bags", tmp_path / "no", code=1).stderr
    assert "no such folder of bags" in missing
