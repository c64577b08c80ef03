"""Do the kernels work on this GPU, and how fast are operators, training and prediction?

    python benchmarks/bench_gpu.py [--quick] [--out DIR]     `make gpu` runs this
    python benchmarks/bench_gpu.py --interpret               all of it without a GPU, in tiny sizes

Runs the tests that need a GPU; times every operator as a formula, compiled, and as a kernel, against the
roof that is measured in the same run; trains every model on random bags with kernels and with formulas; and
predicts a synthetic slide. Results go to `benchmarks/results/gpu/<device>.json`, row after row, so that an
interrupted run keeps what it measured. Each part is a process of its own with a share of the time: one that
a broken kernel hangs or ends costs its own rows alone. A form that fails has an `error` in its row; what the
time did not suffice for has no row, and `left_out` counts it. The exit status is not 0 if a test, a part or
a row failed.

With `--interpret` the kernels run in Triton's interpreter on the CPU. That shows that the script works; its
times mean nothing, and it never writes into `benchmarks/results`.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from hdmil_lib.config import n_threads, setup
from hdmil_lib.storage import write_json
from hdmil_lib.training.provenance import source_commit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
NO_GPU = "There is no GPU here: run `make gpu` on a machine with one, or try the script with --interpret."
INTERPRETED = "interpreter (CPU), times mean nothing"
SHARES = {"tests": 0.25, "operators": 0.55, "training": 0.82, "prediction": 1.0}
"""Each part, and the share of the run's time that is over when it ends."""

Rows = Iterable[Callable[[], list[dict[str, Any]]]]


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        path: The result file.
        interpret: Whether it runs in the interpreter, in tiny sizes.
        quick: Whether it leaves out float32 and most tests.
        minutes: Time of the run.
        started: When it started, in seconds since 1970.
    """

    path: Path
    interpret: bool
    quick: bool
    minutes: float
    started: float

    def left(self, part: str) -> float:
        """Seconds until a part must end."""
        return self.started + 60 * self.minutes * SHARES[part] - time.time()


def describe_device(plan: Plan) -> dict[str, Any]:
    """The device and the software, as far as they are known."""
    import triton

    record: dict[str, Any] = {
        "device": INTERPRETED,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **source_commit(__file__),
        "quick": plan.quick,
    }
    if plan.interpret:
        return record
    properties = torch.cuda.get_device_properties(0)
    return record | {
        "device": properties.name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cpu_threads": n_threads(),
        **nvidia_smi("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit"),
    }


def nvidia_smi(*fields: str) -> dict[str, str]:
    """What the driver says of the first GPU; nothing where there is no such program."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def file_name(device: str, quick: bool) -> str:
    """Name of the result file of a device."""
    slug = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{slug}{'-quick' if quick else ''}.json"


def run_tests(plan: Plan) -> dict[str, Any]:
    """Counts of the tests that need a GPU, and those that failed by name."""
    if plan.interpret:
        selections = [["tests/kernels/test_comparison.py", "tests/test_devices.py", "-m", ""]]
    else:
        marked = [
            str(path.relative_to(ROOT))
            for path in sorted((ROOT / "tests").glob("test_*.py"))
            if "pytest.mark.gpu" in path.read_text()
        ]  # others may need packages that are not here
        kernels = ["tests/kernels", "-m", "gpu" if plan.quick else ""]
        selections = [kernels, [*marked, "-m", "gpu"]]
    return tested(selections, lambda: plan.left("tests"), workers=min(12, n_threads()))


def tested(selections: list[list[str]], left: Callable[[], float], workers: int) -> dict[str, Any]:
    """Run pytest on each selection and add up the results.

    Args:
        selections: Arguments of pytest.
        left: Function that returns the seconds that are left.
        workers: Number of processes; 0 for this one's child alone.
    """
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for selection in selections:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", *selection, f"--junitxml={report}"]
            command += ["-q", "-p", "no:cacheprovider"]
            if find_spec("xdist"):
                command += ["-n", str(workers if workers > 1 else 0)]
            try:
                done = subprocess.run(
                    command, cwd=ROOT, capture_output=True, text=True, timeout=max(left(), 1)
                )
            except subprocess.TimeoutExpired as late:
                found["error"] = f"{' '.join(selection)} did not end within {late.timeout:.0f} s"
                continue
            if not report.is_file():
                found["error"] = f"{' '.join(selection)}: {(done.stderr or done.stdout).strip()[-300:]}"
                continue
            for test in ElementTree.parse(report).iter("testcase"):
                tags = {child.tag for child in test}
                outcome = "failed" if tags & {"failure", "error"} else "passed"
                found["skipped" if "skipped" in tags else outcome] += 1
                if outcome == "failed":
                    found["failures"].append(f"{test.get('classname')}::{test.get('name')}")
    return found


def operators(plan: Plan, section: dict[str, Any]) -> Rows:
    """The roof, and the operators."""
    from gpu import operators
    from gpu.cases import TINY, Sizes

    bench = operators.bench_for(plan.interpret, plan.quick)
    side, numbers = (64, 2**16) if plan.interpret else (8192, 2**28)
    section["roof"] = operators.roof(bench, side, numbers)
    sizes = TINY if plan.interpret else Sizes()
    only = (bench.narrow, "float16", "uint8") if plan.quick else ()
    return operators.measure(sizes, bench, section["roof"], only)


