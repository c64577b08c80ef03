"""Every command, from arguments to files; every bad input: one clear line, nothing half-written."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from model_factory import ColorEncoder, make_model, write_textured_slide
from safetensors.torch import load_file
from slide_factory import write_slide
from typer.testing import CliRunner

from hdmil_lib.bags import EncoderIdentity, read_bag, write_bag
from hdmil_lib.cli import app
from hdmil_lib.devices import resolve
from hdmil_lib.models import HDMIL
from hdmil_lib.splits import read_splits
from hdmil_lib.version import __version__

N_SLIDES = 12


def hdmil(*arguments, code=0):
    """Run a command and return what it printed; on an error, its one line on stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    if code == 0:
        return result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture(scope="module", autouse=True)
def color_encoder():
    """The commands load an encoder without weights, in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hdmil_lib.encoders.loading.load_encoder", load_color_encoder)
        yield


def load_color_encoder(name, device="auto", precision="auto", int8_tiles=None, compiled=False, decoder="cpu"):
    assert not compiled
    encoder = ColorEncoder()
    if precision == "int8":
        assert int8_tiles.shape == (2 * 9, 256, 256, 3)
        assert int8_tiles.dtype == np.uint8
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
    hdmil(*train_arguments(folder), "--out", folder / "trained", "--compare", "max")
    (folder / "model").symlink_to(folder / "trained" / "model")
    return folder


def train_arguments(folder, cohort="cohort.csv", bags="bags", folds=3):
    return (
        *("train", "--cohort", folder / cohort, "--bags", folder / bags),
        *("--folds", folds, "--epochs", 1, "--workers", 1),
    )


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_help_lists_the_commands_without_loading_what_they_need():
    code = (
        "import sys, hdmil_lib.cli; print(*{'pandas', 'timm', 'openslide', 'matplotlib'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.split() == []
    listing = hdmil("--help")
    assert all(command in listing for command in ("samples", "extract", "train", "calibrate", "predict"))


def test_evaluate_scores_a_cohort_by_slide_and_by_patient(work, tmp_path):
    arguments = ("evaluate", "--model", work / "model", "--bags", work / "bags", "--cohort")
    printed = hdmil(*arguments, work / "cohort.csv", "--out", tmp_path / "predictions.csv")
    assert f"slides  {N_SLIDES}" in printed
    assert "patients" not in printed
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert len(table) == N_SLIDES
    assert (table["p_0"] + table["p_1"]).to_numpy() == pytest.approx(1)
    n_unseen = len(read_splits(work / "trained" / "runs" / "splits")[0].test)
    assert f"the model was trained on {N_SLIDES - n_unseen} of these {N_SLIDES} slides" in printed
    labels = pd.read_csv(work / "cohort.csv")
    seen = set(HDMIL.from_pretrained(work / "model").known_info.seen_among(labels["slide_id"]))
    new = labels["slide_id"].where(~labels["slide_id"].isin(seen)).dropna()
    labels[labels["slide_id"].isin(new)].to_csv(tmp_path / "new.csv", index=False)
    assert "trained on" not in hdmil(*arguments, tmp_path / "new.csv")
    labels.assign(case_id=[f"case {i // 2}" for i in range(N_SLIDES)]).to_csv(tmp_path / "pairs.csv")
    assert f"patients   {N_SLIDES // 2}" in hdmil(*arguments, tmp_path / "pairs.csv")
    labels.replace("tumor", "cancer").to_csv(tmp_path / "other.csv", index=False)
    assert "does not know class 'cancer'" in hdmil(*arguments, tmp_path / "other.csv", code=1)


@pytest.mark.parametrize("option", ["--heatmap", "--geojson", "--out"])
def test_where_results_cannot_be_written_is_said_before_the_work(work, tmp_path, monkeypatch, option):
    monkeypatch.setattr(HDMIL, "from_pretrained", None)  # is not reached
    arguments = ("predict", work / "slides" / "s00.tif", "--model", work / "model", option)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    assert "is a folder already" in hdmil(*arguments, tmp_path / "folder.png", code=1)
    assert "is a file, no folder" in hdmil(*arguments, tmp_path / "file" / "a.png", code=1)


def test_an_interrupt_says_how_to_go_on(work, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hdmil_lib.encoders.extraction.extract", interrupted)
    found = hdmil("extract", work / "slides", "--out", work / "interrupted", code=130)
    assert "the same command goes on from there" in found


def test_a_terminal_without_a_dagger_is_no_error(tmp_path):
    code = "import hdmil_lib.cli as cli; cli.app = lambda: print('\\u2020'); cli.main()"
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert (done.returncode, done.stdout) == (0, b"?\n"), done.stderr


def test_the_version_is_printed():
    assert hdmil("--version") == f"hdmil {__version__}\n"


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


def test_extract_refuses_an_output_that_is_a_file_before_it_encodes(work, tmp_path, monkeypatch):
    monkeypatch.setattr(ColorEncoder, "__call__", lambda self, tiles: 1 / 0)
    (tmp_path / "bags").write_text("notes")
    error = hdmil("extract", work / "slides", "--out", tmp_path / "bags", code=1)
    assert "bags: cannot be a folder" in error
    assert (tmp_path / "bags").read_text() == "notes"


def test_extract_goes_on_when_a_slide_fails_and_says_which(work, tmp_path):
    (tmp_path / "notes.tif").write_text("not a slide")
    error = hdmil(
        "extract", tmp_path / "notes.tif", work / "slides" / "s00.tif", "--out", tmp_path / "bags", code=1
    )
    assert "notes.tif" in error
    assert [path.name for path in (tmp_path / "bags").glob("*.h5")] == ["s00.h5"]


def test_two_slides_of_one_name_would_share_a_bag(work, tmp_path):
    twin = write_textured_slide(tmp_path / "s00.tif", 1, 1)
    error = hdmil("extract", work / "slides" / "s00.tif", twin, "--out", tmp_path / "bags", code=1)
    assert "s00" in error
    assert not (tmp_path / "bags").exists()


def test_train_writes_a_model_and_its_test_scores(work):
    scores = pd.read_csv(work / "trained" / "scores.csv", index_col="method")
    assert set(scores.index) == {"Max-Pooling", "HDMIL†", "HDMIL"}
    assert {path.name for path in (work / "trained").iterdir()} == {
        "model",
        "runs",
        "scores.csv",
        "scores.md",
    }
    assert {path.name for path in (work / "model").iterdir()} == {
        *("config.json", "model.safetensors", "README.md"),
    }
    info = json.loads((work / "model" / "config.json").read_text())["info"]
    assert (info["classes"], info["encoder"]) == (["normal", "tumor"], "color")


def test_the_model_kept_is_of_the_fold_with_the_lowest_validation_loss(work):
    runs = work / "trained" / "runs" / "hdmil"
    losses = [pd.read_csv(runs / f"fold{fold}" / "history.csv")["val_loss"].min() for fold in range(3)]
    best = load_file(runs / f"fold{int(np.argmin(losses))}" / "model.safetensors")
    kept = load_file(work / "model" / "model.safetensors")
    lipn = {name.removeprefix("lipn."): t for name, t in kept.items() if name.startswith("lipn.")}
    assert lipn.keys() == best.keys()
    assert all(torch.equal(lipn[name], best[name]) for name in best)


def test_predict_prints_the_class_and_draws_the_heatmap(work, tmp_path):
    picture = tmp_path / "pictures" / "s00.png"
    slide = work / "slides" / "s00.tif"
    text = hdmil("predict", slide, "--model", work / "model", "--heatmap", picture)
    assert "slide    s00" in text
    assert "normal 0." in text or "normal 1." in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == ["s00.png"]


def test_predict_writes_the_kept_tiles_for_qupath(work, tmp_path):
    slide = work / "slides" / "s00.tif"
    hdmil("predict", slide, "--model", work / "model", "--geojson", tmp_path / "kept" / "s00.geojson")
    content = json.loads((tmp_path / "kept" / "s00.geojson").read_text())
    model = HDMIL.from_pretrained(work / "model")
    model.encoder = ColorEncoder()
    assert len(content["features"]) == model.predict(slide).kept.sum()


def test_predict_writes_a_table_of_many_slides_and_goes_on_where_it_stopped(work, tmp_path, monkeypatch):
    out = tmp_path / "tables" / "t.csv"
    two = [work / "slides" / f"s0{i}.tif" for i in range(2)]
    model = ("--model", work / "model", "--out", out)
    text = hdmil("predict", *two, *model)
    assert f"{out}: 2 of 2 slides predicted" in text
    table = pd.read_csv(out)
    assert table["slide_id"].tolist() == ["s00", "s01"]
    assert table["error"].isna().all()
    np.testing.assert_allclose(table["p_normal"] + table["p_tumor"], 1, atol=1e-6)
    assert set(table["label"]) <= {"normal", "tumor"}
    assert (table["n_tiles"] == 9).all()

    n_encoded = []
    encode = ColorEncoder.__call__
    monkeypatch.setattr(
        ColorEncoder, "__call__", lambda self, tiles: n_encoded.append(len(tiles)) or encode(self, tiles)
    )
    hdmil("predict", *two, *model)
    assert n_encoded == []
    pd.testing.assert_frame_equal(pd.read_csv(out), table)
    hdmil("predict", work / "cohort.csv", *model)  # adds ten
    again = pd.read_csv(out)
    pd.testing.assert_frame_equal(again[:2], table)
    assert len(again) == N_SLIDES
    assert sum(n_encoded) == again["n_read"][2:].sum()
    hdmil("predict", work / "slides", "--model", work / "model", "--out", tmp_path / "folder.csv")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "folder.csv").drop(columns="seconds"), again.drop(columns="seconds")
    )


def test_predict_writes_parquet_and_goes_on_from_it(work, tmp_path):
    (tmp_path / "notes.tif").write_text("not a slide")
    slides = [work / "slides" / f"s0{i}.tif" for i in range(2)]
    for out in (tmp_path / "t.parquet", tmp_path / "t.csv"):
        hdmil("predict", tmp_path / "notes.tif", slides[0], "--model", work / "model", "--out", out, code=1)
        hdmil("predict", *slides, "--model", work / "model", "--out", out)
    table, text = pd.read_parquet(tmp_path / "t.parquet"), pd.read_csv(tmp_path / "t.csv")
    assert table["slide_id"].tolist() == ["notes", "s00", "s01"]
    for column in ("slide_id", "p_tumor", "n_read"):
        np.testing.assert_array_equal(table[column].dropna(), text[column].dropna())
    assert table["n_read"].dtype == "Int64"
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    error = hdmil("predict", *slides, "--model", work / "model", "--out", tmp_path / "bad.parquet", code=1)
    assert "no table of predictions" in error


def test_predict_writes_a_table_of_one_slide_too(work, tmp_path):
    slide = work / "slides" / "s00.tif"
    hdmil("predict", slide, "--model", work / "model", "--out", tmp_path / "t.csv", "--all-tiles")
    assert pd.read_csv(tmp_path / "t.csv")["n_read"].tolist() == [9]


def test_predict_goes_on_when_a_slide_fails_and_says_which(work, tmp_path):
    (tmp_path / "notes.tif").write_text("not a slide")
    slides = (tmp_path / "notes.tif", work / "slides" / "s00.tif")
    error = hdmil("predict", *slides, "--model", work / "model", "--out", tmp_path / "t.csv", code=1)
    assert error.startswith("error: notes: ")
    assert "notes.tif" in error
    table = pd.read_csv(tmp_path / "t.csv")
    assert table["slide_id"].tolist() == ["notes", "s00"]
    assert "notes.tif" in table["error"][0]
    assert table["p_tumor"].notna().tolist() == [False, True]


@pytest.mark.parametrize(
    "options",
    [(), ("--out", "t.csv", "--heatmap", "h.png"), ("--out", "t.csv", "--anytime"), ("--max-tiles", 3)],
)
def test_several_slides_need_a_table(work, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    two = [work / "slides" / f"s0{i}.tif" for i in range(2)]
    for slides in (two, [work / "slides"]):
        error = hdmil("predict", *slides, "--model", work / "model", *options, code=1)
        assert "--out" in error
    assert not list(tmp_path.iterdir())


def test_two_slides_of_one_name_would_share_a_row(work, tmp_path):
    twin = write_textured_slide(tmp_path / "s00.tif", 1, 1)
    slides = (work / "slides" / "s00.tif", twin)
    error = hdmil("predict", *slides, "--model", work / "model", "--out", tmp_path / "t.csv", code=1)
    assert "'s00'" in error
    assert not (tmp_path / "t.csv").exists()


def test_predict_reads_every_tile_when_asked(work):
    slide = work / "slides" / "s00.tif"
    assert "9 of 9 read" in hdmil("predict", slide, "--model", work / "model", "--all-tiles")


def test_predict_stops_at_a_budget_and_says_why(work):
    slide, model = work / "slides" / "s00.tif", ("--model", work / "model")
    assert "4 of 9 read, then stopped: max_tiles" in hdmil("predict", slide, *model, "--max-tiles", 4)
    text = hdmil("predict", slide, *model, "--max-seconds", 1e-6)
    assert "9 of 9 read" in text
    assert "seconds  " in text
    whole = hdmil("predict", slide, *model, "--all-tiles")
    anytime = hdmil("predict", slide, *model, "--anytime")  # not calibrated: everything
    assert "9 of 9 read, then stopped: all tiles" in anytime
    assert anytime.splitlines()[1] == whole.splitlines()[1]
    assert "max_seconds is 0.0" in hdmil("predict", slide, *model, "--max-seconds", 0, code=1)
    assert "--all-tiles" in hdmil("predict", slide, *model, "--max-tiles", 4, "--all-tiles", code=1)


def calibrate(work, model, out, *options, code=0):
    arguments = ("calibrate", "--cohort", work / "cohort.csv", "--bags", work / "bags")
    return hdmil(*arguments, "--model", model, "--out", out, *options, code=code)


@pytest.fixture
def ranked(work, tmp_path):
    """A model whose LIPN tells tiles apart, and whose trained thresholds read nearly all of them."""
    make_model(work / "slides" / "s00.tif", keep=0.95).save_pretrained(tmp_path / "ranked")
    return tmp_path / "ranked"


LOOSE = ("--epsilon", 0.99, "--delta", 0.99)
"""A rule may err on all but one of 12 slides: the fastest passes, whatever the networks say."""


def test_calibrate_writes_the_rules_that_held_out_slides_allow(work, ranked, tmp_path):
    before = contents(ranked)
    trained = HDMIL.from_pretrained(ranked)
    text = calibrate(work, ranked, tmp_path / "strict")
    assert text.count(f"not achievable with {N_SLIDES} slides; it takes 45") == 2
    assert "--all-tiles" in text
    strict = HDMIL.from_pretrained(tmp_path / "strict")
    assert torch.equal(strict.thresholds, trained.trained_thresholds)
    assert strict.margin.isinf()

    text = calibrate(work, ranked, tmp_path / "loose", *LOOSE)
    loose = HDMIL.from_pretrained(tmp_path / "loose")
    assert "rule " in text
    assert (loose.thresholds > trained.thresholds).all()
    assert loose.margin.isinf()  # a slide is one block, so that no margin reads less
    assert torch.equal(loose.trained_thresholds, trained.trained_thresholds)
    for name, tensor in trained.state_dict().items():
        assert name == "thresholds" or torch.equal(loose.state_dict()[name], tensor)
    assert "epsilon is 2.0" in calibrate(work, ranked, tmp_path / "new", "--epsilon", 2, code=1)
    assert not (tmp_path / "new").exists()
    assert contents(ranked) == before


def test_calibrating_what_was_calibrated_gives_the_same_rules(work, ranked, tmp_path):
    """Candidates depend on no slide of the calibration: not even by way of the rules it learned before."""
    first = calibrate(work, ranked, tmp_path / "first", *LOOSE)
    second = calibrate(work, tmp_path / "first", tmp_path / "second", *LOOSE)
    again = calibrate(work, ranked, tmp_path / "first", *LOOSE)
    assert again == first
    assert second == first.replace("/first", "/second")
    names = ("config.json", "model.safetensors", "README.md")
    assert {path.name for path in (tmp_path / "first").iterdir()} == set(names)
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_one_slide_of_each_case_calibrates(work, ranked, tmp_path):
    table = pd.read_csv(work / "cohort.csv")
    table.assign(case_id=table.index // 2).to_csv(tmp_path / "cases.csv", index=False)
    text = hdmil(
        *("calibrate", "--cohort", tmp_path / "cases.csv", "--bags", work / "bags"),
        *("--model", ranked, "--out", tmp_path / "new"),
    )
    assert text.count(f"not achievable with {N_SLIDES // 2} slides") == 2


@pytest.mark.parametrize("out", ["model", "trained/model", "trained/../model", "trained/model/"])
def test_calibrate_does_not_write_over_the_model(work, monkeypatch, out):
    before = contents(work / "trained")
    monkeypatch.chdir(work)
    assert "is the model itself" in calibrate(work, "model", out, *LOOSE, code=1)
    assert contents(work / "trained") == before


def test_samples_names_what_it_prepared(monkeypatch, work):
    from hdmil_lib.cohort import Cohort

    cohort = Cohort.from_csv(work / "cohort.csv", bags=work / "bags")
    asked = []
    monkeypatch.setattr(
        "hdmil_lib.synthetic.cohorts.prepare_cohort",
        lambda name, fast, looks, device: asked.append((name, fast, device)) or cohort,
    )
    monkeypatch.setattr("hdmil_lib.slides.sample.sample_slide", lambda: Path("CMU-1-Small-Region.svs"))
    text = hdmil("samples", "--cohort", "nsclc-mini", "--fast")
    assert asked == [("nsclc-mini", True, "auto")]
    assert "synthetic" in text
    assert str(work / "bags") in text
    assert "CMU-1" in text


def test_encoders_are_listed_with_their_licenses():
    listing = hdmil("encoders")
    assert "efficientnet_lite0" in listing
    assert "Apache-2.0" in listing


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
        ("blank", "hdmil tissue"),
    ],
)
def test_a_slide_that_cannot_be_used(work, tmp_path, kind, remedy):
    path = broken_slide(tmp_path, kind)
    before = {path for path in tmp_path.rglob("*") if ".hdmil" not in path.parts}
    picture = tmp_path / "heatmap.png"
    for error in (
        hdmil("predict", path, "--model", work / "model", "--all-tiles", "--heatmap", picture, code=1),
        hdmil("extract", path, "--out", tmp_path, code=1),
    ):
        assert path.name in error
        assert remedy in error
    kept = {tmp_path / "failed", tmp_path / "failed" / f"{path.stem}.json"}
    visible = {p for p in tmp_path.rglob("*") if ".hdmil" not in p.parts}
    assert visible - kept == before, "only the notes of the run are new"


def test_a_slide_without_a_scale_is_used_when_it_is_given(work, tmp_path):
    path = broken_slide(tmp_path, "unscaled")
    assert "4 tiles" in hdmil("extract", path, "--out", tmp_path, "--mpp", 0.5)
    assert "of 4 read" in hdmil("predict", path, "--model", work / "model", "--mpp", 0.5)


@pytest.fixture
def scales(tmp_path):
    """Slides of 3 x 3 tiles at 0.5 um/px, of which one does not say so."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in ("stated", "second"):
        write_textured_slide(folder / f"{name}.tif", 3, 3)
    write_slide(folder / "unstated.tif", tifffile.imread(folder / "stated.tif", key=0), mpp=None)
    return folder


