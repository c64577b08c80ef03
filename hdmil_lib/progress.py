"""How far a run is that several processes share, from the notes and locks of `hdmil_lib.sharing`."""

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdmil_lib.errors import HDMILError
from hdmil_lib.sharing import COLUMNS, SharedRun, read_owner, run_folder

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Progress:
    """The state of a run.

    Attributes:
        slides: One row per slide: slide_id, status ("done", "running", "interrupted", "failed" or "waiting"),
            n_tiles, seconds, host, pid and error. For a slide that runs, the seconds are those so far.
        processes: One row per process: host, pid, done, failed, n_tiles, tiles_per_second (while it
            worked) and now, the slides that it holds.
    """

    slides: "pd.DataFrame"
    processes: "pd.DataFrame"


def progress_of(out: Path) -> Progress:
    """Read the state of a run while it goes on; nothing is changed.

    Args:
        out: Folder of bags or table of predictions.

    Raises:
        HDMILError: No run has written there.
    """
    import pandas as pd

    folder = run_folder(out)
    if not folder.is_dir():
        raise HDMILError(f"{out}: no run has written here; give the --out of `hdmil extract` or `predict`")
    notes = sorted(_notes(folder), key=lambda note: note["time"])
    last = {name: {"slide_id": name, "status": "waiting"} for name in _planned(folder)}
    last |= {note["slide_id"]: note for note in notes}
    for row in _locked(folder):
        noted = last.get(row["slide_id"], {})
        if row["status"] == "running" or noted.get("time", -1) < row["since"]:  # else it has been set aside
            last[row["slide_id"]] = row
    columns = ["slide_id", "status", "n_tiles", "seconds", "host", "pid", "error"]
    blank = {"host": "", "error": ""}
    slides = pd.DataFrame([blank | row for row in last.values()], columns=columns)
    slides["status"] = slides["status"].replace("skipped", "done")
    slides = slides.astype({"n_tiles": "Int64", "pid": "Int64"})
    return Progress(slides, _processes(notes, slides))


def _notes(folder: Path) -> Iterator[dict[str, Any]]:
    """What processes noted; a line that is just being written is left out."""
    for path in sorted((folder / "log").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if None in row or None in row.values() or set(row) != set(COLUMNS):
                    continue
                numbers: dict[str, Any] = {key: float(row[key]) for key in ("time", "seconds")}
                yield {**row, **numbers, "n_tiles": int(row["n_tiles"]), "pid": int(row["pid"])}


def _planned(folder: Path) -> list[str]:
    plans = sorted((folder / "plan").glob("*.txt"))
    return list(dict.fromkeys(name for plan in plans for name in plan.read_text("utf-8").splitlines()))


def _locked(folder: Path) -> Iterator[dict[str, Any]]:
    """Slides that a process holds, or held when it ended; the newest lock of each."""
    found = [path.name.rsplit(".", 2) for path in (folder / "locks").glob("[!.]*.lock")]
    newest: dict[str, int] = {}
    for name, number, _ in found:
        newest[name] = max(int(number), newest.get(name, 0))
    run = SharedRun(folder)
    for name, last in newest.items():
        lock = folder / "locks" / f"{name}.{last}.lock"
        owner = read_owner(lock)
        if owner is None:  # released meanwhile
            continue
        where = {"slide_id": name, "host": owner.host, "pid": owner.pid, "since": owner.since}
        if run.is_dead(lock):
            yield where | {"status": "interrupted", "error": f"{owner} ended while it worked on this slide"}
        else:
            yield where | {"status": "running", "seconds": time.time() - owner.since}


def _processes(notes: list[dict[str, Any]], slides: "pd.DataFrame") -> "pd.DataFrame":
    """One row per process, in the order in which they began."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}

    def row_of(host: str, pid: int) -> dict[str, Any]:
        blank = {"host": host, "pid": pid, "done": 0, "failed": 0, "n_tiles": 0, "seconds": 0.0, "now": ""}
        return rows.setdefault((host, pid), blank)

    import pandas as pd

    for note in notes:
        row = row_of(note["host"], note["pid"])
        row["failed"] += note["status"] == "failed"
        row["done"] += note["status"] == "done"
        if note["status"] == "done":
            row["n_tiles"] += note["n_tiles"]
            row["seconds"] += note["seconds"]
    for slide in slides[slides["status"] == "running"].itertuples():
        row = row_of(slide.host, slide.pid)
        row["now"] = ", ".join(filter(None, [row["now"], f"{slide.slide_id} ({slide.seconds:.0f} s)"]))
    columns = ["host", "pid", "done", "failed", "n_tiles", "seconds", "now"]
    table = pd.DataFrame(list(rows.values()), columns=columns)
    rate = table["n_tiles"] / table["seconds"].where(table["seconds"] > 0)
    table.insert(5, "tiles_per_second", rate.round(1))
    return table.drop(columns="seconds")
