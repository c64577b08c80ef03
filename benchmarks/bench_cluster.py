"""Do two workers do twice the work, what does the engine cost, and do kills lose anything?

    python benchmarks/bench_cluster.py [--only SECTION ...] [--small]

Needs Linux, and two cores that nothing else uses. All workers have one core each, which they keep.
The sections:

- `scaling`: seconds of one and of two workers on a cohort of equal slides, in turns, for Dask and for
  plain `hdmil extract` processes on one folder; CPU seconds per slide of both. The time from the first
  slide's begin to the last one's end counts, not the start of the processes.
- `overhead`: milliseconds per slide that are not spent on the slide, over many slides of a few tiles; and
  what a Dask worker and its nanny use of a core while a task computes, with Dask's own timers and `QUIET`.
- `empty_tasks`: 10,000 tasks that do nothing: seconds, and the memory of the client.
- `kills`: two processes share 60 slides, and 20 times one of them gets SIGKILL and is started again. The
  bags are compared with those of an undisturbed run.
- `simulation`: the time of two processes on slides of several sizes, as `scale_model.simulate` predicts it
  from the seconds of one process, and as measured.

Results go to `benchmarks/results/cluster.json`; a section that is not run keeps its figures there. `--small`
tries the sections with few slides, and prints only.
"""

import argparse
import csv
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scale_model import simulate

from hdmil_lib import cluster
from hdmil_lib.bags import read_bag
from hdmil_lib.config import cache_dir
from hdmil_lib.progress import progress_of
from hdmil_lib.sharing import run_folder
from hdmil_lib.synthetic.drawing import synthesize_slide
from hdmil_lib.synthetic.presets import preset_named

RESULTS = Path(__file__).resolve().parent / "results" / "cluster.json"
HDMIL = (sys.executable, "-c", "from hdmil_lib.cli import main; main()")
QUIET = {
    f"DASK_{key.upper().replace('.', '__').replace('-', '_')}": str(value)
    for key, value in cluster.QUIET.items()
}
"""The same as variables of the environment, as docs/scale.md sets them."""

EMPTY = """
import sys, time
from pathlib import Path
from hdmil_lib import cluster

def nothing(*, run_id, name):
    return 0

client, n = cluster.connect(sys.argv[1]), int(sys.argv[2])
started = time.perf_counter()
results = cluster._run(client, {f"task{i}": (nothing, ()) for i in range(n)}, Path(sys.argv[3]), [], False)
assert len(results) == n
seconds = time.perf_counter() - started
memory = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
print(seconds, memory)
"""
"""A client of its own process, since the scheduler would add to its memory."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    slides: int = 8
    side: int = 6144
    repeats: int = 3
    tiny: int = 200
    tasks: int = 10_000
    mixed: int = 60
    kills: int = 20


SMALL = Sizes(slides=4, side=2048, repeats=1, tiny=20, tasks=500, mixed=8, kills=3)


# Slides


def drawn(side: int, seed: int = 0) -> Path:
    """A drawn slide, from the cache if it is there."""
    path = cache_dir() / "large_slides" / f"cluster-{side}-{seed}.tif"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        synthesize_slide(path, preset_named("camelyon-mini"), "tumor", seed, (side, side), 0.5)
    return path


def cohort(folder: Path, slides: Sequence[Path], n: int) -> Path:
    """A folder of n slides, copies of these in turn."""
    folder.mkdir()
    for i in range(n):
        shutil.copy(slides[i % len(slides)], folder / f"s{i:03d}.tif")
    return folder


def notes_of(out: Path) -> list[dict[str, str]]:
    """What all processes of a run noted of slides that they did."""
    rows = []
    for path in (run_folder(out) / "log").glob("*.csv"):
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["status"] == "done"]
    return rows


def span(out: Path) -> float:
    """Seconds from the begin of the first slide to the end of the last."""
    notes = notes_of(out)
    ends = [float(row["time"]) for row in notes]
    return max(ends) - min(end - float(row["seconds"]) for end, row in zip(ends, notes, strict=True))


# Processes


def start(
    command: Sequence[str], core: int | None = None, settings: Mapping[str, str] = QUIET, **options: Any
) -> subprocess.Popen:
    """Start a process that keeps to one core and has one thread for numbers."""
    cores = sorted(os.sched_getaffinity(0))
    keep = None if core is None else partial(os.sched_setaffinity, 0, {cores[core % len(cores)]})
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | settings
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, preexec_fn=keep, env=environment, **silent | options)


def extraction(slides: Path, out: Path, core: int) -> subprocess.Popen:
    return start((*HDMIL, "extract", str(slides), "--out", str(out)), core)


def cpu_of_ended(process: subprocess.Popen) -> float:
    """CPU seconds of a process, which is waited for; it must succeed."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"a process failed with {process.returncode}"
    return usage.ru_utime + usage.ru_stime