def tiles_of(bags):
    return {path.stem: len(read_bag(path)) for path in sorted(bags.glob("*.h5"))}


def test_mpp_fills_gaps_and_a_second_run_skips(scales, tmp_path):
    arguments = ("extract", scales, "--out", tmp_path / "bags", "--mpp", 0.25)
    scale = "2 slides from the file's properties (0.5 um/px), 1 slide from --mpp (0.25 um/px)"
    assert f"scale: {scale}" in hdmil(*arguments)
    assert tiles_of(tmp_path / "bags") == {"second": 9, "stated": 9, "unstated": 1}
    again = hdmil(*arguments)
    assert "skipped: 3 slides, 19 tiles" in again
    assert scale in again
    assert "nothing to do" in again


def test_another_mpp_in_a_second_run_is_said(scales, tmp_path):
    hdmil("extract", scales, "--out", tmp_path / "bags", "--mpp", 0.25)
    before = contents(tmp_path / "bags")
    error = hdmil("extract", scales, "--out", tmp_path / "bags", "--mpp", 0.5, code=1)
    assert "unstated.h5: already there, but made with mpp_x 0.25 instead of 0.5" in error
    bags = {path: data for path, data in contents(tmp_path / "bags").items() if path.suffix == ".h5"}
    assert all(before[path] == data for path, data in bags.items())
    (tmp_path / "bags" / "unstated.h5").unlink()
    assert "1 slide from --mpp (0.5 um/px)" in hdmil(
        "extract", scales, "--out", tmp_path / "bags", "--mpp", 0.5
    )
    assert tiles_of(tmp_path / "bags")["unstated"] == 9


