"""Does pre-screening save the time that it promises, and how fast is a slide beside the usual pipelines?

    python benchmarks/bench_inference.py [--model DIR] [--slides N] [--repeats N]

Draws large synthetic slides once (in the cache) and writes `benchmarks/results/inference.json`:

- Table 2: both methods in turns on the same slides, seconds a slide by stage, and for each share of tiles
  read the share of time spent, which is to exceed it by 0.05 at most.
- Yardsticks: seconds a tile of all that leads to features, on a smaller slide, of a naive loop, of the
  pipeline of a common tool (see `yardsticks.py`) and of ours, on the same tiles with the same weights, in
  turns; with the smallest cosine of the features to the naive loop's.
- Growth: seconds and peak memory on slides of rising size, each in a process of its own.

Without `--model` the networks are untrained: what a tile costs does not depend on their weights.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yardsticks as yard

from hdmil_lib.config import n_threads, setup
from hdmil_lib.data import large_slides
from hdmil_lib.evaluation.tables import table2, to_markdown
from hdmil_lib.evaluation.timing import stage_medians, time_slides
from hdmil_lib.features.encoders import ENCODERS, Encoder, load_encoder
from hdmil_lib.features.extraction import encode_tiles
from hdmil_lib.features.networks import build_network
from hdmil_lib.inference import ModelConfig, Predictor
from hdmil_lib.models import DMIN, LIPN, DMINSettings
from hdmil_lib.slides import Slide, TileGrid

RESULTS = Path(__file__).resolve().parent / "results" / "inference.json"
KEEP_RATIOS = (0.3,)
TOLERANCE = 0.05
SIDE, YARDSTICK_SIDE = 16_384, 8_192
GROWTH_SIDES = (8_192, 16_384, 24_576, 32_768)


def untrained_predictor(slide: Path) -> Predictor:
    """Networks of the paper's size with random weights, on the default encoder.

    LIPN's batch norms see the slide's patches, or all its scores would be nearly the same.
    """
    encoder = load_encoder()
    torch.manual_seed(0)
    dmin, lipn = DMIN(DMINSettings(in_dim=encoder.dim)), LIPN()
    with Slide(slide) as opened, torch.no_grad():
        patches = torch.from_numpy(TileGrid.from_slide(opened).patches)
        for _ in range(20):
            lipn(patches)
    return Predictor(dmin, lipn, ModelConfig(("0", "1"), encoder.name, encoder.weights_hash), encoder=encoder)


def yardsticks(path: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds a tile from the file to features, medians of turns."""
    network = build_network(ENCODERS["efficientnet_lite0"]).backbone
    with Slide(path) as slide:
        grid = TileGrid.from_slide(slide)
    encoders = {f"ours, {p}": load_encoder(precision=p) for p in ("fp32", "bf16")}
    side = grid.tile_size_level0[0]

    def ours(encoder: Encoder) -> np.ndarray:
        with Slide(path) as slide:
            return encode_tiles(slide, grid, range(len(grid)), encoder)

    contenders: dict[str, Callable[[], np.ndarray]] = {
        "naive loop": lambda: yard.naive_loop(path, grid.coords, side, network),
        "common tool": lambda: yard.common_tool(path, grid.coords, side, network),
        **{name: partial(ours, encoder) for name, encoder in encoders.items()},
    }
    seconds = {name: [] for name in contenders}
    features = {}
    torch.set_num_threads(n_threads())  # as PyTorch has it by default
    for repeat in range(repeats):
        for name in contenders if repeat % 2 == 0 else reversed(contenders):
            start = time.perf_counter()
            features[name] = contenders[name]()
            seconds[name].append((time.perf_counter() - start) / len(grid))
    torch.set_num_threads(1)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    exact = features["naive loop"]
    norms = np.linalg.norm(exact, axis=1)
    rows = {}
    for name, value in median.items():
        cosine = (features[name] * exact).sum(1) / np.linalg.norm(features[name], axis=1) / norms
        rows[name] = {
            "ms a tile": round(1e3 * value, 2),
            "times faster than the naive loop": round(median["naive loop"] / value, 2),
            "times faster than the common tool": round(median["common tool"] / value, 2),
            "least cosine": round(float(cosine.min()), 6),
            "median cosine": round(float(np.median(cosine)), 6),
        }
    return {"tiles": len(grid), "rows": rows}


def measure_growth(path: Path, queue: multiprocessing.Queue) -> None:
    """Seconds of HDMIL† and of HDMIL at a keep ratio of 0.3, overlapped as in use, and the peak memory."""
    setup()
    predictor = untrained_predictor(path)
    predictor.encoder(np.zeros((1, 256, 256, 3), np.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    whole = predictor.predict(path, prescreen=False)
    every = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    *_, last = predictor.anytime(path, max_tiles=max(1, round(0.3 * whole.n_tiles)))
    queue.put(
        {
            "tiles": whole.n_tiles,
            "HDMIL†, s": round(every, 2),
            "HDMIL, keep 0.30, s": round(time.perf_counter() - start, 2),
            "memory before, MB": round(before / 1024),
            "more at the peak, MB": round((peak - before) / 1024),
        }
    )


def growth(sides: Sequence[int]) -> list[dict[str, float]]:
    rows, spawn = [], multiprocessing.get_context("spawn")
    for side in sides:
        queue = spawn.Queue()
        process = spawn.Process(
            target=measure_growth, args=(large_slides("camelyon-mini", 1, side)[0], queue)
        )
        process.start()
        rows.append(queue.get())
        process.join()
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder that `hdmil train` wrote; default: untrained")
    parser.add_argument("--slides", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    setup()
    slides = large_slides("camelyon-mini", args.slides, SIDE)
    predictor = Predictor.load(args.model) if args.model else untrained_predictor(slides[0])
    timings = time_slides(predictor, slides, args.repeats, KEEP_RATIOS, progress=True)
    medians = stage_medians(timings)
    excess = (medians["time_ratio"] - medians["keep_ratio"]).drop("HDMIL†")
    print(to_markdown(table2(timings)))
    print(f"time ratio - keep ratio: at most {excess.max():.3f}, target {TOLERANCE}")
    result = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "encoder": f"{predictor.encoder.name}, {predictor.encoder.engine} {predictor.encoder.precision}",
        "load_average": round(os.getloadavg()[1], 1),
        "trained": args.model is not None,
        "slides": args.slides,
        "repeats": args.repeats,
        "tolerance": TOLERANCE,
        "worst_excess": round(float(excess.max()), 4),
        "methods": medians.round(4).to_dict(orient="index"),
        "yardsticks": yardsticks(large_slides("camelyon-mini", 1, YARDSTICK_SIDE)[0], args.repeats),
        "growth": growth(GROWTH_SIDES),
    }
    print(to_markdown(pd.DataFrame(result["yardsticks"]["rows"]).T))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