def cpu_of(processes: Sequence[subprocess.Popen]) -> float:
    """CPU seconds so far of running processes and their children."""
    roots = [psutil.Process(process.pid) for process in processes]
    every = [p for root in roots for p in (root, *root.children(recursive=True))]
    return sum(p.cpu_times().user + p.cpu_times().system for p in every)


@contextmanager
def dask(
    n_workers: int, settings: Mapping[str, str] = QUIET
) -> Iterator[tuple[Any, subprocess.Popen, list[subprocess.Popen]]]:
    """A client, its scheduler and workers with one core each, as the commands of docs/scale.md start them."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:

        def begin(module: str, *arguments: str, core: int | None = None) -> subprocess.Popen:
            command = (sys.executable, "-m", f"distributed.cli.{module}", *arguments)
            process = start(command, core, settings)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process

        place = Path(folder) / "scheduler.json"
        options = ("--port", "0", "--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(place))
        scheduler = begin("dask_scheduler", *options)
        while not (place.exists() and place.read_text().rstrip().endswith("}")):
            time.sleep(0.05)
        address = json.loads(place.read_text())["address"]
        options = ("--nthreads", "1", "--no-dashboard", "--local-directory", folder)
        workers = [begin("dask_worker", address, *options, core=core) for core in range(n_workers)]
        client = stack.enter_context(cluster.connect(address))
        client.wait_for_workers(n_workers, timeout=120)
        yield client, scheduler, workers


# Sections


def plain_run(slides: Path, out: Path, n: int) -> dict[str, float]:
    """Seconds, and CPU seconds per slide, of plain processes; those of their start are taken off."""
    cpu = sum(map(cpu_of_ended, [extraction(slides, out, core) for core in range(n)]))
    at_start = cpu_of_ended(extraction(slides, out, 0))  # all slides are there
    done = len(notes_of(out))
    return {"seconds": span(out), "cpu": (cpu - n * at_start) / done, "start": at_start}


def dask_run(slides: Path, out: Path, n: int) -> dict[str, float]:
    """The same for Dask, and the CPU seconds per slide of its workers alone."""
    with dask(n) as (client, scheduler, workers):
        run = partial(cluster.extract, client=client, progress=False)
        run(sorted(slides.iterdir())[: 2 * n], out / "warm")
        client_before = sum(os.times()[:2])
        before, of_scheduler = cpu_of(workers), cpu_of([scheduler])
        report = run(slides, out / "bags")
        cpu = (cpu_of(workers) - before) / len(report)
        rest = cpu_of([scheduler]) - of_scheduler + sum(os.times()[:2]) - client_before
    assert set(report["status"]) == {"done"}
    return {
        "seconds": span(out / "bags"),
        "cpu": cpu,
        "cpu_rest": rest / len(report),
        "start": before / n,
    }


def scaling(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """One and two workers in turns."""
    slides = cohort(folder / "slides", [drawn(sizes.side)], sizes.slides)
    runs: dict[str, list[dict[str, float]]] = {}
    for repeat in range(sizes.repeats):
        for engine, run in (("dask", dask_run), ("plain", plain_run)):
            for n in (1, 2) if repeat % 2 == 0 else (2, 1):
                out = folder / f"{engine}-{n}-{repeat}"
                out.mkdir()
                runs.setdefault(f"{engine} {n}", []).append(run(slides, out, n))
    bag = read_bag(next((folder / "plain-1-0").glob("*.h5")))

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    result: dict[str, Any] = {"slides": sizes.slides, "tiles per slide": len(bag), "repeats": sizes.repeats}
    for engine in ("dask", "plain"):
        pairs = zip(runs[f"{engine} 1"], runs[f"{engine} 2"], strict=True)
        ratios = [one["seconds"] / two["seconds"] for one, two in pairs]
        result[engine] = {
            "seconds, one worker": round(median(f"{engine} 1", "seconds"), 2),
            "seconds, two workers": round(median(f"{engine} 2", "seconds"), 2),
            "throughput of two to one": round(statistics.median(ratios), 3),
            "of each repeat": [round(ratio, 3) for ratio in ratios],
            "cpu seconds per slide, one worker": round(median(f"{engine} 1", "cpu"), 3),
            "cpu seconds per slide, two workers": round(median(f"{engine} 2", "cpu"), 3),
            "cpu seconds to start a worker": round(median(f"{engine} 1", "start"), 2),
        }
    result["dask"]["cpu seconds per slide, scheduler and client"] = round(median("dask 2", "cpu_rest"), 3)
    result["cpu, dask workers to plain processes"] = round(
        median("dask 2", "cpu") / median("plain 2", "cpu"), 3
    )
    return result


def overhead(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Milliseconds per slide beside the work on it, with one worker."""
    from hdmil_lib.encoders.extraction import extract
    from hdmil_lib.encoders.loading import load_encoder

    slides = cohort(folder / "slides", [drawn(1024)], sizes.tiny)
    first = sorted(slides.iterdir())[:1]

    def beside(run: Callable[..., Any], out: Path) -> float:
        run(first, out / "warm")
        walls = []
        for part, files in (("one", first), ("all", slides)):
            started = time.perf_counter()
            report = run(files, out / part)
            walls.append(time.perf_counter() - started - report["seconds"].sum())
        return 1000 * (walls[1] - walls[0]) / (sizes.tiny - 1)

    encoder = load_encoder(device="cpu")
    here = beside(lambda files, out: extract(files, encoder, out, progress=False), folder / "here")
    with dask(1) as (client, _, _):
        there = beside(partial(cluster.extract, client=client, progress=False), folder / "there")
    quiet, loud = (
        statistics.median(cpu_beside_work(settings) for _ in range(sizes.repeats)) for settings in (QUIET, {})
    )
    report = extract([drawn(6144)], encoder, folder / "timed", progress=False)
    per_tile = report["seconds"][0] / report["n_tiles"][0]
    return {
        "slides": sizes.tiny,
        "ms per slide, one process": round(here, 1),
        "ms per slide, dask": round(there, 1),
        "share of a slide of 1,000 tiles": round((there - here) / 1e6 / per_tile, 4),
        "core of worker and nanny beside the work, Dask's timers": round(loud, 4),
        "core of worker and nanny beside the work, ours": round(quiet, 4),
    }


