"""How long does `hdmil predict` take until it opens its slide?

    python benchmarks/bench_startup.py [--repeats N]

Each figure is the median over fresh processes, in turns: `import torch` alone, `import hdmil_lib`, and
`hdmil predict` with the sample model on a real slide, from the start of the process until the slide is
opened. The first call, which converts the encoder, is not counted. Results go to
`benchmarks/results/startup.json`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hdmil_lib.slides.sample import sample_slide
from hdmil_lib.synthetic.cohorts import SAMPLES

RESULTS = Path(__file__).resolve().parent / "results" / "startup.json"
MODEL = SAMPLES / "camelyon-mini" / "model"
PREDICT = """
import sys, time
from hdmil_lib.slides import reader
open_slide = reader.Slide.__init__
def timed(self, *arguments, **options):
    print("opened", time.time(), flush=True)
    open_slide(self, *arguments, **options)
reader.Slide.__init__ = timed
sys.argv = ["hdmil", "predict", sys.argv[1], "--model", sys.argv[2]]
from hdmil_lib.cli import main
main()
"""


def seconds_of(code: str) -> float:
    """Seconds of a fresh Python process that runs this code."""
    start = time.time()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.time() - start


def seconds_until_opened(slide: Path) -> float:
    """Seconds from the start of `hdmil predict` until it opens its slide."""
    start = time.time()
    command = [sys.executable, "-c", PREDICT, str(slide), str(MODEL)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    opened = next(line for line in run.stdout.splitlines() if line.startswith("opened"))
    return float(opened.split()[1]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    slide = sample_slide()
    seconds_until_opened(slide)
    empty, torch, library, opened = [], [], [], []
    for _ in range(arguments.repeats):
        empty.append(seconds_of("pass"))
        torch.append(seconds_of("import torch"))
        library.append(seconds_of("import hdmil_lib"))
        opened.append(seconds_until_opened(slide))
    result = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load_average": round(os.getloadavg()[0], 1),
        "repeats": arguments.repeats,
        "python alone, s": round(statistics.median(empty), 3),
        "import hdmil_lib, s beyond python": round(statistics.median(library) - statistics.median(empty), 3),
        "import torch, s": round(statistics.median(torch), 2),
        "hdmil predict until its slide is opened, s": round(statistics.median(opened), 2),
        "the same, as a multiple of import torch": round(
            statistics.median(opened) / statistics.median(torch), 2
        ),
    }
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
