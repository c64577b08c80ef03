"""How much memory is free: the least of what the machine, its containers and the process leave."""

import resource
import subprocess
import sys

import pytest

from hdmil_lib import memory
from hdmil_lib.memory import free_memory, size_in_words

GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GB available, whose process is in no group and has no limit."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {8 * GB // 1024} kB\n")
    (tmp_path / "status").write_text(f"Name: x\nVmSize: {GB // 1024} kB\n")
    (tmp_path / "cgroup").write_text("0::/\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_MOUNT", tmp_path / "groups")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    return tmp_path


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_what_the_machine_has(machine):
    assert free_memory() == pytest.approx(8 * GB, abs=1024)


def test_the_group_with_least_room_counts(machine):
    """Cached files of a group can be dropped, so they are free."""
    (machine / "cgroup").write_text("0::/outer/inner\n")
    stat = f"anon 1\ninactive_file {GB}"
    outer = machine / "groups" / "outer"
    write_group(machine / "groups", memory__stat=stat)
    write_group(outer, memory__max=4 * GB, memory__current=3 * GB, memory__stat=stat)
    write_group(outer / "inner", memory__max="max", memory__current=GB, memory__stat=stat)
    assert free_memory() == 2 * GB
    write_group(outer, memory__current=6 * GB)
    assert free_memory() == 0


def test_the_first_version_of_groups(machine):
    (machine / "cgroup").write_text("9:cpu:/a\n8:memory:/a/b\n0::/\n")
    names = {"memory__limit_in_bytes": 3 * GB, "memory__usage_in_bytes": 2 * GB}
    write_group(machine / "groups" / "memory", **names, memory__stat="total_inactive_file 5")
    assert free_memory() == GB + 5, "the groups below are not seen from within a container"


def test_the_limit_of_the_process(machine, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (3 * GB, 3 * GB))
    assert free_memory() == pytest.approx(2 * GB, abs=1024)


def test_a_system_that_does_not_say(machine):
    for name in ("meminfo", "status", "cgroup"):
        (machine / name).unlink()
    assert free_memory() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_is_taken_is_not_free():
    code = "from hdmil_lib.memory import free_memory as f; a = f(); b = b'1' * 3 * 10**8; print(a, f())"
    limited = f'ulimit -v 2000000; {sys.executable} -c "{code}"'
    before, after = map(int, subprocess.check_output(["sh", "-c", limited], text=True).split())
    assert before < 2_048_000_000
    assert before - after == pytest.approx(3 * 10**8, rel=0.1)


@pytest.mark.parametrize(("size", "words"), [(12, "0.0 kB"), (2_400_000, "2.4 MB"), (2.4e12, "2,400.0 GB")])
def test_sizes_are_written_in_words(size, words):
    assert size_in_words(size) == words
