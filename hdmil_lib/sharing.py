"""Several processes share the slides of one output: locks per slide, and a table of what became of each."""

import csv
import errno
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeVar

from hdmil_lib.errors import HDMILError
from hdmil_lib.storage import needs_room

HEARTBEAT = 10.0
"""Seconds between two signs of life of a process that holds locks."""

STALE = 120.0
"""Seconds without a sign of life after which a lock of another machine counts as left by a dead process.

Network file systems may show the time of a file up to a minute late.
"""

TRIES = 2
"""Number of processes that a slide may end, by a crash or for want of memory, before it is set aside."""

POLL = 0.5
"""Seconds between two looks at slides that other processes hold."""

COLUMNS = ("time", "slide_id", "status", "n_tiles", "seconds", "host", "pid", "error")
"""Columns of the tables in which processes note what they did."""

State = Literal["taken", "busy", "set aside"]
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One of several equal parts of a list, such as of the slides of a SLURM array.

    Attributes:
        number: Which part, from 1 to `count`.
        count: Number of parts.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard that a text such as "3/16" names.

        Raises:
            HDMILError: The text is no shard, or its number is out of range.
        """
        number, _, count = text.partition("/")
        if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit()):
            raise HDMILError(f"shard {text!r}: expected NUMBER/COUNT, such as 3/16")
        shard = cls(int(number), int(count))
        if not 1 <= shard.number <= shard.count:
            raise HDMILError(
                f"shard {text}: out of range; the number goes from 1 to {max(shard.count, 1)}, as in "
                f"1/{max(shard.count, 1)} (for SLURM: --array=1-{max(shard.count, 1)})"
            )
        return shard

    def of(self, items: Sequence[T]) -> list[T]:
        """Every `count`-th item, from the `number`-th on."""
        return list(items[self.number - 1 :: self.count])


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        host: Name of its machine, for people.
        machine: What tells machines, boots and containers apart; process numbers compare within one only.
        pid: Its number.
        started: When it started, in units of its machine; empty where that is not known.
        since: Seconds since 1970 by its clock when it took the lock; for people.
    """

    host: str
    machine: str
    pid: int
    started: str
    since: float = 0.0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def run_folder(out: Path) -> Path:
    """Folder of the locks and tables of a run, inside a folder of bags or beside a table of predictions."""
    return out / ".hdmil" if out.is_dir() else out.parent / f".hdmil-{out.name}"


