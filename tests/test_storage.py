"""Files are written whole or not at all, and what killed processes leave is removed."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from hdmil_lib.errors import HDMILError
from hdmil_lib.storage import (
    TEMPORARY,
    load_weights,
    remove_stale,
    save_weights,
    write_json,
    write_table,
    write_whole,
)

WRITER = """
import sys, time
from pathlib import Path
from hdmil_lib.storage import write_whole

def write(part):
    part.write_text("half")
    print("writing", flush=True)
    time.sleep(60)

write_whole(Path(sys.argv[1]), write)
"""


def make_old(path: Path, seconds: float = 3600) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def writer(tmp_path):
    """A process that has written half of a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "a.txt"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(writer, tmp_path):
    (half,) = tmp_path.iterdir()
    assert TEMPORARY.fullmatch(half.name)
    make_old(half)
    assert remove_stale(tmp_path) == []
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert remove_stale(tmp_path) == [half]
    assert list(tmp_path.iterdir()) == []


def test_a_writer_keeps_its_lock_when_it_closes_the_file(tmp_path):
    """It opens and closes the file itself, which would end other kinds of locks."""

    def write(part):
        part.write_text("a")
        make_old(part)
        code = f"from hdmil_lib.storage import *; assert remove_stale(Path({str(tmp_path)!r})) == []"
        subprocess.run([sys.executable, "-c", code], check=True)

    write_whole(tmp_path / "a.txt", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_files_of_others_and_young_files_are_left(tmp_path):
    names = (".hdmil-notes", ".hdmil-0123456789ab-x", "hdmil-0123456789ab", ".0123456789ab.h5")
    for name in names:
        (tmp_path / name).touch()
        make_old(tmp_path / name)
    (tmp_path / ".hdmil-0123456789ab.h5").touch()
    (tmp_path / ".hdmil-0123456789ac").mkdir()
    make_old(tmp_path / ".hdmil-0123456789ac")
    assert remove_stale(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 6


def test_without_locks_a_file_is_stale_after_a_day(tmp_path, monkeypatch):
    path = tmp_path / ".hdmil-0123456789ab.h5"
    path.touch()
    monkeypatch.setattr("hdmil_lib.storage._lock", lambda descriptor: False)
    for age, removed in ((3600, []), (90_000, [path])):
        make_old(path, age)
        assert remove_stale(tmp_path) == removed


def test_the_content_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: steps.append(os.readlink(f"/proc/self/fd/{d}")) or fsync(d))
    monkeypatch.setattr(os, "replace", lambda a, b: steps.append("rename") or replace(a, b))
    write_json(tmp_path / "a.json", {"a": 1})
    assert TEMPORARY.fullmatch(Path(steps[0]).name)
    assert steps[1:] == ["rename", str(tmp_path)]


SAVES = {
    "a.json": lambda path: write_json(path, {"a": list(range(30_000))}),
    "a.csv": lambda path: write_table(path, pd.DataFrame({"a": range(30_000)})),
    "a.safetensors": lambda path: save_weights(torch.nn.Linear(200, 200), path),
}


@pytest.mark.parametrize("name", SAVES)
def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path, name):
    """A limit of the size of files stands for a full disk: the write itself fails, with another number."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_storage import SAVES
from pathlib import Path
from hdmil_lib.errors import HDMILError
path = Path({str(tmp_path / name)!r})
SAVES[path.name](path)
before = path.read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    SAVES[path.name](path)
except HDMILError as error:
    assert "make room" in str(error) and str(path) in str(error), error
else:
    raise AssertionError("it was written")
assert path.read_bytes() == before
assert [p.name for p in path.parent.iterdir()] == [path.name]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("step", ["write", "sync", "rename"])
def test_whatever_fails_the_old_file_stays(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step != "write":
        monkeypatch.setattr(os, {"sync": "fsync", "rename": "replace"}[step], fail)
    with pytest.raises(HDMILError, match=r"a\.txt: cannot be written \(No space left"):
        write_whole(path, fail if step == "write" else lambda part: part.write_text("new"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_names_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("a" * 251 + ".csv")
    write_whole(path, lambda part: part.write_text("a"))
    assert path.read_text() == "a"


def test_weights_are_read_as_written(tmp_path):
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_weights(first, tmp_path / "a.safetensors")
    load_weights(second, tmp_path / "a.safetensors")
    assert torch.equal(first.weight, second.weight)
