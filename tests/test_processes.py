"""Helper processes end with Ctrl-C, with an error, and with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from bag_factory import make_bag

from hdmil_lib.bags import write_bag
from hdmil_lib.processes import helper_processes

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
N_SLIDES = 24


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


def members(session: int) -> list[str]:
    """Commands of the processes of a session that live."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own = (process / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            if int(own) == session and state != "Z":
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture
def train(tmp_path):
    """A function that starts `hdmil train` with a helper, in a session of its own as in a terminal."""
    rows = []
    for i in range(N_SLIDES):
        write_bag(tmp_path / "bags" / f"s{i}.h5", make_bag(f"s{i}", i % 2, 60))
        rows.append((f"s{i}", f"s{i}", ("normal", "tumor")[i % 2]))
    pd.DataFrame(rows, columns=["slide_id", "case_id", "label"]).to_csv(tmp_path / "labels.csv")
    started = []

    def begin() -> subprocess.Popen:
        options = ["--cohort", tmp_path / "labels.csv", "--bags", tmp_path / "bags", "--workers", "2"]
        command = [sys.executable, "-c", "from hdmil_lib.cli import main; main()", "train", *options]
        process = subprocess.Popen(
            [*command, "--out", tmp_path / "out"], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        for pid in [process.pid] if process.poll() is None else []:
            os.killpg(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["terminal", "alone"])
@pytest.mark.parametrize("moment", ["helper imports", "training"])
def test_ctrl_c_ends_training_and_its_helper_at_once(train, tmp_path, send, moment):
    process = train()
    if moment == "training":
        wait_until(lambda: any((tmp_path / "out").rglob("predictions.csv")))
    else:
        wait_until(lambda: any("spawn_main" in command for command in members(process.pid)))
    send(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)  # some seconds: the epoch and the import that go on
    assert process.returncode == 130
    lines = [line for line in errors.splitlines() if line and not line.startswith("cross-validation")]
    assert lines == ["error: interrupted; what is finished is kept, and the same command goes on from there"]
    wait_until(lambda: not members(process.pid), 10)


def test_a_killed_training_leaves_no_helper(train):
    process = train()
    wait_until(lambda: any("spawn_main" in command for command in members(process.pid)))
    process.kill()
    wait_until(lambda: not members(process.pid), 60)  # a helper looks for its parent once it has imported


def test_an_error_does_not_wait_for_jobs_that_run():
    def fail() -> None:
        with helper_processes(1) as pool:
            job = pool.submit(time.sleep, 600)
            wait_until(job.running)
            raise ZeroDivisionError

    started = time.time()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert time.time() - started < 300


def test_a_helper_ends_when_its_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        """
import multiprocessing, os, sys, time
from hdmil_lib.processes import end_with_parent

def helper():
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=helper).start()
    time.sleep(60)
"""
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    helper = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(200):  # ten seconds; it takes some milliseconds
        try:
            os.kill(helper, 0)
        except ProcessLookupError:
            break
        if "Z" in Path(f"/proc/{helper}/stat").read_text().rsplit(")", 1)[1].split()[0]:
            break  # ended, and not yet collected
        time.sleep(0.05)
    else:
        pytest.fail("the helper is still there")
