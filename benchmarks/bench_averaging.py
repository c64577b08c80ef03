"""A field at twice the scale of its level: averaged, as it is read, or by a bicubic filter?

    python benchmarks/bench_averaging.py

The tiles of a drawn slide are read as if its pixels were half as large, which makes it a slide at 40x without
a level at 20x, both ways in turns. Measures milliseconds per tile and how alike the encoder's features are.
Writes `benchmarks/results/averaging.json`.
"""

import json
import os
import platform
import time
from pathlib import Path

import numpy as np

from hdmil_lib.config import setup
from hdmil_lib.encoders.loading import load_encoder
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.slides import reader as module
from hdmil_lib.synthetic.cohorts import large_slides

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "averaging.json"
SIDE, REPEATS = 256, 7


def main() -> None:
    setup()
    path = large_slides("camelyon-mini", 1, 8192)[0]
    averaged_factor, encoder, spent, tiles = module._averaged_factor, load_encoder(), {}, {}
    with Slide(path) as slide:
        native = slide.mpp[0]
        del slide.levels[1:]  # as scanners leave it out
        grid = TileGrid.from_slide(slide, tile_size=SIDE * 2, mpp=native, patch_size=32)
        corners = grid.coords.tolist()
        ways = {"averaged": averaged_factor, "bicubic": lambda scale: None}
        for _ in range(REPEATS):
            for name, rule in ways.items():
                module._averaged_factor = rule
                start = time.perf_counter()
                read = [slide.read_field(x, y, (SIDE, SIDE), native * 2) for x, y in corners]
                spent.setdefault(name, []).append((time.perf_counter() - start) / len(read))
                tiles[name] = np.stack(read)
    module._averaged_factor = averaged_factor
    one, other = (encoder(tiles[name]).astype("f8") for name in ways)
    cosine = (one * other).sum(1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))
    result = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "slide": path.name,
        "tiles": len(corners),
        "milliseconds per tile, decoding included": {
            name: round(1000 * float(np.median(seconds)), 3) for name, seconds in spent.items()
        },
        "cosine of the features": {
            "median": round(float(np.median(cosine)), 5),
            "lowest": round(float(cosine.min()), 5),
        },
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
