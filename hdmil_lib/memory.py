"""How much memory a process may still take, from the machine, its container and its own limit."""

import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_MEMINFO, _STATUS, _CGROUP = Path("/proc/meminfo"), Path("/proc/self/status"), Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes of memory that this process may still take; None where the system does not say.

    It is the least of what is available on the machine, of what its control groups leave (a container's
    limit), and of what its own limit of address space leaves (`ulimit -v`).
    """
    left = [*_of_machine(), *_of_groups(), *_of_process()]
    return max(0, min(left)) if left else None


def size_in_words(n_bytes: int) -> str:
    """A number of bytes as GB, or as MB or kB where it is small."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes / 1000:,.1f} kB"


def _of_machine() -> Iterator[int]:
    yield from (kib * 1024 for kib in _fields(_MEMINFO, "MemAvailable"))


def _of_process() -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield from (limit - kib * 1024 for kib in _fields(_STATUS, "VmSize"))


def _of_groups() -> Iterator[int]:
    """What the control groups of this process and those above them leave, in both versions of Linux."""
    with suppress(OSError):
        for line in _CGROUP.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers == "":
                yield from _of_group(_MOUNT, place, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                yield from _of_group(_MOUNT / "memory", place, *names)


def _of_group(mount: Path, place: str, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    group = mount / place.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(mount):
            return
        with suppress(OSError, ValueError):  # no limit ("max"), or a group that this container does not see
            most, used = (int((folder / name).read_text()) for name in (limit, usage))
            yield most - used + sum(_fields(folder / "memory.stat", reclaimable))


def _fields(path: Path, name: str) -> Iterator[int]:
    """The number behind a name in a file of lines such as "MemAvailable: 12 kB"."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, *rest = line.replace(":", " ").split()
            if key == name:
                yield int(rest[0])
