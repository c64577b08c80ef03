"""Whatever stands in a file that is read back, it is read or refused with an error of our own."""

import faulthandler
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from fuzz_worker import KINDS, SECONDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hdmil_lib.bags import read_bag
from hdmil_lib.checking import check_files
from hdmil_lib.cohort import Cohort
from hdmil_lib.encoders.failures import Failure, known_reason, read_failure, remember
from hdmil_lib.errors import CheckpointError, CohortError, HDMILError
from hdmil_lib.models import ModelInfo
from hdmil_lib.schema import to_json
from hdmil_lib.slides.listing import list_slides
from hdmil_lib.splits import read_splits
from hdmil_lib.storage import CONTROL
from hdmil_lib.training.records import read_cross_validation, read_model, read_rows, read_run
from hdmil_lib.training.trained import CrossValidation

FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**9, -1, 2**40, "\x1b[31m", "a\nb", "nan", 1e300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
texts = st.binary(max_size=200) | st.text("slide_id,abel\n\r\t;\"'\0²1.-train vst", max_size=200).map(
    str.encode
)

MODEL = {"name": "abmil", "in_dim": 16, "n_classes": 2}
CROSS_VALIDATION = {
    "n_folds": 2,
    "seed": 0,
    "recipe": {},
    "splits": "a",
    "labels": "b",
    "classes": ["x", "y"],
    "features": "c",
    "encoder": {"name": "e", "weights_hash": "f"},
    "cohort": "d",
}
RUN = {
    "settings": {},
    "model": "DMIN",
    "thresholds": [0.5, 0.5],
    "cascade": {
        "settings": {"side": 64, "first": 0.6, "keep_ratio": 0.1, "n_draws": 8},
        "thresholds": [0.5, 0.5],
        "coarse_weight": 1.0,
        "slope": 1.0,
        "bias": [0.0, 0.0],
        "settling": [],
        "screening": "networks",
        "judged": {},
    },
}
FAILURE = to_json(Failure(slide_id="a", path="a.svs", reason="r", source="0" * 32, settings="1" * 32))


@contextmanager
def limited_time() -> Iterator[None]:
    """Let the process end, and say where it was, if the block takes longer than SECONDS."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def own_errors(*calls) -> None:
    """Each call soon returns, or raises an error of ours in one line that a terminal can print."""
    for call in calls:
        message = ""
        try:
            with limited_time():
                call()
        except HDMILError as error:
            message = str(error)
        assert not CONTROL.search(message), message


def changed(data: st.DataObject, content: dict) -> dict:
    """The content with one value, at any depth, replaced, removed, or one added."""
    content = json.loads(json.dumps(content))
    place = content
    key = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    how = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if how == "remove":
        del place[key]
    else:
        place[key if how == "replace" else data.draw(st.text(max_size=10))] = data.draw(values)
    return content


@FUZZ
@given(data=st.data(), kind=st.sampled_from(["model", "cross-validation", "run", "failure"]))
def test_records_with_any_value(tmp_path, data, kind):
    names = {"model": "model.json", "failure": "a.json"}
    path = tmp_path / names.get(kind, "config.json")
    content = {"model": MODEL, "cross-validation": CROSS_VALIDATION, "run": RUN, "failure": FAILURE}[kind]
    path.write_text(json.dumps(changed(data, content)))
    read = {
        "model": lambda: CrossValidation.classifier(_with_folder(tmp_path), "abmil", 0),
        "cross-validation": lambda: read_cross_validation(tmp_path),
        "run": lambda: read_run(tmp_path),
        "failure": lambda: read_failure(path),
    }[kind]
    own_errors(read)


def _with_folder(folder: Path) -> CrossValidation:
    """A cross-validation whose folds all lie in one folder."""
    trained = CrossValidation.__new__(CrossValidation)
    trained._fold = lambda method, fold: folder
    return trained


def test_whole_records_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CROSS_VALIDATION))
    assert read_cross_validation(tmp_path).classes == ("x", "y")
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    assert read_run(tmp_path).cascade.settings.side == 64
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    assert read_model(tmp_path) == MODEL


@FUZZ
@given(content=texts)
def test_files_with_any_bytes(tmp_path, content):
    for name in ("config.json", "model.json", "a.json", "a.csv", "splits_0.csv", "a.h5"):
        (tmp_path / name).write_bytes(content)
    own_errors(
        lambda: read_cross_validation(tmp_path),
        lambda: read_model(tmp_path),
        lambda: read_failure(tmp_path / "a.json"),
        lambda: read_rows(tmp_path / "a.csv", ["slide_id"]),
        lambda: Cohort.from_csv(tmp_path / "a.csv"),
        lambda: read_splits(tmp_path),
        lambda: list_slides(tmp_path / "a.csv"),
        lambda: read_bag(tmp_path / "a.h5"),
        lambda: list(check_files(tmp_path)),
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
@pytest.mark.parametrize("kind", KINDS)
def test_files_with_changed_bytes_end_no_process_and_take_no_time(tmp_path, kind):
    """Libraries in C read them, so that a crash or a hang would not be an exception: a process is at risk."""
    command = [sys.executable, Path(__file__).with_name("fuzz_worker.py"), kind, tmp_path, "0", "250"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    tried = result.stdout.splitlines()
    assert result.returncode == 0, f"{tried[-1:]}: {result.stderr[-3000:]}"
    assert tried[-1] == "done"


def test_the_process_at_risk_ends_where_a_reader_hangs(tmp_path):
    code = """