def cpu_beside_work(settings: Mapping[str, str], seconds: float = 5.0) -> float:
    """CPU seconds per second that a worker and its nanny use beside a task that computes."""
    with dask(1, settings) as (client, _, workers):
        client.submit(compute, 0.1).result()
        before, started = cpu_of(workers), time.perf_counter()
        client.submit(compute, seconds).result()
        return (cpu_of(workers) - before - seconds) / (time.perf_counter() - started)


def compute(seconds: float) -> None:
    """Use this many CPU seconds."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(1000))


def empty_tasks(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Memory and seconds of a client with many tasks that do nothing."""
    with dask(2) as (client, _, _):
        command = (sys.executable, "-c", EMPTY, client.scheduler.address, str(sizes.tasks), str(folder))
        process = start(command, stdout=subprocess.PIPE, text=True)
        seconds, memory = map(float, process.communicate()[0].split())
    return {
        "tasks": sizes.tasks,
        "seconds": round(seconds, 1),
        "peak memory of the client, MB": round(memory),
    }


def mixed_slides(sizes: Sizes, folder: Path) -> tuple[Path, Path]:
    """A cohort of slides of several sizes, and its bags by one process."""
    kinds = [drawn(1536 + 512 * (seed % 4), seed) for seed in range(12)]
    slides, whole = folder.parent / "mixed", folder.parent / "whole"
    if not slides.exists():
        cohort(slides, kinds, sizes.mixed)
        cpu_of_ended(extraction(slides, whole, 0))
    return slides, whole


