"""Every command, from arguments to files; every bad input: one clear line, nothing half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from model_factory import ColorEncoder, write_textured_slide
from slide_factory import write_slide
from typer.testing import CliRunner

from hdmil_lib.cli import app
from hdmil_lib.bags import read_bag, write_bag

N_SLIDES = 12


def hdmil(*arguments, code=0):
    """Run a command and return what it printed; on an error, its one line on stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    if code == 0:
        return result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


@pytest.fixture(scope="module", autouse=True)
def color_encoder():
    """The commands load an encoder without weights, in no time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("features.encoders", "inference.predictor"):
            patch.setattr(f"hdmil_lib.{module}.load_encoder", load_color_encoder)
        yield


def load_color_encoder(name, precision="auto", calibration=None, compiled=False):
    assert not compiled
    encoder = ColorEncoder()
    if precision == "int8":
        assert calibration.shape == (2 * 9, 256, 256, 3) and calibration.dtype == np.uint8
        encoder.precision = precision
    return encoder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A cohort of small slides with its label file, its bags and a model, all made by the commands."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "slides").mkdir()
    rows = []
    for i in range(N_SLIDES):
        path = write_textured_slide(folder / "slides" / f"s{i:02d}.tif", 3, 3, seed=i)
        label = ("normal", "tumor")[i % 2]
        rows.append(
            {"slide_id": path.stem, "case_id": f"case {i}", "label": label, "path": f"slides/{path.name}"}
        )
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    hdmil("extract", folder / "slides", "--out", folder / "bags")
    hdmil(*train_arguments(folder), "--out", folder / "model", "--compare", "max")
    return folder


def train_arguments(folder, cohort="cohort.csv", bags="bags", folds=3):
    return (
        *("train", "--cohort", folder / cohort, "--bags", folder / bags),
        *("--folds", folds, "--epochs", 1, "--workers", 1),
    )


def test_help_lists_the_commands_without_loading_what_they_need():
    code = (
        "import sys, hdmil_lib.cli; print(*{'pandas', 'timm', 'openslide', 'matplotlib'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.split() == []
    listing = hdmil("--help")
    assert all(command in listing for command in ("samples", "extract", "train", "calibrate", "predict"))


def test_extract_writes_a_bag_for_each_slide_and_skips_what_is_done(work):
    assert len(list((work / "bags").glob("*.h5"))) == N_SLIDES
    assert read_bag(work / "bags" / "s00.h5").features.shape == (9, 6)
    assert f"skipped: {N_SLIDES} slides" in hdmil("extract", work / "cohort.csv", "--out", work / "bags")


def test_extract_takes_files_folders_and_label_files(work, tmp_path):
    single = work / "slides" / "s03.tif"
    assert "done: 1 slides, 9 tiles" in hdmil("extract", single, "--out", tmp_path / "one")
    for source in (work / "slides", work / "cohort.csv"):
        out = tmp_path / source.stem
        hdmil("extract", source, "--out", out)
        assert len(list(out.glob("*.h5"))) == N_SLIDES


def test_extract_fits_int8_to_the_slides(work, tmp_path):
    slides = [work / "slides" / f"s0{i}.tif" for i in range(2)]
    hdmil("extract", *slides, "--out", tmp_path / "bags", "--precision", "int8")
    assert read_bag(tmp_path / "bags" / "s01.h5").attrs["precision"] == "int8"


def test_extract_goes_on_when_a_slide_fails_and_says_which(work, tmp_path):
    (tmp_path / "notes.tif").write_text("not a slide")
    error = hdmil(
        "extract", tmp_path / "notes.tif", work / "slides" / "s00.tif", "--out", tmp_path / "bags", code=1
    )
    assert "notes.tif" in error
    assert [path.name for path in (tmp_path / "bags").iterdir()] == ["s00.h5"]


def test_two_slides_of_one_name_would_share_a_bag(work, tmp_path):
    twin = write_textured_slide(tmp_path / "s00.tif", 1, 1)
    error = hdmil("extract", work / "slides" / "s00.tif", twin, "--out", tmp_path / "bags", code=1)
    assert "s00" in error and not (tmp_path / "bags").exists()


def test_train_writes_a_model_and_its_test_scores(work):
    scores = pd.read_csv(work / "model" / "scores.csv", index_col="method")
    assert set(scores.index) == {"Max-Pooling", "HDMIL†", "HDMIL"}
    assert {path.name for path in (work / "model").iterdir()} >= {
        *("config.json", "dmin.safetensors", "lipn.safetensors", "scores.md"),
    }
    config = json.loads((work / "model" / "config.json").read_text())
    assert (config["classes"], config["encoder"]) == (["normal", "tumor"], "color")


def test_the_model_kept_is_of_the_fold_with_the_lowest_validation_loss(work):
    runs = work / "model" / "runs" / "hdmil"
    losses = [pd.read_csv(runs / f"fold{fold}" / "history.csv")["val_loss"].min() for fold in range(3)]
    best = runs / f"fold{int(np.argmin(losses))}" / "model.safetensors"
    assert (work / "model" / "lipn.safetensors").read_bytes() == best.read_bytes()


def test_predict_prints_the_class_and_draws_the_heatmap(work, tmp_path):
    picture = tmp_path / "pictures" / "s00.png"
    slide = work / "slides" / "s00.tif"
    text = hdmil("predict", slide, "--model", work / "model", "--heatmap", picture)
    assert "slide    s00" in text and ("normal 0." in text or "normal 1." in text)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == ["s00.png"]


def test_predict_reads_every_tile_when_asked(work):
    slide = work / "slides" / "s00.tif"
    assert "9 of 9 read" in hdmil("predict", slide, "--model", work / "model", "--all-tiles")


def test_predict_stops_at_a_budget_and_says_why(work):
    slide, model = work / "slides" / "s00.tif", ("--model", work / "model")
    assert "4 of 9 read, then stopped: max_tiles" in hdmil("predict", slide, *model, "--max-tiles", 4)
    text = hdmil("predict", slide, *model, "--max-seconds", 1e-6)
    assert "9 of 9 read" in text and "seconds  " in text  # the first block
    whole = hdmil("predict", slide, *model, "--all-tiles")
    anytime = hdmil("predict", slide, *model, "--anytime")  # not calibrated: everything
    assert "9 of 9 read, then stopped: all tiles" in anytime
    assert anytime.splitlines()[1] == whole.splitlines()[1]
    assert "max_seconds is 0.0" in hdmil("predict", slide, *model, "--max-seconds", 0, code=1)
    assert "--all-tiles" in hdmil("predict", slide, *model, "--max-tiles", 4, "--all-tiles", code=1)


def test_calibrate_writes_the_rules_that_held_out_slides_allow(work, tmp_path):
    shutil.copytree(work / "model", tmp_path / "model")
    arguments = ("calibrate", "--cohort", work / "cohort.csv", "--bags", work / "bags")
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    text = hdmil(*arguments, "--model", tmp_path / "model")
    assert text.count(f"not achievable with {N_SLIDES} slides; it takes 45") == 2 and "--all-tiles" in text
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == before
    text = hdmil(*arguments, "--model", tmp_path / "model", "--epsilon", 0.6, "--delta", 0.5)
    after = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "rule " in text and after["thresholds"] > before["thresholds"]
    assert after["margin"] is None  # a slide is one block, so that no margin reads less
    assert "epsilon is 2.0" in hdmil(*arguments, "--model", tmp_path / "model", "--epsilon", 2, code=1)


def test_samples_names_what_it_prepared(monkeypatch, work):
    from hdmil_lib.cohort import Cohort

    cohort = Cohort.from_csv(work / "cohort.csv", bag_dir=work / "bags")
    asked = []
    monkeypatch.setattr(
        "hdmil_lib.cohort.prepare_cohort", lambda name, fast: asked.append((name, fast)) or cohort
    )
    monkeypatch.setattr("hdmil_lib.cohort.sample_slide", lambda: Path("CMU-1-Small-Region.svs"))
    text = hdmil("samples", "--cohort", "nsclc-mini", "--fast")
    assert asked == [("nsclc-mini", True)]
    assert "synthetic" in text and str(work / "bags") in text and "CMU-1" in text


def test_encoders_are_listed_with_their_licences():
    listing = hdmil("encoders")
    assert "efficientnet_lite0" in listing and "Apache-2.0" in listing


def broken_slide(folder, kind):
    path = folder / f"{kind}.tif"
    pixels = np.full((600, 600, 3), (150, 80, 170), np.uint8)
    if kind == "absent":
        return path
    if kind == "text":
        path.write_text("not a slide")
    elif kind == "truncated":
        write_textured_slide(path, 4, 4)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "unscaled":
        write_slide(path, pixels, mpp=None)
    elif kind == "small":
        write_slide(path, pixels[:200, :200])
    elif kind == "blank":
        write_slide(path, np.full_like(pixels, 245))
    return path


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("absent", "Check the path"),
        ("text", "convert"),
        ("truncated", "again"),
        ("unscaled", "mpp="),
        ("small", "smaller than a tile"),
        ("blank", "thumbnail"),
    ],
)
def test_a_slide_that_cannot_be_used(work, tmp_path, kind, remedy):
    path = broken_slide(tmp_path, kind)
    before = set(tmp_path.rglob("*"))
    picture = tmp_path / "heatmap.png"
    for error in (
        hdmil("predict", path, "--model", work / "model", "--all-tiles", "--heatmap", picture, code=1),
        hdmil("extract", path, "--out", tmp_path, code=1),
    ):
        assert path.name in error and remedy in error
    assert set(tmp_path.rglob("*")) == before


def test_a_slide_without_a_scale_is_used_when_it_is_given(work, tmp_path):
    path = broken_slide(tmp_path, "unscaled")
    assert "4 tiles" in hdmil("extract", path, "--out", tmp_path, "--mpp", 0.5)
    assert "of 4 read" in hdmil("predict", path, "--model", work / "model", "--mpp", 0.5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda table: pd.concat([table, table.iloc[:1].assign(slide_id="s99")]), "s99"),
        (lambda table: table.drop(index=5), "s05"),
        (lambda table: pd.concat([table, table.iloc[7:8]]), "s07"),
        (lambda table: table.assign(label="tumor"), "two classes"),
        (lambda table: table.assign(case_id=table["label"]), "fewer than the 3 folds"),
        (lambda table: table.drop(columns="label"), "label"),
        (lambda table: table.assign(label=table["label"].mask(table.index == 2)), "s02"),
    ],
    ids=["no bag", "no row", "twice", "one class", "few cases", "no labels", "label empty"],
)
def test_a_label_file_that_does_not_fit(work, tmp_path, change, named):
    change(pd.read_csv(work / "cohort.csv")).to_csv(tmp_path / "changed.csv", index=False)
    arguments = ("--cohort", tmp_path / "changed.csv", "--bags", work / "bags", "--out", tmp_path / "model")
    error = hdmil("train", *arguments, "--folds", 3, "--epochs", 1, "--workers", 1, code=1)
    assert named in error
    assert [path.name for path in tmp_path.iterdir()] == ["changed.csv"]


def test_bags_of_two_encoders(work, tmp_path):
    for path in (work / "bags").glob("*.h5"):
        bag = read_bag(path)
        if bag.slide_id == "s01":
            bag.attrs["encoder"] = "other"
        write_bag(tmp_path / "bags" / path.name, bag)
    arguments = ("--cohort", work / "cohort.csv", "--bags", tmp_path / "bags", "--out", tmp_path / "model")
    error = hdmil("train", *arguments, code=1)
    assert "s01" in error and "other" in error and "color" in error
    assert not (tmp_path / "model").exists()


def test_extract_into_the_bags_of_another_encoder(work, tmp_path):
    bag = read_bag(work / "bags" / "s00.h5")
    write_bag(tmp_path / "s00.h5", bag)
    before = (tmp_path / "s00.h5").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ColorEncoder, "weights_hash", "c02")
        error = hdmil("extract", work / "slides" / "s00.tif", "--out", tmp_path, code=1)
    assert "c01" in error and "c02" in error
    assert (tmp_path / "s00.h5").read_bytes() == before


def test_a_model_of_another_encoder(work):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ColorEncoder, "weights_hash", "c02")
        error = hdmil("predict", work / "slides" / "s00.tif", "--model", work / "model", code=1)
    assert "c01" in error and "c02" in error


def test_training_again_with_other_settings_keeps_what_is_there(work):
    before = {path: path.read_bytes() for path in (work / "model").rglob("*") if path.is_file()}
    error = hdmil(*train_arguments(work), "--out", work / "model", "--seed", 7, code=1)
    assert "another folder" in error
    assert {path: path.read_bytes() for path in (work / "model").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("predict", "slides/s00.tif", "--model", "bags"), "config.json"),
        (("predict", "slides/s00.tif", "--model", "model", "--heatmap", "map.xyz"), "map.xyz"),
        (("extract", "model", "--out", "new"), "no slides"),
        (("extract", "absent.csv", "--out", "new"), "absent.csv"),
        (("train", "--cohort", "absent.csv", "--bags", "bags", "--out", "new"), "absent.csv"),
        (("train", "--cohort", "cohort.csv", "--bags", "bags", "--out", "new", "--preset", "x"), "brca"),
        (("train", "--cohort", "cohort.csv", "--bags", "bags", "--out", "new", "--compare", "x"), "abmil"),
        (("train", "--cohort", "cohort.csv", "--bags", "bags", "--out", "new", "--folds", "2"), "three"),
        (("samples", "--cohort", "x"), "camelyon-mini"),
    ],
)
def test_arguments_that_name_nothing(work, monkeypatch, arguments, named):
    monkeypatch.chdir(work)
    assert named in hdmil(*arguments, code=1)
    assert not (work / "new").exists()