def test_force_mpp_overrides_and_is_remembered(scales, tmp_path):
    slide, bags = scales / "stated.tif", ("--out", tmp_path / "bags")
    assert "scale: 1 slide from --force-mpp (0.25 um/px)" in hdmil(
        "extract", slide, *bags, "--force-mpp", 0.25
    )
    assert tiles_of(tmp_path / "bags") == {"stated": 1}
    assert "skipped: 1 slides" in hdmil("extract", slide, *bags, "--force-mpp", 0.25)
    error = hdmil("extract", slide, *bags, "--force-mpp", 0.3, code=1)
    assert "made with mpp_x 0.25 instead of 0.3" in error
    for options in ((), ("--mpp", 0.25)):
        error = hdmil("extract", slide, *bags, *options, code=1)
        assert "made with a scale that was given, 0.25 um/px. Give it again (--force-mpp" in error


def test_force_mpp_after_mpp_is_said(scales, tmp_path):
    slide, bags = scales / "stated.tif", ("--out", tmp_path / "bags")
    hdmil("extract", slide, *bags, "--mpp", 0.25)
    error = hdmil("extract", slide, *bags, "--force-mpp", 0.25, code=1)
    assert "made with mpp_x 0.5 instead of 0.25" in error


def test_a_failure_with_mpp_is_tried_again_with_force_mpp(tmp_path):
    """The slide is smaller than a tile at the scale that it states, but not at the other."""
    slide = write_slide(tmp_path / "a.tif", np.full((600, 600, 3), (150, 80, 170), np.uint8), mpp=(0.2, 0.2))
    bags = ("--out", tmp_path / "bags")
    assert "smaller than a tile" in hdmil("extract", slide, *bags, "--mpp", 0.5, code=1)
    assert "1 slide from --force-mpp (0.5 um/px)" in hdmil("extract", slide, *bags, "--force-mpp", 0.5)