def training(plan: Plan, section: dict[str, Any]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """All models on bags as in the paper, then on small ones."""
    from gpu import training

    device = torch.device("cpu") if plan.interpret else torch.device("cuda", 0)
    cohorts = [training.TINY] if plan.interpret else [training.PAPER, training.SMALL]
    if plan.quick:
        cohorts = cohorts[:1]
    section["bags"] = {c.name: f"{c.bags} of about {c.tiles:,} x {c.dim}" for c in cohorts}
    for cohort in cohorts:
        seconds = 0.0 if plan.interpret else 0.3 if plan.quick else 0.6
        precisions = ("bf16",) if plan.quick and not plan.interpret else training.PRECISIONS
        yield from training.measure(cohort, device, seconds, precisions)


def prediction(plan: Plan, section: dict[str, Any]) -> Rows:
    """The encoder and a slide."""
    from gpu import prediction

    side = 1_024 if plan.interpret else 4_096 if plan.quick else 8_192
    section["slide"] = f"synthetic, {side:,} x {side:,} at 0.5 um/px"
    device = torch.device("cpu") if plan.interpret else torch.device("cuda", 0)
    batches, repeats = (1, 1) if plan.interpret else (4, 2) if plan.quick else (16, 3)
    return prediction.measure(side, device, batches, repeats)


PARTS = {"operators": operators, "training": training, "prediction": prediction}


def run_part(name: str, plan: Plan) -> None:
    """Measure one part in this process; the file is written after every row."""
    setup()
    started = time.perf_counter()
    section: dict[str, Any] = {"rows": [], "left_out": 0}
    for measure in PARTS[name](plan, section):
        if plan.left(name) < 0:
            section["left_out"] += 1
            continue
        section["rows"] += measure()
        section["seconds"] = round(time.perf_counter() - started, 1)
        save(plan.path, name, section)
        print(summary(section["rows"][-1]), flush=True)
    save(plan.path, name, section)


def summary(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    shown = ("error", "ms", "bags_per_s", "tiles_per_s", "ms_per_tile")
    figures = ", ".join(f"{key} {row[key]}" for key in shown if key in row)
    names = [v for k, v in row.items() if isinstance(v, str) and k not in ("error", "roof")]
    return f"{', '.join(names)}: {figures}"


def save(path: Path, name: str, section: dict[str, Any]) -> None:
    """Put a section into the result file."""
    result = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, result | {name: section})


def in_a_process(name: str, plan: Plan) -> None:
    """Run a part in a process of its own; if it does not end well, the file says so."""
    process = multiprocessing.get_context("spawn").Process(target=run_part, args=(name, plan))
    process.start()
    process.join(max(plan.left(name), 0) + 60)  # the row that it is at may end
    fault = None
    if process.is_alive():
        process.kill()
        process.join()
        fault = "was ended, since it took too long"
    elif process.exitcode:
        fault = f"ended with status {process.exitcode}"
    if fault:
        section = json.loads(plan.path.read_text()).get(name, {"rows": [], "left_out": 0})
        save(plan.path, name, section | {"error": fault})


def faults(result: dict[str, Any]) -> list[str]:
    """One line for all that failed."""
    found = [f"test failed: {name}" for name in result["tests"]["failures"]]
    found += [f"{name} {result[name]['error']}" for name in SHARES if "error" in result[name]]
    for name in PARTS:
        found += [summary(row) for row in result[name]["rows"] if "error" in row]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="16 bits only, few tests: under 3 minutes")
    parser.add_argument("--interpret", action="store_true", help="run without a GPU, in tiny sizes")
    parser.add_argument("--minutes", type=float, help="time of the run; by default 8, or 3 with --quick")
    parser.add_argument("--out", type=Path, help=f"folder of the result, by default {RESULTS}")
    arguments = parser.parse_args()
    if arguments.interpret:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    elif not torch.cuda.is_available():
        sys.exit(NO_GPU)
    folder = arguments.out or (Path(tempfile.mkdtemp()) if arguments.interpret else RESULTS)
    if arguments.interpret and folder.resolve().is_relative_to(RESULTS.parent):
        parser.error(f"{folder}: the interpreter's times are no results; choose another folder")
    minutes = arguments.minutes or (3 if arguments.quick else 8)
    device = INTERPRETED if arguments.interpret else torch.cuda.get_device_name(0)
    path = folder / file_name("interpreter" if arguments.interpret else device, arguments.quick)
    plan = Plan(path, arguments.interpret, arguments.quick, minutes, time.time())

    write_json(path, describe_device(plan))
    print(f"{device}: tests", flush=True)
    save(path, "tests", run_tests(plan))
    for name in PARTS:
        print(f"{device}: {name}", flush=True)
        in_a_process(name, plan)
    result = json.loads(path.read_text())
    result["seconds"] = round(time.time() - plan.started, 1)
    write_json(path, result)
    failed = faults(result)
    counts = ", ".join(f"{result['tests'][key]} {key}" for key in ("passed", "failed", "skipped"))
    print("\n".join([f"tests: {counts}", *failed, f"{path}, after {result['seconds']:.0f} s"]))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
