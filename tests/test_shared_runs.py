"""Real processes that extract and predict into one place: the work is shared, and kills lose nothing."""

import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from model_factory import make_model, write_textured_slide
from test_cli import hdmil

from hdmil_lib.bags import read_bag
from hdmil_lib.encoders.extraction import extract
from hdmil_lib.progress import progress_of
from hdmil_lib.sharing import read_owner, run_folder

N_SLIDES = 6

WORKER = """
import os, resource, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from model_factory import ColorEncoder, make_model
from hdmil_lib.encoders.extraction import extract

command, slides, out, seconds, pattern, count, limit = sys.argv[2:]
if int(limit):  # what stands for a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))

class Slow(ColorEncoder):
    def __call__(self, tiles):
        time.sleep(float(seconds))
        while len(list(Path(out).glob(pattern))) < int(count):
            time.sleep(0.02)
        return super().__call__(tiles)

if command == "extract":
    extract(slides, Slow(), out, progress=False)
else:
    model = make_model()
    model.encoder = Slow()
    model.predict_many(slides, out=out, device="cpu", progress=False)
"""


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Small slides, each with tiles of its own."""
    folder = tmp_path_factory.mktemp("slides")
    for i in range(N_SLIDES):
        write_textured_slide(folder / f"s{i}.tif", 3, 3, seed=i)
    return folder


@pytest.fixture
def start(slides):
    """A function that starts a process that works, with this many seconds per call of the encoder.

    Its encoder can wait until there are `count` files of a pattern, and its files can be limited in bytes.
    """
    started = []

    def begin(
        command: str, out: Path, seconds: float, pattern: str = "*", count: int = 0, limit: int = 0
    ) -> subprocess.Popen:
        arguments = [str(Path(__file__).parent), command, str(slides), str(out), str(seconds)]
        arguments += [pattern, str(count), str(limit)]
        started.append(subprocess.Popen([sys.executable, "-c", WORKER, *arguments]))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


def done_by(out: Path) -> pd.DataFrame:
    """The notes of all processes of what they did themselves."""
    tables = [pd.read_csv(path) for path in (run_folder(out) / "log").glob("*.csv")]
    notes = pd.concat(tables)
    return notes[notes["status"] == "done"]


def same_bags(out: Path, expected: Path) -> None:
    assert sorted(p.name for p in out.glob("*.h5")) == sorted(p.name for p in expected.glob("*.h5"))
    for path in expected.glob("*.h5"):
        np.testing.assert_array_equal(read_bag(out / path.name).features, read_bag(path).features)
        np.testing.assert_array_equal(read_bag(out / path.name).coords, read_bag(path).coords)


@pytest.fixture(scope="module")
def undisturbed(slides, tmp_path_factory):
    """The bags of a run in one process."""
    from model_factory import ColorEncoder

    out = tmp_path_factory.mktemp("undisturbed")
    extract(slides, ColorEncoder(), out, progress=False)
    return out


def test_processes_share_the_slides_and_none_does_one_twice(start, undisturbed, tmp_path):
    processes = [start("extract", tmp_path, 0.3) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    notes = done_by(tmp_path)
    assert sorted(notes["slide_id"]) == [f"s{i}" for i in range(N_SLIDES)]
    assert notes["pid"].nunique() == 2
    same_bags(tmp_path, undisturbed)
    assert not any((run_folder(tmp_path) / "locks").iterdir())


def test_a_slow_process_does_its_slide_and_another_the_rest(start, undisturbed, tmp_path):
    """The slow one ends its slide only when all others are there."""
    slow = start("extract", tmp_path, 0, "s*.h5", N_SLIDES - 1)
    wait_until(partial(works, tmp_path, slow))
    fast = start("extract", tmp_path, 0)
    assert [process.wait(120) for process in (slow, fast)] == [0, 0]
    notes = done_by(tmp_path)
    assert sorted(notes["slide_id"]) == [f"s{i}" for i in range(N_SLIDES)]
    assert notes["pid"].value_counts().to_dict() == {slow.pid: 1, fast.pid: N_SLIDES - 1}
    same_bags(tmp_path, undisturbed)


def test_a_disk_that_is_full_for_one_process_loses_nothing(start, undisturbed, tmp_path):
    """The other one ends its slide after the first failure; what failed is told, and done by the next run."""
    whole = start("extract", tmp_path, 0, ".hdmil/failed/*.txt", 1)
    wait_until(partial(works, tmp_path, whole))
    limited = start("extract", tmp_path, 0, limit=2000)
    assert [process.wait(120) for process in (whole, limited)] == [0, 0]
    slides = progress_of(tmp_path).slides
    failed = slides[slides["status"] == "failed"]
    assert set(done_by(tmp_path)["pid"]) == {whole.pid}
    assert all("make room or choose another place" in error for error in failed["error"])
    assert len(list(tmp_path.glob("[!.]*"))) == N_SLIDES - len(failed) > 0, "no partial file"
    assert start("extract", tmp_path, 0).wait(120) == 0
    same_bags(tmp_path, undisturbed)
    assert done_by(tmp_path)["slide_id"].is_unique
    assert set(progress_of(tmp_path).slides["status"]) == {"done"}


def test_kills_at_random_moments_lose_nothing_and_repeat_nothing(start, undisturbed, tmp_path):
    generator = random.Random(0)
    steady, victim = start("extract", tmp_path, 0.3), start("extract", tmp_path, 0.3)
    for _ in range(2):
        wait_until(partial(works, tmp_path, victim))
        time.sleep(generator.uniform(0, 0.3))
        victim.send_signal(signal.SIGSTOP)  # so that it cannot go on to a slide that has ended a process
        if any(number for number in numbers_of(tmp_path, victim)):
            victim.send_signal(signal.SIGCONT)
            break  # a second death of a slide would set it aside
        victim.kill()
        victim.wait()
        victim = start("extract", tmp_path, 0.3)
    assert [steady.wait(120), victim.wait(120)] == [0, 0]
    same_bags(tmp_path, undisturbed)
    assert done_by(tmp_path)["slide_id"].is_unique
    assert set(progress_of(tmp_path).slides["status"]) == {"done"}


def numbers_of(out: Path, process: subprocess.Popen) -> list[int]:
    """How many processes had ended at each slide that this process holds."""
    locks = [(lock, read_owner(lock)) for lock in (run_folder(out) / "locks").glob("*.lock")]
    return [int(lock.name.split(".")[-2]) for lock, owner in locks if owner and owner.pid == process.pid]


def works(out: Path, process: subprocess.Popen) -> bool:
    """Whether a process holds a slide; also true if it has ended."""
    locks = map(read_owner, (run_folder(out) / "locks").glob("*.lock"))
    return process.poll() is not None or any(owner and owner.pid == process.pid for owner in locks)


def test_processes_write_one_table_of_predictions(slides, start, tmp_path):
    out = tmp_path / "shared.csv"
    processes = [start("predict", out, 0.3) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert done_by(out)["pid"].nunique() == 2
    assert sorted(done_by(out)["slide_id"]) == [f"s{i}" for i in range(N_SLIDES)]
    alone = make_model().predict_many(slides, out=tmp_path / "alone.csv", device="cpu", progress=False)
    shared = pd.read_csv(out, float_precision="round_trip").sort_values("slide_id")
    drop = ["seconds"]
    expected = pd.read_csv(tmp_path / "alone.csv", float_precision="round_trip").drop(columns=drop)
    pd.testing.assert_frame_equal(shared.drop(columns=drop).reset_index(drop=True), expected)
    assert len(alone) == N_SLIDES


def test_status_is_shown_while_a_run_goes_on(start, tmp_path):
    out = tmp_path / "bags"
    process = start("extract", out, 1.0)
    wait_until(partial(works, out, process))
    printed = hdmil("status", out, "--csv", tmp_path / "status.csv")
    process.kill()
    process.wait()
    assert f"{N_SLIDES} slides: " in printed
    assert "1 running" in printed
    assert len(pd.read_csv(tmp_path / "status.csv")) == N_SLIDES
    assert "1 interrupted" in hdmil("status", out)