def simulation(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Seconds of two processes, predicted from those of one and measured."""
    slides, whole = mixed_slides(sizes, folder)
    seconds = [float(row["seconds"]) for row in sorted(notes_of(whole), key=lambda row: float(row["time"]))]
    measured = []
    for repeat in range(sizes.repeats):
        out = folder / f"out{repeat}"
        for process in [extraction(slides, out, core) for core in range(2)]:
            cpu_of_ended(process)
        measured.append(span(out))
    predicted = simulate(np.array(seconds), 2)
    return {
        "slides": sizes.mixed,
        "seconds, one process": round(span(whole), 2),
        "seconds, two processes, predicted": round(predicted, 2),
        "seconds, two processes, measured": [round(value, 2) for value in measured],
        "measured to predicted": round(statistics.median(measured) / predicted, 3),
    }


def kills(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Kill one of two processes again and again, at random moments that are spread over the run."""
    slides, whole = mixed_slides(sizes, folder)
    out, generator = folder / "out", random.Random(0)
    processes = [extraction(slides, out, core) for core in range(2)]
    n_kills = restarts = 0
    while any(process.poll() is None for process in processes):
        time.sleep(0.02)
        if n_kills < sizes.kills and len(list(out.glob("s*.h5"))) >= n_kills * sizes.mixed / (
            sizes.kills + 1
        ):
            time.sleep(generator.uniform(0, 1.5))
            victim = generator.randrange(2)
            if processes[victim].poll() is None:
                processes[victim].kill()
                n_kills += 1
            processes[victim].wait()
            processes[victim] = extraction(slides, out, victim)
            restarts += 1
    aside = int((progress_of(out).slides["status"] == "failed").sum())
    last = start((*HDMIL, "extract", str(slides), "--out", str(out), "--retry-failed"), 0)
    cpu_of_ended(last)
    done = [row["slide_id"] for row in notes_of(out)]
    return {
        "slides": sizes.mixed,
        "kills": n_kills,
        "slides set aside after two deaths": aside,
        "bags": len(list(out.glob("s*.h5"))),
        "noted as done twice": len(done) - len(set(done)),
        "bags that differ from the undisturbed run": sum(
            not same(out / path.name, path) for path in whole.glob("s*.h5")
        ),
    }


def same(one: Path, other: Path) -> bool:
    """Whether two bags hold the same bytes of features and coordinates under the same name."""
    if not one.exists():
        return False
    a, b = read_bag(one), read_bag(other)
    equal = a.features.tobytes() == b.features.tobytes() and a.coords.tobytes() == b.coords.tobytes()
    return equal and a.slide_id == b.slide_id


SECTIONS = {run.__name__: run for run in (scaling, overhead, empty_tasks, simulation, kills)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.only:
            folder, started = Path(temporary) / name, time.perf_counter()
            folder.mkdir()
            load = round(os.getloadavg()[0], 1)
            measured = SECTIONS[name](SMALL if arguments.small else Sizes(), folder)
            result[name] = {"machine": machine, "load_average": load, **measured}
            print(
                f"{name}, {time.perf_counter() - started:.0f} s:",
                json.dumps(result[name], indent=1),
                flush=True,
            )
            if not arguments.small:
                RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