class SharedRun:
    """The part of this process in a run; a context in which locks are held and kept alive.

    A lock is a file. It is made under another name and then linked, so that it is there with its content or
    not at all, and only one process can make it, on network file systems too. A lock that a dead process left
    stays, and the next one is made beside it with the next number. So nobody can remove a lock that somebody
    has just made, and the number of locks tells how many processes a slide has ended.

    Args:
        folder: Folder of the run, from `run_folder`; it is created.
        names: Names of all slides that this process is to see done.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, names: Sequence[str] = ()) -> None:
        self.folder, self.names = folder, list(names)
        self._owner = this_process()
        self._held: dict[str, Path] = {}
        self._guard = threading.Lock()
        self._ended = threading.Event()
        name = f"{self._owner.host}-{self._owner.pid}-{uuid.uuid4().hex[:6]}.csv"
        self._table = folder / "log" / name

    def __enter__(self) -> "SharedRun":
        with needs_room(self.folder):
            for name in ("locks", "log", "failed", "plan"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self._table.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
            self._began = self._table.stat().st_mtime
            if self.names:
                content = "\n".join(self.names)
                plan = self.folder / "plan" / f"{sha256(content.encode()).hexdigest()[:12]}.txt"
                plan.write_text(content + "\n", encoding="utf-8")
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for name in list(self._held):
            self.release(name, settled=False)
        with suppress(OSError):
            if self._table.stat().st_size <= len(",".join(COLUMNS)) + 1:
                self._table.unlink()

    def claim(self, name: str) -> State:
        """Try to take a slide.

        Returns:
            "taken": this process holds it now; "busy": another one does; "set aside": it has ended too many
            processes.
        """
        locks = self._locks(name)
        if locks and not self.is_dead(locks[-1]):
            return "busy"
        if len(locks) >= TRIES:
            return "set aside"
        return "taken" if self._make_lock(name, len(locks)) else "busy"

    def deaths(self, name: str) -> int:
        """Number of processes that ended while they held a slide, this one being free."""
        return len(self._locks(name)) - (name in self._held)

    def forget_deaths(self, names: Iterable[str]) -> None:
        """Let slides that were set aside be tried again."""
        for name in names:
            locks = self._locks(name)
            if len(locks) >= TRIES and self.is_dead(locks[-1]):
                for lock in reversed(locks):
                    lock.unlink(missing_ok=True)

    def release(self, name: str, *, settled: bool = True) -> None:
        """Give a slide back.

        Args:
            name: The slide.
            settled: Whether it is done or has failed, so that those who died at it are forgotten; otherwise
                it was interrupted.
        """
        with self._guard:
            own = self._held.pop(name, None)
        for lock in self._locks(name) if settled else filter(None, [own]):
            lock.unlink(missing_ok=True)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold the lock of this name, for a moment; wait while another process does."""
        while True:
            state = self.claim(name)
            if state == "taken":
                break
            if state == "set aside":
                for lock in self._locks(name):
                    lock.unlink(missing_ok=True)
            else:
                time.sleep(0.02)
        try:
            yield
        finally:
            self.release(name)

    def record(self, name: str, status: str, n_tiles: int, seconds: float, error: str = "") -> None:
        """Note what became of a slide, for `hdmil status` and for the other processes.

        A disk without room for the note does not end the run; the caller has the report.
        """
        row = [time.time(), name, status, n_tiles, seconds, self._owner.host, self._owner.pid, error]
        row[0], row[4] = f"{row[0]:.1f}", f"{seconds:.2f}"
        mark = self.folder / "failed" / f"{name}.txt"
        with suppress(OSError), self._guard:
            if status == "failed":
                mark.write_text(error + "\n", encoding="utf-8")
            else:
                mark.unlink(missing_ok=True)
            with self._table.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file).writerow(row)

    def failure(self, name: str) -> str | None:
        """With what a slide failed in another process since this one began, or None."""
        mark = self.folder / "failed" / f"{name}.txt"
        try:
            return mark.read_text(encoding="utf-8").strip() if mark.stat().st_mtime >= self._began else None
        except FileNotFoundError:
            return None

    def set_aside(self, name: str) -> str:
        """What is to be said of a slide that ended too many processes."""
        last = read_owner(self._locks(name)[-1])
        return (
            f"set aside, since it ended {TRIES} processes that worked on it"
            + (f" (the last was {last})" if last else "")
            + "; try it again with --retry-failed"
        )

    def _locks(self, name: str) -> list[Path]:
        """Lock files of a slide by number; the last one counts."""
        folder = self.folder / "locks"
        with os.scandir(folder) as entries:
            numbers = [
                int(entry.name[len(name) + 1 : -5])
                for entry in entries
                if entry.name.startswith(f"{name}.")
                and entry.name.endswith(".lock")
                and entry.name[len(name) + 1 : -5].isdigit()
            ]
        return [folder / f"{name}.{number}.lock" for number in sorted(numbers)]

    def _make_lock(self, name: str, number: int) -> bool:
        lock = self.folder / "locks" / f"{name}.{number}.lock"
        part = lock.with_name(f".{uuid.uuid4().hex[:12]}")
        content = json.dumps(asdict(replace(self._owner, since=time.time())))
        try:
            with needs_room(lock), self._guard:
                part.write_text(content, encoding="utf-8")
                _link(part, lock)
                self._held[name] = lock
        except FileExistsError:
            return False
        finally:
            part.unlink(missing_ok=True)
        return True

    def is_dead(self, lock: Path) -> bool:
        """Whether the process that made a lock is gone; a lock that vanishes meanwhile is not dead."""
        owner = read_owner(lock)
        if owner is not None and owner.started and owner.machine == self._owner.machine:
            return started(owner.pid) != owner.started
        try:
            seen = lock.stat().st_mtime
        except FileNotFoundError:
            return False
        return self._now() - seen > STALE

    def _now(self) -> float:
        """The time of the file system, whose clock may be another one than ours."""
        probe = self.folder / "locks" / f".{uuid.uuid4().hex[:12]}"
        try:
            probe.touch()
        except PermissionError:  # one who may only look on
            return time.time()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with self._guard:
                held = list(self._held.values())
            for lock in held:
                with suppress(OSError):
                    os.utime(lock)


