"""Processes that share a folder: locks, what the dead leave, shards and slides that are set aside."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from hdmil_lib import sharing
from hdmil_lib.errors import HDMILError
from hdmil_lib.progress import progress_of
from hdmil_lib.sharing import Owner, Shard, SharedRun, WorkList, read_owner, run_folder, this_process


def dead_process() -> Owner:
    """A process of this machine that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    return replace(this_process(), pid=ended.pid, started="1")


def leave_lock(folder, name: str, number: int, owner: Owner, age: float = 0.0):
    """A lock as another process left it."""
    lock = folder / "locks" / f"{name}.{number}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps(asdict(owner)))
    os.utime(lock, (time.time() - age,) * 2)
    return lock


@pytest.fixture
def elsewhere():
    """A process of another machine."""
    return Owner("node7", "another machine", os.getpid(), this_process().started)


def test_a_slide_is_taken_once_until_it_is_released(tmp_path):
    with SharedRun(tmp_path) as mine, SharedRun(tmp_path) as other:
        assert mine.claim("a") == "taken"
        assert other.claim("a") == "busy"
        assert other.claim("b") == "taken"
        mine.release("a")
        assert other.claim("a") == "taken"
    assert list((tmp_path / "locks").iterdir()) == [], "a run that ends releases what it holds"


@pytest.mark.parametrize("name", ["a", "a.0", "a.b", "über", "a b"])
def test_locks_of_similar_names_do_not_meet(tmp_path, name):
    with SharedRun(tmp_path) as run:
        others = [other for other in ("a", "a.0", "a.b", "über", "a b") if other != name]
        assert [run.claim(other) for other in others] == ["taken"] * 4
        assert run.claim(name) == "taken"


def test_many_threads_take_each_slide_once(tmp_path):
    names, taken = [f"s{i}" for i in range(40)], []

    def work(run):
        todo = WorkList(run, names)
        while (found := todo.take()) is not None:
            assert found[1] is None
            if not (tmp_path / found[0]).exists():
                (tmp_path / found[0]).touch()
                taken.append(found[0])
            run.release(found[0])

    with SharedRun(tmp_path / "a") as first, SharedRun(tmp_path / "a") as second:
        threads = [threading.Thread(target=work, args=(run,)) for run in (first, second) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(taken) == sorted(names)


def _hold(folder, held):
    with SharedRun(folder) as run:
        assert run.claim("a") == "taken"
        held.set()
        time.sleep(60)


def test_a_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held))
    process.start()
    assert held.wait(20)
    with SharedRun(tmp_path) as run:
        assert run.claim("a") == "busy"
        process.kill()
        while process.is_alive():
            time.sleep(0.01)
        assert run.claim("a") == "taken"
        assert run.deaths("a") == 1


def test_a_dead_child_that_nobody_collected_is_dead():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    deadline = time.time() + 20
    while sharing.started(child.pid) and time.time() < deadline:
        time.sleep(0.01)
    assert sharing.started(child.pid) == ""
    child.wait()


def test_a_new_process_with_the_number_of_the_dead_one_is_another(tmp_path):
    leave_lock(tmp_path, "a", 0, replace(this_process(), started="1"))
    with SharedRun(tmp_path) as run:
        assert run.claim("a") == "taken"


@pytest.mark.parametrize(
    ("age", "state"), [(0, "busy"), (sharing.STALE - 20, "busy"), (sharing.STALE + 20, "taken")]
)
def test_a_lock_of_another_machine_lasts_as_long_as_its_signs_of_life(tmp_path, elsewhere, age, state):
    leave_lock(tmp_path, "a", 0, elsewhere, age)
    with SharedRun(tmp_path) as run:
        assert run.claim("a") == state


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 3}'])
@pytest.mark.parametrize(("age", "state"), [(0, "busy"), (sharing.STALE + 20, "taken")])
def test_a_damaged_lock_is_judged_by_its_age(tmp_path, content, age, state):
    lock = leave_lock(tmp_path, "a", 0, this_process())
    lock.write_text(content)
    os.utime(lock, (time.time() - age,) * 2)
    with SharedRun(tmp_path) as run:
        assert run.claim("a") == state


def test_locks_are_kept_alive_while_they_are_held(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "HEARTBEAT", 0.05)
    with SharedRun(tmp_path) as run:
        run.claim("a")
        lock = tmp_path / "locks" / "a.0.lock"
        os.utime(lock, (0, 0))
        deadline = time.time() + 20
        while lock.stat().st_mtime == 0 and time.time() < deadline:
            time.sleep(0.02)
        assert lock.stat().st_mtime > 0
        assert replace(read_owner(lock), since=0) == this_process()


def test_a_slide_that_ended_two_processes_is_set_aside_and_says_how_to_go_on(tmp_path):
    for number in range(2):
        leave_lock(tmp_path, "bad", number, dead_process())
    with SharedRun(tmp_path) as run:
        todo = WorkList(run, ["bad", "good"])
        assert todo.take() == ("good", None), "others come first"
        name, reason = todo.take()
        assert name == "bad"
        assert "ended 2 processes" in reason
        assert "--retry-failed" in reason
        run.release("bad", settled=False)
        assert run.claim("bad") == "set aside", "also in later runs"
        run.forget_deaths(["bad", "good"])
        assert run.claim("bad") == "taken"


def test_success_forgets_the_dead_and_an_interrupt_does_not(tmp_path):
    leave_lock(tmp_path, "a", 0, dead_process())
    with SharedRun(tmp_path) as run:
        assert run.claim("a") == "taken"
        run.release("a", settled=False)
        assert run.deaths("a") == 1
        assert run.claim("a") == "taken"
        run.release("a")
        assert run.deaths("a") == 0