def test_the_column_mpp_comes_before_the_file_and_mpp(scales, tmp_path):
    table = "slide_id,path,mpp\na,slides/stated.tif,0.25\nb,slides/second.tif,\nc,slides/unstated.tif,\n"
    (tmp_path / "table.csv").write_text(table)
    printed = hdmil("extract", tmp_path / "table.csv", "--out", tmp_path / "bags", "--mpp", 0.5)
    for part in (
        "1 slide from the column mpp (0.25 um/px)",
        "1 slide from the file's properties (0.5 um/px)",
        "1 slide from --mpp (0.5 um/px)",
    ):
        assert part in printed
    assert tiles_of(tmp_path / "bags") == {"a": 1, "b": 9, "c": 9}
    forced = hdmil("extract", tmp_path / "table.csv", "--out", tmp_path / "forced", "--force-mpp", 0.25)
    assert "scale: 3 slides from --force-mpp (0.25 um/px)" in forced
    (tmp_path / "table.csv").write_text(table.replace("0.25", ""))
    error = hdmil("extract", tmp_path / "table.csv", "--out", tmp_path / "bags", "--mpp", 0.5, code=1)
    assert "a.h5: already there, but made with a scale that was given, 0.25 um/px" in error


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda table: pd.concat([table, table.iloc[:1].assign(slide_id="s99")]), "s99"),
        (lambda table: pd.concat([table, table.iloc[7:8]]), "s07"),
        (lambda table: table.assign(label="tumor"), "two classes"),
        (lambda table: table.assign(case_id=table["label"]), "fewer than the 3 folds"),
        (lambda table: table.drop(columns="label"), "label"),
        (lambda table: table.assign(label=table["label"].mask(table.index == 2)), "s02"),
    ],
    ids=["no bag", "twice", "one class", "few cases", "no labels", "label empty"],
)
def test_a_label_file_that_does_not_fit(work, tmp_path, change, named):
    change(pd.read_csv(work / "cohort.csv")).to_csv(tmp_path / "changed.csv", index=False)
    arguments = ("--cohort", tmp_path / "changed.csv", "--bags", work / "bags", "--out", tmp_path / "model")
    error = hdmil("train", *arguments, "--folds", 3, "--epochs", 1, "--workers", 1, code=1)
    assert named in error
    assert [path.name for path in tmp_path.iterdir()] == ["changed.csv"]