class WorkList:
    """The slides of a run that are still to be done; threads and processes take one after the other.

    Slides that have ended a process before come last, so that they cannot keep the others waiting.

    Args:
        run: The run, entered.
        names: The slides, in their order.
    """

    def __init__(self, run: SharedRun, names: Iterable[str]) -> None:
        self._run, self._todo = run, deque(names)
        self._deferred: set[str] = set()
        self._guard = threading.Lock()

    def take(self) -> tuple[str, str | None] | None:
        """The next slide, which must be released; waits while other processes hold all that are left.

        Returns:
            Its name, and why it must not be tried or None; or None if no slide is left.
        """
        while True:
            with self._guard:
                if not self._todo:
                    return None
                for _ in range(2 * len(self._todo)):  # those that were put off are tried in the second round
                    name = self._todo.popleft()
                    found = self._try(name)
                    if found is not None:
                        return found
                    self._todo.append(name)
            time.sleep(POLL)

    def clear(self) -> None:
        """Let `take` find nothing from now on."""
        self._todo.clear()

    def _try(self, name: str) -> tuple[str, str | None] | None:
        if name not in self._deferred and self._run.deaths(name):
            self._deferred.add(name)
            return None
        state = self._run.claim(name)
        if state == "set aside":
            return name, self._run.set_aside(name)
        return (name, self._run.failure(name)) if state == "taken" else None


def read_owner(lock: Path) -> Owner | None:
    """The process that made a lock, or None if the lock is gone or does not say."""
    try:
        owner = Owner(**json.loads(lock.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    texts = (owner.host, owner.machine, owner.started)
    numbers = isinstance(owner.pid, int) and isinstance(owner.since, int | float)
    return owner if numbers and all(isinstance(text, str) for text in texts) else None


def this_process() -> Owner:
    """This process as the owner of locks."""
    return Owner(socket.gethostname(), _machine(), os.getpid(), started(os.getpid()))


def started(pid: int) -> str:
    """When a process of this machine started, in units of the machine; empty if there is no such process."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").is_file():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]  # Z and X: dead, but not yet collected by the parent
    try:
        shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    except OSError:  # a system without ps: only signs of life count
        return ""
    return shown.stdout.strip()


@cache
def _machine() -> str:
    """What tells machines, boots and containers apart."""
    parts = [socket.gethostname(), str(uuid.getnode())]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return sha256(" ".join(parts).encode()).hexdigest()[:16]


def _link(part: Path, lock: Path) -> None:
    """Give a file a second name, which must not exist yet.

    On NFS the reply of a successful link can be lost; the repeated request then reports that the name exists.
    The number of names of our own file tells whether the link was made.

    Raises:
        FileExistsError: Another process has made the lock.
    """
    try:
        os.link(part, lock)
    except FileExistsError:
        if part.stat().st_nlink != 2:
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        with lock.open("x", encoding="utf-8") as file:  # a file system without links
            file.write(part.read_text(encoding="utf-8"))