def test_what_failed_elsewhere_is_not_tried_again_before_the_next_run(tmp_path):
    with SharedRun(tmp_path) as first, SharedRun(tmp_path) as second:
        first.record("a", "failed", 0, 1.0, "no tissue")
        assert second.failure("a") == "no tissue"
        assert second.failure("b") is None
    mark = tmp_path / "failed" / "a.txt"
    os.utime(mark, (time.time() - 10,) * 2)
    with SharedRun(tmp_path) as later:
        assert later.failure("a") is None
        later.record("a", "done", 3, 1.0)
    assert not mark.exists()


def test_the_exclusive_lock_lets_one_in_and_outlives_the_dead(tmp_path):
    for number in range(3):
        leave_lock(tmp_path, ".table", number, dead_process())
    inside, most = [0], [0]

    def enter(run):
        for _ in range(5):
            with run.exclusive(".table"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    with SharedRun(tmp_path) as first, SharedRun(tmp_path) as second:
        threads = [threading.Thread(target=enter, args=(run,)) for run in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most[0] == 1


def test_a_file_system_without_links_has_locks_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with SharedRun(tmp_path) as mine, SharedRun(tmp_path) as other:
        assert [mine.claim("a"), other.claim("a")] == ["taken", "busy"]
        assert replace(read_owner(tmp_path / "locks" / "a.0.lock"), since=0) == this_process()


def test_a_full_disk_does_not_end_the_run_for_a_note(tmp_path, monkeypatch):
    with SharedRun(tmp_path) as run:
        (tmp_path / "failed").rmdir()
        run.record("a", "failed", 0, 1.0, "no room")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "expected NUMBER/COUNT, such as 3/16"),
        ("a/b", "expected NUMBER/COUNT"),
        ("-1/4", "expected NUMBER/COUNT"),
        ("²/4", "expected NUMBER/COUNT"),
        ("0/4", "from 1 to 4"),
        ("5/4", "from 1 to 4, as in 1/4 (for SLURM: --array=1-4)"),
        ("1/0", "out of range"),
    ],
)
def test_a_shard_out_of_range_says_what_to_write(text, message):
    with pytest.raises(HDMILError, match=".") as error:
        Shard.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n_items", [0, 1, 7, 16, 33])
def test_shards_are_equal_parts_of_the_whole(n_items):
    parts = [Shard.parse(f"{k}/4").of(range(n_items)) for k in range(1, 5)]
    assert sorted(sum(parts, [])) == list(range(n_items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_run_folder_stands_in_the_folder_or_beside_the_table(tmp_path):
    assert run_folder(tmp_path) == tmp_path / ".hdmil"
    assert run_folder(tmp_path / "p.csv") == tmp_path / ".hdmil-p.csv"


def test_a_signal_that_ends_the_process_leaves_the_lock_as_evidence(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held))
    process.start()
    assert held.wait(20)
    os.kill(process.pid, signal.SIGSTOP)
    with SharedRun(tmp_path) as run:
        assert run.claim("a") == "busy", "a process that was stopped is not dead"
    process.kill()
    process.join()


def test_progress_tells_what_is_done_runs_waits_died_and_failed(tmp_path, elsewhere):
    out = tmp_path / "bags"
    out.mkdir()
    leave_lock(run_folder(out), "e", 0, dead_process())
    leave_lock(run_folder(out), "f", 0, elsewhere)
    with SharedRun(run_folder(out), list("abcdefg")) as run:
        run.record("a", "done", 100, 2.0)
        run.record("b", "failed", 0, 1.0, 'no, "tissue"')
        run.record("c", "skipped", 50, 0.0)
        run.claim("d")
        progress = progress_of(out)
    slides = progress.slides.set_index("slide_id")
    assert slides["status"].to_dict() == {
        **{"a": "done", "b": "failed", "c": "done", "d": "running"},
        **{"e": "interrupted", "f": "running", "g": "waiting"},
    }
    assert slides["error"]["b"] == 'no, "tissue"'
    mine, other = progress.processes.to_dict("records")
    assert mine["pid"] == os.getpid()
    assert (mine["done"], mine["failed"], mine["tiles_per_second"]) == (1, 1, 50.0)
    assert mine["now"].startswith("d (")
    assert other["host"] == "node7"
    assert other["now"].startswith("f (")


def test_progress_leaves_out_a_line_that_is_being_written(tmp_path):
    with SharedRun(run_folder(tmp_path), ["a", "b"]) as run:
        run.record("a", "done", 100, 2.0)
        (table,) = run_folder(tmp_path).glob("log/*.csv")
        with table.open("a") as file:
            file.write("17.0,b,don")
        assert progress_of(tmp_path).slides["status"].tolist() == ["done", "waiting"]


def test_progress_of_nothing_says_what_to_give(tmp_path):
    with pytest.raises(HDMILError, match="no run has written here; give the --out"):
        progress_of(tmp_path)


def test_a_link_whose_reply_was_lost_counts_as_made(tmp_path, monkeypatch):
    link = os.link

    def link_without_reply(source, target):
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists", str(target))

    monkeypatch.setattr(os, "link", link_without_reply)
    with SharedRun(tmp_path) as first, SharedRun(tmp_path) as second:
        assert first.claim("slide") == "taken"
        assert second.claim("slide") == "busy"


def test_a_lock_made_by_another_in_the_same_moment_is_not_ours(tmp_path, monkeypatch):
    with SharedRun(tmp_path) as first, SharedRun(tmp_path) as second:
        assert first.claim("slide") == "taken"
        monkeypatch.setattr(second, "_locks", lambda name: [])
        assert second.claim("slide") == "busy"
