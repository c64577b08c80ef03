"""Milliseconds of each way to look at a tile: LIPN's patch, the encoder at 4, 2 and 1 um/px, and in full.

    python benchmarks/bench_looks.py [--repeats N]

The tiles of a drawn slide are read and encoded at each side, in turns; medians go to
`benchmarks/results/looks.json`. Patches are cut from the thumbnail, whose reading is counted.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from hdmil_lib.config import setup
from hdmil_lib.encoders.loading import load_encoder, processor
from hdmil_lib.models import LIPN
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.synthetic.cohorts import large_slides

RESULTS = Path(__file__).resolve().parent / "results" / "looks.json"
SIDES = {32: "4 um/px", 64: "2 um/px", 128: "1 um/px", 256: "0.5 um/px, in full"}
N_TILES = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", type=int, default=16_384, help="side of the slide")
    given = parser.parse_args()
    setup()
    encoder, lipn = load_encoder(), LIPN(2).eval()
    path = large_slides("camelyon-mini", 1, given.side)[0]
    spent: dict[str, dict[str, list[float]]] = {}

    def note(name: str, stage: str, start: float, n_tiles: int) -> None:
        milliseconds = 1000 * (time.perf_counter() - start) / n_tiles
        spent.setdefault(name, {}).setdefault(stage, []).append(milliseconds)

    for repeat in range(given.repeats + 1):
        with Slide(path) as slide:
            start = time.perf_counter()
            grid = TileGrid.from_slide(slide)
            note("8 um/px, LIPN", "read", start, len(grid))
            start = time.perf_counter()
            with torch.inference_mode():
                lipn(torch.from_numpy(grid.patches))
            note("8 um/px, LIPN", "network", start, len(grid))
            for side, name in SIDES.items():
                coarse, n_tiles = grid.at(side), min(N_TILES, len(grid))
                start = time.perf_counter()
                tiles = np.stack([coarse.read_tile(slide, row) for row in range(n_tiles)])
                note(name, "read", start, n_tiles)
                start = time.perf_counter()
                encoder.at(side)(tiles)
                note(name, "network", start, n_tiles)
        if repeat == 0:  # warms up
            spent.clear()
    result = {
        "device": f"{processor()}, {os.cpu_count()} cores",
        "precision": encoder.precision,
        "load_average": round(os.getloadavg()[0], 1),
        "tiles": len(grid),
        "repeats": given.repeats,
        "milliseconds per tile": {
            name: {stage: round(float(np.median(values)), 4) for stage, values in stages.items()}
            for name, stages in spent.items()
        },
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