def test_bags_without_a_row_are_left_out(work, tmp_path):
    pd.read_csv(work / "cohort.csv").drop(index=5).to_csv(tmp_path / "held_out.csv", index=False)
    options = ("--bags", work / "bags", "--out", tmp_path / "model", "--folds", 3, "--epochs", 1)
    hdmil("train", "--cohort", tmp_path / "held_out.csv", *options, "--workers", 1)
    parts = pd.concat(pd.read_csv(p) for p in (tmp_path / "model" / "runs").rglob("predictions.csv"))
    assert set(parts["slide_id"]) == {f"s{i:02d}" for i in range(N_SLIDES)} - {"s05"}


def test_bags_without_patches_train_classifiers_alone(work, tmp_path):
    for path in (work / "bags").glob("*.h5"):
        write_bag(tmp_path / "bags" / path.name, replace(read_bag(path), patches=None))
    arguments = ("train", "--cohort", work / "cohort.csv", "--bags", tmp_path / "bags", "--folds", 3)
    arguments = (*arguments, "--epochs", 1, "--workers", 1, "--out", tmp_path / "trained")
    error = hdmil(*arguments, code=1)
    assert "12 of 12 bags lack, such as s00; fill them in from the slides with `hdmil add-patches`" in error
    assert not (tmp_path / "trained").exists()
    printed = hdmil(*arguments, "--no-screening", "--compare", "abmil", "--balance", "loss")
    assert "normal: 6 slides of 6 patients\ntumor: 6 slides of 6 patients\n" in printed
    assert "note: class normal (6), tumor (6) has fewer than 20 patients" in printed
    assert "ABMIL" in printed
    assert "HDMIL†" in printed
    assert not (tmp_path / "trained" / "model").exists()


