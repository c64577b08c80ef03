"""What 1,000, 10,000 and 100,000 slides cost: measured figures, and a simulation of workers that share them.

Usage: python benchmarks/scale_model.py
"""

import heapq
import json
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
TILES, SPREAD = 10_000, 0.6  # assumed: median tiles per slide at 20x, and the standard deviation of their log
BYTES_PER_TILE = 1280 * 2 + 16 + 16 + 16 * 16 * 3  # features, coordinates, grid positions, patch
SLIDE_BYTES = 1e9  # assumed
WORKERS = 64


def core_seconds_per_tile() -> float:
    """Measured on two cores, reading and encoding with all tiles."""
    rows = json.loads((RESULTS / "inference.json").read_text())["yardsticks"]["rows"]
    return 2 * rows["HDMIL†, fp32"]["ms per tile"] / 1000


def simulate(seconds: np.ndarray, workers: int) -> float:
    """Seconds until all slides are done, if each worker takes the next one when it is free."""
    free = [0.0] * workers
    for spent in seconds:
        heapq.heapreplace(free, free[0] + spent)
    return max(free)


def main() -> None:
    """Print the model and write it to benchmarks/results/scale_model.json."""
    per_tile, rng, rows = core_seconds_per_tile(), np.random.default_rng(0), []
    for n_slides in (1_000, 10_000, 100_000):
        tiles = TILES * rng.lognormal(0, SPREAD, n_slides)
        ideal = tiles.sum() * per_tile / WORKERS / 3600
        rows.append(
            {
                "slides": n_slides,
                "core_hours": round(tiles.sum() * per_tile / 3600),
                "hours": round(simulate(tiles * per_tile, WORKERS) / 3600, 1),
                "hours_ideal": round(ideal, 1),
                "bags_gb": round(tiles.sum() * BYTES_PER_TILE / 1e9),
                "read_mb_per_second": round(n_slides * SLIDE_BYTES / 1e6 / (ideal * 3600)),
            }
        )
    assumed = {"tiles": TILES, "log_sd": SPREAD, "slide_bytes": SLIDE_BYTES, "one_core_workers": WORKERS}
    result = {"core_seconds_per_tile": per_tile, "assumed": assumed, "cohorts": rows}
    (RESULTS / "scale_model.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
