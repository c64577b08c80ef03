"""Download of public cohorts: a plan that can be looked at first, then slides and their labels."""

import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from hdmil_lib.errors import CohortError, HDMILError
from hdmil_lib.public.catalog import PublicCohort, cohort_named, describe
from hdmil_lib.public.choice import choose
from hdmil_lib.public.sources import ADDRESSES, Addresses, RemoteSlide
from hdmil_lib.public.transfer import Checked, Client, RemoteFile, check_content
from hdmil_lib.storage import check_output, read_table, write_json, write_table

SLIDES, LABELS, FILES, SOURCE = "slides", "cohort.csv", "files.csv", "source.json"
"""What the folder of a fetched cohort holds: slides, labels, one row per file, and where all comes from."""

ALL_SLIDES = "slides of the whole cohort"
"""Entry of `source.json`: their number, faulty ones left out."""

RESERVE = 10**9
"""Bytes that stay free on the disk."""


@dataclass(frozen=True)
class Plan:
    """What a download will take.

    Attributes:
        name: Name of the cohort.
        cohort: The cohort.
        out: Folder of the download.
        slides: Slides to fetch, in their order.
        n_all: Number of slides of the whole cohort.
    """

    name: str
    cohort: PublicCohort
    out: Path
    slides: tuple[RemoteSlide, ...]
    n_all: int

    @property
    def size(self) -> int:
        """Bytes of all slides; for series of the Imaging Data Commons within a kilobyte."""
        return sum(slide.size for slide in self.slides)

    @property
    def n_files(self) -> int:
        """Number of files of all slides."""
        return sum(slide.n_files for slide in self.slides)

    @property
    def n_bytes_here(self) -> int:
        """Bytes of these slides that are here already, those of interrupted downloads among them."""
        return sum(
            path.stat().st_size
            for slide in self.slides
            for path in _paths_of(self.out / SLIDES, slide)
            if path.is_file()
        )

    @property
    def n_by_class(self) -> dict[str, int]:
        """Number of slides of each class, and of each part of the official split."""
        counts: dict[str, int] = {}
        for slide in self.slides:
            key = f"{slide.label} ({slide.split})" if slide.split else slide.label
            counts[key] = counts.get(key, 0) + 1
        return dict(sorted(counts.items()))

    @property
    def n_patients(self) -> int:
        """Number of patients of these slides."""
        return len({slide.case_id for slide in self.slides})

    def check_space(self) -> None:
        """Check that the disk holds what is missing.

        Raises:
            CohortError: It does not.
        """
        parent = next(folder for folder in (self.out, *self.out.absolute().parents) if folder.is_dir())
        missing, free = self.size - self.n_bytes_here, shutil.disk_usage(parent).free
        if missing + RESERVE > free:
            raise CohortError(
                f"{self.out}: {gigabytes(missing)} are missing and {gigabytes(free)} are free on its disk; "
                "choose another disk, or fewer slides with --slides"
            )


@dataclass
class Fetched:
    """What a download brought.

    Attributes:
        labels: The label table, for `hdmil extract` and `hdmil train`.
        n_slides: Number of slides that are there.
        failed: Reasons by slide_id of those that are not.
        checked: Number of files by how their content was checked.
    """

    labels: Path
    n_slides: int
    failed: dict[str, str]
    checked: dict[str, int]