def test_splits_can_be_given(work, tmp_path):
    split = {"train": [f"s{i:02d}" for i in range(6)], "val": ["s06", "s07"], "test": ["s08", "s09"]}
    (tmp_path / "splits").mkdir()
    columns = {part: pd.Series(slides, dtype=str) for part, slides in split.items()}
    pd.DataFrame(columns).to_csv(tmp_path / "splits" / "splits_0.csv")
    options = ("--splits", tmp_path / "splits", "--out", tmp_path / "model")
    hdmil(*train_arguments(work), *options)
    for path in (tmp_path / "model" / "runs").rglob("predictions.csv"):
        assert pd.read_csv(path)["slide_id"].tolist() == split["test"]


def test_bags_of_two_encoders(work, tmp_path):
    for path in (work / "bags").glob("*.h5"):
        bag = read_bag(path)
        if bag.slide_id == "s01":
            bag = replace(bag, encoder=EncoderIdentity("other", "c01"))
        write_bag(tmp_path / "bags" / path.name, bag)
    arguments = ("--cohort", work / "cohort.csv", "--bags", tmp_path / "bags", "--out", tmp_path / "model")
    error = hdmil("train", *arguments, code=1)
    assert "s01" in error
    assert "other" in error
    assert "color" in error
    assert not (tmp_path / "model").exists()


