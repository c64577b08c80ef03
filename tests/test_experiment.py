"""The paper's experiment in miniature: a dozen small slides from a server on this machine, and its tables."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bucket_server import serve_bucket
from slide_factory import write_slide
from typer.testing import CliRunner

from hdmil_lib.cli import app
from hdmil_lib.errors import HDMILError
from hdmil_lib.public import fetching
from hdmil_lib.public.sources import Addresses
from hdmil_lib.reproduce.experiment import Experiment, check_experiment, paper_methods
from hdmil_lib.training.trained import CrossValidation

CACHE: dict[str, str] = {}
"""Where the converted encoder is, for all runs here."""

METHODS = ("max", "hdmil_dagger", "hdmil")


def miniature(folder: Path, bucket) -> None:
    """Camelyon16 with four training and two test slides of each class; tumor is darker."""
    rng = np.random.default_rng(0)
    reference = ["image,type,center,class"]
    for label, shade in (("normal", 0), ("tumor", 40)):
        for i in range(6):
            name = f"{label}_{i + 1:03d}" if i < 4 else f"test_{i + (2 if label == 'tumor' else 0):03d}"
            pixels = np.full((768, 768, 3), 245, np.uint8)
            tissue = rng.integers([140, 60, 150], [200, 110, 210], (640, 640, 3)) - shade
            pixels[64:704, 64:704] = tissue
            path = write_slide(folder / f"{name}.tif", pixels, tile=256, compression="jpeg")
            bucket.files[f"CAMELYON16/images/{name}.tif"] = path.read_bytes()
            reference.append(f"{name}.tif,{label},0,{'negative' if label == 'normal' else 'macro'}")
    sums = [f"{hashlib.md5(c).hexdigest()}  {k.removeprefix('CAMELYON16/')}" for k, c in bucket.files.items()]
    bucket.documents["CAMELYON16/checksums.md5"] = "\n".join(sums).encode()
    bucket.documents["CAMELYON16/evaluation/reference.csv"] = "\n".join(reference).encode()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with serve_bucket() as bucket:
        miniature(tmp_path_factory.mktemp("slides"), bucket)
        CACHE["HDMIL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fetching, "ADDRESSES", Addresses(bucket.url, bucket.url, bucket.url))
            yield bucket


def run(folder: Path, *more: str, name: str = "camelyon16", methods=METHODS):
    small = ["--encoder", "color", "--folds", "3", "--epochs", "1", "--timed", "1", "--device", "cpu"]
    systems = [word for method in methods for word in ("--method", method)]
    command = ["reproduce", name, "--dir", str(folder), *small, *systems, "--workers", "1", "--yes"]
    return CliRunner().invoke(app, [*command, *more], env=CACHE)


@pytest.fixture(scope="module")
def finished(bucket, tmp_path_factory):
    """Folder and output of a run in which the server fails at first, and one slide holds no tissue."""
    folder = tmp_path_factory.mktemp("experiment")
    bucket.faults["CAMELYON16/images/tumor_001.tif"] = ["drop", "wrong"]
    return folder, run(folder)


def test_one_command_leads_from_nothing_to_the_tables(finished):
    folder, result = finished
    assert result.exit_code == 0, result.output
    assert "extract  12 of 12 slides by color, not the paper's, which is resnet50" in result.output
    assert "train    3 systems on 3 folds, 9 trainings, of which 0 are there" in result.output
    tables = folder / "tables" / "color"
    first = pd.read_csv(tables / "table1.csv", index_col="method")
    assert first.index.tolist() == ["Max-Pooling", "HDMIL†", "HDMIL"]
    assert first.loc["HDMIL", "paper AUC"] == "90.88 (2.75)"
    assert first.loc["HDMIL", "s/slide"] > 0
    second = pd.read_csv(tables / "table2.csv", index_col=["cohort", "method"])
    assert second.index.tolist() == [(c, m) for c in ("here", "Camelyon16") for m in ("HDMIL†", "HDMIL")]
    third = pd.read_csv(tables / "table3.csv", index_col="components")
    assert third.index.tolist() == ["+SelfDist", "+LIPN"]
    report = (tables / "report.md").read_text()
    for words in (
        "12 slides with features",
        "The whole cohort has 12",
        "each tested on the official test part",
        "## Table 3",
    ):
        assert words in report


def test_all_folds_are_tested_on_the_official_test_part(finished):
    cv = CrossValidation(finished[0] / "runs" / "color-12-slides")
    tests = {f"test_{i:03d}" for i in (4, 5, 6, 7)}
    assert cv.n_folds == 3
    for split in cv.splits:
        assert set(split.test) == tests
        assert len(split.train) + len(split.val) == 8
    assert cv.predictions.groupby(["method", "fold"])["slide_id"].apply(set).eq(tests).all()


def test_a_second_run_repeats_nothing(finished, bucket, monkeypatch):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for d in ("slides", "bags", "runs") for p in (folder / d).rglob("*.*")}
    bucket.requests.clear()
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert "0 of 12 slides" in result.output
    assert "9 trainings, of which 9 are there" in result.output
    kept = {
        p: t
        for p, t in before.items()
        if p.suffix in (".tif", ".h5", ".safetensors") or p.name == "timings.csv"
    }
    assert len(kept) > 30
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert not any(key.endswith(".tif") for key in bucket.requests)


def test_stages_can_be_skipped_without_a_network(finished, monkeypatch):
    folder, _ = finished
    nowhere = "http://127.0.0.1:1/"
    monkeypatch.setattr(fetching, "ADDRESSES", Addresses(nowhere, nowhere, nowhere))
    skipped = [word for stage in ("fetch", "extract", "train", "time") for word in ("--skip", stage)]
    result = run(folder, *skipped)
    assert result.exit_code == 0, result.output
    assert "train    skipped" in result.output


def test_a_slide_without_tissue_is_left_out_and_named(bucket, tmp_path):
    key = "CAMELYON16/images/normal_004.tif"
    whole = bucket.files[key]
    blank = write_slide(tmp_path / "blank.tif", np.full((768, 768, 3), 245, np.uint8)).read_bytes()
    sums = bucket.documents["CAMELYON16/checksums.md5"]
    other = sums.replace(hashlib.md5(whole).hexdigest().encode(), hashlib.md5(blank).hexdigest().encode())
    bucket.files[key], bucket.documents["CAMELYON16/checksums.md5"] = blank, other
    try:
        result = run(tmp_path / "out", methods=["max"])
    finally:
        bucket.files[key], bucket.documents["CAMELYON16/checksums.md5"] = whole, sums
    assert result.exit_code == 1
    assert "error: normal_004" in result.stderr
    report = (tmp_path / "out" / "tables" / "color" / "report.md").read_text()
    assert "11 slides with features of 12 fetched ones" in report
    assert "Without features: normal_004" in report


def test_what_cannot_be_run_is_said_in_a_line(bucket, tmp_path, monkeypatch):
    nowhere = "http://127.0.0.1:1/"
    assert "--skip takes fetch, extract, train, time" in run(tmp_path, "--skip", "tables").stderr
    assert (
        "there is no cohort of the paper 'camelyon17' (did you mean 'camelyon16'?)"
        in run(tmp_path, name="camelyon17").stderr
    )
    assert "there is none; do not skip the stage fetch" in run(tmp_path, "--skip", "fetch").stderr
    monkeypatch.setattr(fetching, "ADDRESSES", Addresses(nowhere, nowhere, nowhere))
    monkeypatch.setattr("hdmil_lib.public.transfer.LONGEST_PAUSE", 0.001)
    assert "--skip fetch" in run(tmp_path).stderr
    for changes, message in (({"n_folds": 2}, "three or more"), ({"encoder": "resnet5"}, "did you mean")):
        with pytest.raises(HDMILError, match=message):
            check_experiment(Experiment("nsclc", tmp_path, **changes))


@pytest.mark.parametrize("name", ["camelyon16", "nsclc", "brca"])
def test_the_systems_are_those_of_the_papers_tables(name):
    methods = paper_methods(name)
    assert {"max", "mean", "abmil", "clam_sb", "clam_mb", "dsmil", "transmil", "s4mil", "mambamil"} <= {
        *methods
    }
    assert {"dmin_linear", "dmin_no_distillation", "hdmil_dagger", "hdmil"} <= {*methods}
    assert not {"random", "ahdmil", "hdmil_cascade", "smt"} & {*methods}