@dataclass
class _Progress:
    """Rows of `files.csv` and reasons of failures, filled by several threads."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)


def plan_fetch(
    name: str,
    out: str | Path,
    *,
    n_slides: int | None = None,
    client: Client | None = None,
    addresses: Addresses | None = None,
) -> Plan:
    """Find out what a download will take; nothing but lists and labels is read.

    Args:
        name: Name in `COHORTS`.
        out: Folder of the download; slides that are there are not fetched again.
        n_slides: Number of slides for a small part; see `choose`. By default all.
        client: Client that asks.
        addresses: Servers, by default those of `ADDRESSES`.

    Raises:
        CohortError: There is no such cohort, or its lists cannot be read.
        HDMILError: `out` is a file.
    """
    cohort, out = cohort_named(name), Path(out)
    check_output(out, folder=True)
    left_out = {fault.slide_id for fault in cohort.faults if fault.left_out}
    listed = cohort.slides(client or Client(), addresses or ADDRESSES)
    slides = [slide for slide in listed if slide.slide_id not in left_out]
    if n_slides is not None and n_slides < len(cohort.classes):
        raise CohortError(f"{n_slides} slides cannot hold {' and '.join(cohort.classes)}; ask for more")
    chosen = slides if n_slides is None else choose(slides, n_slides)
    return Plan(name, cohort, out, tuple(chosen), len(slides))


def fetch(plan: Plan, *, client: Client | None = None, jobs: int = 4, progress: bool = True) -> Fetched:
    """Download the slides of a plan, and write their label table.

    A slide that fails does not stop the others. What an interrupted download brought is kept, and the next
    one goes on from there. Files that `files.csv` names were checked when they came, and are not read again.

    Args:
        plan: The plan.
        client: Client that downloads.
        jobs: Number of slides that are downloaded at the same time.
        progress: Whether a bar is shown.

    Raises:
        CohortError: The disk is too small, another download writes to the folder, or no slide arrived.
        OSError: The folder cannot be written.
    """
    from tqdm.auto import tqdm

    plan.check_space()
    client, done = client or Client(), _Progress()
    plan.out.mkdir(parents=True, exist_ok=True)
    with (
        _alone(plan.out),
        tqdm(
            total=plan.size,
            initial=plan.n_bytes_here,
            desc=plan.name,
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        known = _known_checks(plan.out / FILES)

        def report(n_bytes: int) -> None:
            with done.lock:
                bar.update(n_bytes)

        def run(slide: RemoteSlide) -> None:
            try:
                rows = _fetch_slide(slide, plan.out / SLIDES, client, known, report)
            except HDMILError as error:
                done.failed[slide.slide_id] = str(error)
            else:
                done.rows[slide.slide_id] = rows

        _in_parallel(run, plan.slides, jobs, client)
        return _finish(plan, done)


def gigabytes(n_bytes: int) -> str:
    """A number of bytes in gigabytes, or in megabytes where it is small."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def _in_parallel(
    run: Callable[[RemoteSlide], None], slides: Sequence[RemoteSlide], jobs: int, client: Client
) -> None:
    """Run a function on slides in threads; after an error or Ctrl-C all downloads end."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, slide) for slide in slides]
        try:
            for future in futures:
                future.result()
        except BaseException:
            client.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_slide(
    slide: RemoteSlide,
    folder: Path,
    client: Client,
    known: dict[str, Checked],
    report: Callable[[int], object],
) -> list[dict[str, Any]]:
    """Fetch the files of a slide; returns their rows of `files.csv`."""
    rows = []
    for name, remote in slide.locate(client).items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CohortError(f"{remote.url}: its name leads out of the folder; it is not written")
        checked = _check_here(path, remote, known.get(name)) or client.download(remote, path, report)
        rows.append(
            {
                "slide_id": slide.slide_id,
                "path": name,
                "bytes": remote.size,
                "checked": checked,
                "checksum": remote.md5 or remote.etag,
                "url": remote.url,
            }
        )
    return rows


def _check_here(path: Path, remote: RemoteFile, known: Checked | None) -> Checked | None:
    """How a file that is here was checked, now if not yet; None if it is absent or another."""
    if not path.is_file() or path.stat().st_size != remote.size:
        return None
    return known or check_content(path, remote)


def _finish(plan: Plan, done: _Progress) -> Fetched:
    """Write the tables of a download."""
    import pandas as pd

    arrived = [slide for slide in plan.slides if slide.slide_id in done.rows]
    if not arrived:
        first = next(iter(done.failed.values()))
        raise CohortError(f"{plan.out}: no slide arrived; the first failed so: {first}")
    files = pd.DataFrame([row for slide in arrived for row in done.rows[slide.slide_id]])
    write_table(plan.out / FILES, files)
    write_table(plan.out / LABELS, pd.DataFrame([_label_row(s, done.rows[s.slide_id]) for s in arrived]))
    write_json(
        plan.out / SOURCE,
        {
            "cohort": plan.name,
            "title": plan.cohort.title,
            "license": plan.cohort.license,
            "home": plan.cohort.home,
            "slides": len(arrived),
            ALL_SLIDES: plan.n_all,
            "faults": describe(plan.cohort.faults),
            "notes": list(plan.cohort.notes),
        },
    )
    checked = files["checked"].value_counts().to_dict()
    return Fetched(plan.out / LABELS, len(arrived), done.failed, checked)


def _label_row(slide: RemoteSlide, files: list[dict[str, Any]]) -> dict[str, str]:
    """The row of a slide in the label table; its path is that of its largest file."""
    largest = max(files, key=lambda row: row["bytes"])
    row = {"slide_id": slide.slide_id, "case_id": slide.case_id, "label": slide.label}
    row["path"] = f"{SLIDES}/{largest['path']}"
    return row | ({"split": slide.split} if slide.split else {}) | slide.extra


def _paths_of(folder: Path, slide: RemoteSlide) -> list[Path]:
    """Files of a slide that may be here, without asking its server for their names."""
    if slide.n_files == 1:
        return [folder / f"{slide.slide_id}.tif", folder / f"{slide.slide_id}.tif.part"]
    series = folder / slide.slide_id
    return sorted(series.iterdir()) if series.is_dir() else []


def _known_checks(path: Path) -> dict[str, Checked]:
    """How files that are here were checked when they came."""
    if not path.is_file():
        return {}
    table = read_table(path)
    if not {"path", "checked"} <= {*table}:
        return {}
    return dict(zip(table["path"], table["checked"], strict=True))


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder, so that no second download writes the same files."""
    with (out / ".fetch.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CohortError(f"{out}: another `hdmil fetch` writes to it; wait for its end") from error
        yield