def test_extract_into_the_bags_of_another_encoder(work, tmp_path):
    bag = read_bag(work / "bags" / "s00.h5")
    write_bag(tmp_path / "s00.h5", bag)
    before = (tmp_path / "s00.h5").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ColorEncoder, "weights_hash", "c02")
        error = hdmil("extract", work / "slides" / "s00.tif", "--out", tmp_path, code=1)
    assert "c01" in error
    assert "c02" in error
    assert (tmp_path / "s00.h5").read_bytes() == before


def test_a_model_of_another_encoder(work):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ColorEncoder, "weights_hash", "c02")
        error = hdmil("predict", work / "slides" / "s00.tif", "--model", work / "model", code=1)
    assert "c01" in error
    assert "c02" in error


def test_a_cascade_from_slides_to_a_prediction(work, tmp_path):
    hdmil("extract", work / "slides", "--out", tmp_path / "bags", "--look", 64)
    arguments = train_arguments(work, bags=tmp_path / "bags")
    text = hdmil(*arguments, "--out", tmp_path / "trained", "--cascade")
    assert "HDMIL, cascade" in text
    model = HDMIL.from_pretrained(tmp_path / "trained" / "model")
    assert model.look.side == 64
    assert ("no better than random tiles" in text) == (model.screening == "random")
    slide = work / "slides" / "s00.tif"
    assert "tiles" in hdmil("predict", slide, "--model", tmp_path / "trained" / "model")
    held_out = ("--cohort", work / "cohort.csv", "--bags", tmp_path / "bags", "--out", tmp_path / "rules")
    text = hdmil("calibrate", "--model", tmp_path / "trained" / "model", *held_out)
    assert ("the rules of the second look stay" in text) == model.looks_again
    assert HDMIL.from_pretrained(tmp_path / "rules").look.side == 64
    error = hdmil(*train_arguments(work), "--out", tmp_path / "other", "--cascade", code=1)
    assert "has no look of 64 pixels; extract its slide with `--look 64`" in error


