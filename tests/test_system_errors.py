"""What the system refuses to read is never called damaged, and nobody is told to delete it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from bag_factory import make_bag
from model_factory import make_model
from PIL import Image
from safetensors import SafetensorError
from slide_factory import INK, write_slide
from test_extraction import MeanColor
from typer.testing import CliRunner

from hdmil_lib.bags import read_bag, write_bag
from hdmil_lib.checking import check_files
from hdmil_lib.cli import app
from hdmil_lib.encoders.engines import OpenVINOEngine
from hdmil_lib.encoders.extraction import extract
from hdmil_lib.encoders.failures import read_failure
from hdmil_lib.encoders.own import read_weights
from hdmil_lib.errors import BagError, CheckpointError, CohortError, HDMILError, SlideError
from hdmil_lib.exchange.foreign import read_h5, read_npy, read_pt
from hdmil_lib.inference.tables import rows_of
from hdmil_lib.models import HDMIL
from hdmil_lib.slides.raster import open_raster
from hdmil_lib.slides.tiff_image import open_tiff
from hdmil_lib.splits import Split, read_splits, write_splits
from hdmil_lib.storage import load_weights, read_json, read_table, save_weights, write_json
from hdmil_lib.system_errors import check_readable, error_number, in_words, is_refused, refusal
from hdmil_lib.training.records import fitting, read_cross_validation, read_model, read_rows, read_run
from hdmil_lib.training.state import load_state, save_state

NUMBERS = (errno.EACCES, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT)
NUMBERS += (errno.ENOTCONN, errno.ELOOP)
DESTRUCTIVE = ("delete", "damaged", "train again", "train it again", "extract", "write it again")


class Reader(NamedTuple):
    """A file, how it is read, and the error of ours that is raised where it cannot be."""

    path: Path
    read: Callable[[], object]
    kind: type[HDMILError]


def make_readers(folder: Path) -> dict[str, Reader]:
    """Whole files of all kinds that are read back."""
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(network.parameters())
    made = {}

    def add(name: str, kind: type[HDMILError], write: Callable, read: Callable, file: str = "") -> None:
        path = folder / (file or name)
        write(path)
        made[name] = Reader(path, lambda: read(path), kind)

    (folder / "run").mkdir()
    (folder / "splits").mkdir()
    rows = pd.DataFrame({"slide_id": ["a"], "p_x": [0.5], "p_y": [0.5], "error": [""]})
    record = {"format": 1, "slide_id": "a", "path": "a", "reason": "r", "source": "0" * 32}
    add("a.h5", BagError, lambda p: write_bag(p, make_bag("a", 1)), read_bag)
    add("foreign.h5", BagError, lambda p: write_bag(p, make_bag("a", 1)), read_h5)
    add("a.json", CheckpointError, lambda p: write_json(p, {}), read_json)
    add(
        "a.safetensors",
        CheckpointError,
        lambda p: save_weights(network, p),
        lambda p: load_weights(network, p),
    )
    add(
        "state.safetensors",
        CheckpointError,
        lambda p: save_state(p, network, optimizer, []),
        lambda p: load_state(p, network, optimizer),
    )
    add("table.csv", CohortError, lambda p: rows.to_csv(p, index=False), read_table)
    add("rows.csv", CheckpointError, lambda p: rows.to_csv(p), lambda p: read_rows(p, ["slide_id"]))
    add("predictions.csv", CheckpointError, lambda p: rows.to_csv(p), lambda p: rows_of(p, ["x", "y"]))
    add("predictions.parquet", CheckpointError, rows.to_parquet, lambda p: rows_of(p, ["x", "y"]))
    add(
        "failed",
        CheckpointError,
        lambda p: write_json(p, record | {"settings": "0" * 32}),
        read_failure,
        "failed.json",
    )
    add(
        "splits",
        CohortError,
        lambda p: write_splits([Split(("a",), ("b",), ("c",))], p.parent),
        lambda p: read_splits(p.parent),
        "splits/splits_0.csv",
    )
    add(
        "model",
        CheckpointError,
        lambda p: write_json(p, {"name": "abmil"}),
        lambda p: read_model(p.parent),
        "run/model.json",
    )
    for name, read in (("run", read_run), ("cross-validation", read_cross_validation)):
        add(
            name,
            CheckpointError,
            lambda p: write_json(p, {}),
            lambda p, read=read: read(p.parent),
            "run/config.json",
        )
    for name in ("config.json", "model.safetensors"):
        add(
            f"model folder: {name}",
            CheckpointError,
            lambda p: None if p.exists() else make_model().save_pretrained(p.parent),
            lambda p: HDMIL.from_pretrained(p.parent),
            f"hdmil/{name}",
        )
    add("a.pt", BagError, lambda p: torch.save(torch.ones(2, 2), p), read_pt)
    add("a.npy", BagError, lambda p: np.save(p, np.ones((2, 2))), read_npy)
    add("weights.pt", HDMILError, lambda p: torch.save({"a": torch.ones(2)}, p), read_weights)
    add("weights.safetensors", HDMILError, lambda p: save_weights(network, p), read_weights)
    return made


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, Reader]:
    return make_readers(tmp_path_factory.mktemp("files"))


NAMES = (
    *("a.h5", "foreign.h5", "a.json", "a.safetensors", "state.safetensors", "table.csv", "rows.csv"),
    *("predictions.csv", "predictions.parquet", "failed", "splits", "model", "run", "cross-validation"),
    *("model folder: config.json", "model folder: model.safetensors"),
    *("a.pt", "a.npy", "weights.pt", "weights.safetensors"),
)


def test_all_kinds_are_tried(readers):
    assert set(readers) == set(NAMES)


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, path: Path, number: int) -> None:
    """Python can no longer open this file; libraries that open files themselves still can."""
    real = os.open, open

    def opened(file, *arguments, **options):
        if isinstance(file, str | os.PathLike) and Path(file) == path:
            raise OSError(number, os.strerror(number), str(path))
        return real[1](file, *arguments, **options)

    monkeypatch.setattr("io.open", opened)
    monkeypatch.setattr("builtins.open", opened)


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "predictions.parquet"])  # opened by Arrow
def test_a_file_that_cannot_be_opened_is_kept(readers, monkeypatch, name, number):
    path, read, kind = readers[name]
    if path.suffix == ".h5":

        def refuse(*arguments):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("h5py.File", refuse)
    refuse_to_open(monkeypatch, path, number)
    with pytest.raises(kind) as caught:
        read()
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be read ({os.strerror(number)}); ")
    assert len(message.splitlines()) == 1
    assert not [word for word in DESTRUCTIVE if word in message.removeprefix(str(path)).lower()]
    assert is_refused(caught.value)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"table.csv", "splits"}))
def test_a_file_of_other_content_still_says_what_to_do(tmp_path, name):
    path, read, kind = make_readers(tmp_path)[name]
    path.write_bytes(b"\0 no such content")
    with pytest.raises(kind) as caught:
        read()
    assert not is_refused(caught.value)
    assert "cannot be read (" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_or_nothing_in_the_place_of_a_file(tmp_path, name):
    path, read, kind = make_readers(tmp_path)[name]
    path.unlink()
    if name.startswith("predictions"):
        assert read() == {}
    else:
        with pytest.raises(kind) as caught:
            read()
        assert "delete" not in str(caught.value).lower()
        assert not is_refused(caught.value)
    path.mkdir()
    with pytest.raises(kind) as caught:
        read()
    assert "delete" not in str(caught.value).lower()


def test_numbers_are_found_where_libraries_write_them():
    assert error_number(OSError(5, "x")) == 5
    assert error_number(OSError("x")) is None
    assert error_number(FileNotFoundError("No such file or directory: a")) == errno.ENOENT
    assert error_number(KeyError("file read failed: errno = 5, error message = 'x', buf = 0")) == 5
    assert error_number(SafetensorError("I/O error: Stale file handle (os error 116)")) == 116
    assert error_number(MemoryError()) == errno.ENOMEM
    assert error_number(ValueError("errno = 5")) is None
    assert error_number(BagError("a.h5: [Errno 5] of another file")) is None
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**45)
    assert "more memory" in refusal(caught.value)


def test_a_network_that_does_not_fit_into_memory_is_no_damaged_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"Cannot allocate memory.*more memory"), fitting(tmp_path):
        torch.empty(2**45)
    with pytest.raises(CheckpointError, match=r"describes no network.*delete its folder"), fitting(tmp_path):
        raise RuntimeError("shapes differ")


def test_a_copy_of_an_encoder_that_cannot_be_read_is_not_to_be_deleted(tmp_path, monkeypatch):
    path = tmp_path / "encoder.xml"
    for name in ("encoder.xml", "encoder.bin"):
        (tmp_path / name).write_text("no model")
    with pytest.raises(HDMILError, match=r"encoder\.xml: damaged copy of an encoder; delete it"):
        OpenVINOEngine(path, "fp32")
    for name in ("encoder.xml", "encoder.bin"):
        with monkeypatch.context() as patch:
            refuse_to_open(patch, tmp_path / name, errno.EIO)
            with pytest.raises(HDMILError, match=rf"{name}: cannot be read \(Input/output error\)"):
                OpenVINOEngine(path, "fp32")


def test_check_says_unreadable_not_damaged(tmp_path, monkeypatch):
    write_bag(tmp_path / "a.h5", make_bag("a", 1))
    (tmp_path / "b.h5").write_text("no bag")

    def refuse(path, *arguments):
        raise OSError(errno.EIO if path.name == "a.h5" else 0, "refused")

    monkeypatch.setattr("h5py.File", refuse)
    assert [found.state for found in check_files(tmp_path)] == ["unreadable", "damaged"]
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 1
    assert "unreadable bag" in result.output
    assert "0 ok, 1 damaged, 0 unfinished, 1 unreadable" in result.output


def test_a_pending_configuration_that_cannot_be_read_is_not_replaced(tmp_path, monkeypatch):
    """It may be the only one that describes the weights."""
    model, folder = make_model(), tmp_path / "model"
    model.save_pretrained(folder)
    pending = folder / "config.json.pending"
    (folder / "config.json").rename(pending)
    content = pending.read_bytes()
    with monkeypatch.context() as patch:
        refuse_to_open(patch, pending, errno.EIO)
        with pytest.raises(CheckpointError, match="Input/output error"):
            model.save_pretrained(folder)
    assert pending.read_bytes() == content
    model.save_pretrained(folder)
    HDMIL.from_pretrained(folder)


def test_reading_a_file_once(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3 * 2**20))
    check_readable(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        check_readable(tmp_path / "b")


# Slides


def test_a_tile_that_the_disk_does_not_give_is_not_left_out(tmp_path, monkeypatch):
    """A damaged tile is; but this slide is whole, and the next run may read it."""
    slide = tmp_path / "a.tif"
    write_slide(slide, np.full((768, 1024, 3), INK), tile=256, compression="jpeg")
    real, calls = os.pread, []

    def refuse(file, size, offset):
        calls.append(offset)
        if len(calls) > 6:  # after the thumbnail, which a coarser level has
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, size, offset)

    with monkeypatch.context() as patch:
        patch.setattr("os.pread", refuse)
        table = extract(slide, MeanColor(), tmp_path / "bags", progress=False)
    assert table.status.tolist() == ["failed"]
    assert table.error[0].startswith(f"{slide}: cannot be read (Input/output error); the disk or the network")
    again = extract(slide, MeanColor(), tmp_path / "bags", progress=False)
    assert again.status.tolist() == ["done"]
    assert again.n_tiles.tolist() == [12]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_picture_that_the_system_refuses_is_not_damaged(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (300, 300)).save(path)

    def refuse(*arguments, **options):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load" if suffix == "png" else "tifffile.TiffFile", refuse)
    with pytest.raises(
        HDMILError, match=r"cannot be read \(Stale file handle\); its network folder"
    ) as caught:
        (open_raster if suffix == "png" else open_tiff)(path)
    assert not isinstance(caught.value, SlideError)


# What the command line says


def test_errors_of_the_system_reach_the_user_in_words(monkeypatch):
    assert in_words(BagError("as it is")) == "as it is"
    assert in_words(OSError("of a library")) == "of a library"
    assert in_words(OSError(errno.EROFS, "x", "/a")) == (
        "/a: Read-only file system; its disk can only be read; choose another place"
    )

    def refuse(folder):
        raise OSError(errno.EMFILE, "Too many open files", str(folder))

    monkeypatch.setattr("hdmil_lib.checking.check_files", refuse)
    result = CliRunner().invoke(app, ["check", "bags"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: bags: Too many open files; close other files of this program")