import fuzz_worker, time
fuzz_worker.SECONDS = 0.5
calls = []
def read(path):
    calls.append(path)
    if len(calls) > 3:
        time.sleep(60)
fuzz_worker.KINDS["hang"] = ("a", lambda path: path.write_text("content"), [read])
fuzz_worker.main("hang", FOLDER, "0", "9")
"""
    command = [sys.executable, "-c", code.replace("FOLDER", repr(str(tmp_path)))]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stdout.splitlines() == ["seed 0", "seed 1", "seed 2"]
    assert "Timeout" in result.stderr


def test_a_reader_in_python_that_hangs_is_a_failure():
    code = "import test_fuzz_files as t, time; t.SECONDS = 0.2; t.own_errors(lambda: time.sleep(60))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "Timeout" in result.stderr


@FUZZ
@given(label=st.text(max_size=12), slide=st.text(max_size=12))
def test_label_tables_with_any_text(tmp_path, label, slide):
    quoted = [f'"{text.replace(chr(34), chr(34) * 2)}"' for text in (slide, label)]
    with suppress(UnicodeEncodeError):
        (tmp_path / "a.csv").write_text(
            f"slide_id,case_id,label\n{quoted[0]},c,{quoted[1]}\nb,d,y\n", "utf-8"
        )
        own_errors(lambda: Cohort.from_csv(tmp_path / "a.csv"))


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nb", "a\x85b", "a\u2028b"])
def test_class_names_that_a_terminal_obeys_are_refused(tmp_path, name):
    (tmp_path / "a.csv").write_text(f'slide_id,case_id,label\na,c,"{name}"\nb,d,y\n', "utf-8")
    with pytest.raises(CohortError, match=r"a\.csv: row 1 holds control characters"):
        Cohort.from_csv(tmp_path / "a.csv", bags=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CROSS_VALIDATION | {"classes": ["x", name]}))
    with pytest.raises(CheckpointError, match=r"config\.json: classes"):
        read_cross_validation(tmp_path)
    with pytest.raises(ValidationError):
        ModelInfo(classes=("x", name), encoder="e", encoder_weights="f")


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "[]", '{"format": 1e999}', "\ufeff{}"])
def test_a_damaged_memory_of_failures_is_forgotten(tmp_path, content):
    remember(tmp_path, "a", tmp_path / "a.svs", "empty", "0" * 32, "1" * 32)
    assert known_reason(tmp_path, "a", "0" * 32, "1" * 32) == "empty"
    assert known_reason(tmp_path, "a", "2" * 32, "1" * 32) is None
    (tmp_path / "failed" / "a.json").write_text(content)
    assert known_reason(tmp_path, "a", "0" * 32, "1" * 32) is None
