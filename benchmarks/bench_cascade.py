"""Measure how much faster a cascade classifies a slide than reading all tiles.

    python benchmarks/bench_cascade.py [--repeats N] [--side PIXELS]

A synthetic slide is classified in turns from all tiles (HDMIL†) and by cascades. In these LIPN lets 60 % of
the tiles through, the second look sees them at 2 um/px, and 30 or 10 % are read in full. The second look is
not trained: time depends on the shares alone. Medians go to `benchmarks/results/cascade.json`.
"""

import argparse
import json
import os
import platform
import statistics
from pathlib import Path

import numpy as np
import torch

from hdmil_lib.config import setup
from hdmil_lib.encoders.loading import processor
from hdmil_lib.models import HDMIL, SecondLook
from hdmil_lib.models.lipn import thresholds_for_keep_ratio
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.synthetic.cohorts import SAMPLES, large_slides

RESULTS = Path(__file__).resolve().parent / "results" / "cascade.json"
FIRST, SHARES = 0.6, (0.3, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", type=int, default=16_384, help="side of the slide")
    given = parser.parse_args()
    setup()
    path = large_slides("camelyon-mini", 1, given.side)[0]
    trained = HDMIL.from_pretrained(SAMPLES / "camelyon-mini" / "model")
    with Slide(path) as slide:
        patches = torch.from_numpy(TileGrid.from_slide(slide).patches)
    scores = trained.lipn_logits(patches).sigmoid().detach()
    thresholds = thresholds_for_keep_ratio([scores], FIRST)
    torch.manual_seed(0)
    look = SecondLook(trained.dmin.in_dim)
    models = {
        f"cascade, {share:.0%}": HDMIL(
            trained.dmin, trained.lipn, thresholds=thresholds, look=look, look_share=share, info=trained.info
        )
        for share in SHARES
    }
    encoder = trained.encoder
    for model in models.values():
        model.encoder = encoder
    ways = {"all tiles": lambda: trained.predict(path, all_tiles=True)}
    ways |= {name: (lambda m=model: m.predict(path)) for name, model in models.items()}
    seconds = {name: [] for name in ways}
    for repeat in range(given.repeats + 1):
        for name, predict in ways.items():
            prediction = predict()
            if repeat:  # the first turn warms up
                seconds[name].append(prediction.seconds)
    totals = {name: statistics.median(s["total"] for s in found) for name, found in seconds.items()}
    ratios = {
        name: [a["total"] / b["total"] for a, b in zip(seconds["all tiles"], found, strict=True)]
        for name, found in seconds.items()
    }
    n_tiles = prediction.n_tiles
    per_tile = totals["all tiles"] / n_tiles
    looked = statistics.median(s["look"] for s in seconds["cascade, 10%"]) / (FIRST * n_tiles)
    result = {
        "device": f"{processor()}, {os.cpu_count()} cores",
        "machine": platform.machine(),
        "precision": encoder.precision,
        "load_average": round(os.getloadavg()[0], 1),
        "tiles": n_tiles,
        "repeats": given.repeats,
        "seconds": {name: round(value, 3) for name, value in totals.items()},
        "stages": {
            name: {stage: round(float(np.median([s[stage] for s in found])), 3) for stage in found[0]}
            for name, found in seconds.items()
        },
        "times as fast": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "look per tile / all of a tile": round(looked / per_tile, 3),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