def test_training_again_with_other_settings_keeps_what_is_there(work):
    before = contents(work / "trained")
    error = hdmil(*train_arguments(work), "--out", work / "trained", "--seed", 7, code=1)
    assert "another folder" in error
    assert contents(work / "trained") == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("predict", "slides/s00.tif", "--model", "bags"), "config.json"),
        (("predict", "slides/s00.tif", "--model", "model", "--heatmap", "map.xyz"), "map.xyz"),
        (("extract", "model", "--out", "new"), "no slides"),
        (("extract", "absent.csv", "--out", "new"), "absent.csv"),
        (("train", "--cohort", "absent.csv", "--bags", "bags", "--out", "new"), "absent.csv"),
        (
            ("train", "--cohort", "cohort.csv", "--bags", "bags", "--out", "new", "--recipe", "bcra"),
            "'brca'?",
        ),
        (
            ("train", "--cohort", "cohort.csv", "--bags", "bags", "--out", "new", "--splits", "x"),
            "splits_0.csv",
        ),
        (("predict", "slides/s00.tif", "--model", "absent"), "absent: no such model folder"),
        (("predict", "absent.csv", "--model", "model", "--out", "new"), "absent.csv"),
        (("predict", "slides/s00.tif", "--model", "model", "--device", "cuda:99"), "cuda:99"),
        (
            ("calibrate", "--cohort", "cohort.csv", "--bags", "bags", "--model", "bags", "--out", "new"),
            "config.json",
        ),
        (("train", "--cohort", "cohort.csv", "--bags", "bags", "--out", "new", "--compare", "x"), "abmil"),
        (("train", "--cohort", "cohort.csv", "--bags", "bags", "--out", "new", "--folds", "2"), "three"),
        (("samples", "--cohort", "x"), "camelyon-mini"),
    ],
)
def test_arguments_that_name_nothing(work, monkeypatch, arguments, named):
    monkeypatch.chdir(work)
    assert named in hdmil(*arguments, code=1)
    assert not (work / "new").exists()


def test_every_command_that_computes_refuses_a_device_that_is_not_there(work, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hdmil_lib.synthetic.cohorts.prepare_cohort", lambda name, fast, looks, device: resolve(device)
    )
    monkeypatch.setattr("hdmil_lib.encoders.loading.load_encoder", lambda name, device, **_: resolve(device))
    held_out = ("--cohort", work / "cohort.csv", "--bags", work / "bags")
    commands = (
        ("samples",),
        ("extract", work / "slides", "--out", tmp_path / "bags"),
        (*train_arguments(work), "--out", tmp_path / "trained"),
        ("calibrate", "--model", work / "model", "--out", tmp_path / "model", *held_out),
        ("predict", work / "slides" / "s00.tif", "--model", work / "model"),
    )
    for command in commands:
        text = hdmil(*command, "--device", "cuda:77", code=1)
        assert "There is no device 'cuda:77' here. Use 'auto' or one of: cpu" in text
