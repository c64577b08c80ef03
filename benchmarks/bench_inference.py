"""Does pre-screening save the time that it promises, and how fast is a slide beside the usual pipelines?

    python benchmarks/bench_inference.py [--model DIR] [--repeats N] [--sides N ...]

Draws large synthetic slides once (in the cache) and writes `benchmarks/results/inference.json`:

- Slides of rising size, each in a process of its own: Table 2, that is HDMIL† and HDMIL in turns, seconds by
  stage one after the other; HDMIL† with reading beside the encoder, as in use; and the peak memory. For each
  share of tiles read the share of time spent is to exceed it by 0.05 at most.
- Yardsticks: seconds per tile, on a smaller slide that stores the scale of its tiles, of a naive loop and of
  the pipeline of a common tool (see `yardsticks.py`; from given coordinates to features), and of ours (from
  the file to the prediction), in turns; with the smallest cosine of the features to the naive loop's.

Without `--model` the networks are those of `held_out.predictors`, trained where they are not yet.
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import held_out
import numpy as np
import pandas as pd
import torch
import yardsticks as yard
from tqdm import tqdm

from hdmil_lib.config import n_threads, setup
from hdmil_lib.encoders.encoding import encode_tiles
from hdmil_lib.encoders.extraction import spread_tiles
from hdmil_lib.encoders.loading import ENCODERS, Encoder, load_encoder
from hdmil_lib.encoders.networks import build_network
from hdmil_lib.models import HDMIL
from hdmil_lib.reproduce.tables import to_markdown
from hdmil_lib.reproduce.timing import stage_medians, time_slides, with_keep_ratio
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.synthetic.cohorts import large_slides

RESULTS = Path(__file__).resolve().parent / "results" / "inference.json"
COHORT = held_out.COHORT
KEEP_RATIO, TOLERANCE = 0.3, 0.05
SIDES = (8_192, 16_384, 24_576, 32_768, 49_152)
YARDSTICK_SIDE = 8_192


def peak_memory_mb(reset: bool = False) -> float:
    """The most memory that this process held since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_slide(path: Path, model: Path, repeats: int) -> dict[str, Any]:
    """One slide in this process alone: seconds by stage, seconds as in use, memory."""
    setup()
    trained = HDMIL.from_pretrained(model)
    trained.encoder(np.zeros((32, 256, 256, 3), np.uint8))
    path.read_bytes()
    before = peak_memory_mb(reset=True)
    start = time.perf_counter()
    n_tiles = trained.predict(path, all_tiles=True).n_tiles
    in_use = time.perf_counter() - start
    peak = peak_memory_mb()
    medians = stage_medians(time_slides(trained, [path], repeats, (KEEP_RATIO,)))
    dagger, screened = medians.loc["HDMIL†"], medians.loc["HDMIL"]
    return {
        "tiles": n_tiles,
        "repeats": repeats,
        "table": medians.round(4).to_dict(orient="index"),
        "worst excess": round(float((medians["time_ratio"] - medians["keep_ratio"]).iloc[1:].max()), 4),
        "LIPN stage, share of HDMIL†": round(
            float(screened[["thumbnail", "lipn"]].sum() / dagger["total"]), 4
        ),
        "HDMIL† in use, s": round(in_use, 2),
        "memory before, MB": round(before),
        "more at the peak, MB": round(peak - before),
    }


def in_a_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function where nothing has run before, so that neither memory nor threads are another's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def growth(sides: Sequence[int], model: Path, repeats: int) -> dict[str, Any]:
    """All slides, and straight lines through what they cost."""
    rows = []
    for side in tqdm(sides, desc="slides of rising size"):
        path = large_slides(COHORT, 1, side)[0]
        rows.append(in_a_process(measure_slide, path, model, repeats))
        print(json.dumps(rows[-1], indent=1, ensure_ascii=False), flush=True)
    tiles = [row["tiles"] for row in rows]
    seconds, memory = ([row[key] for row in rows] for key in ("HDMIL† in use, s", "more at the peak, MB"))
    return {
        "slides": rows,
        "HDMIL† in use, ms a further tile": round(1e3 * float(np.polyfit(tiles, seconds, 1)[0]), 2),
        "exponent of time in tiles": round(float(np.polyfit(np.log(tiles), np.log(seconds), 1)[0]), 3),
        "memory, bytes a further tile": round(2**20 * float(np.polyfit(tiles, memory, 1)[0])),
    }


def yardsticks(path: Path, model: Path, repeats: int) -> dict[str, Any]:
    """Seconds per tile of the slide, medians of turns."""
    setup()
    network = build_network(ENCODERS["efficientnet_lite0"]).backbone
    with Slide(path) as slide:
        grid = TileGrid.from_slide(slide)
    assert grid.tile_size_level0 == (yard.TILE, yard.TILE)
    seen = spread_tiles([path])
    encoders = {p: load_encoder(precision=p, int8_tiles=seen) for p in ("fp32", "int8")}
    ours = {precision: HDMIL.from_pretrained(model) for precision in encoders}
    for precision, encoder in encoders.items():
        ours[precision].encoder = encoder

    def features_of(encoder: Encoder) -> np.ndarray:
        with Slide(path) as slide:
            return encode_tiles(slide, grid, range(len(grid)), encoder)

    contenders: dict[str, Callable[[], Any]] = {
        "naive loop": lambda: yard.naive_loop(path, grid.coords, network),
        "common tool": lambda: yard.common_tool(path, grid.coords, network),
    }
    for precision, contender in ours.items():
        fewer = with_keep_ratio(contender, path, KEEP_RATIO)
        contenders[f"HDMIL†, {precision}"] = lambda p=contender: p.predict(path, all_tiles=True)
        contenders[f"HDMIL, keep {KEEP_RATIO:.2f}, {precision}"] = lambda p=fewer: p.predict(path)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    exact = np.empty(0)
    torch.set_num_threads(n_threads())  # as PyTorch has it by default
    for repeat in range(repeats):
        for name in contenders if repeat % 2 == 0 else reversed(contenders):
            start = time.perf_counter()
            result = contenders[name]()
            seconds[name].append((time.perf_counter() - start) / len(grid))
            exact = result if name == "naive loop" else exact
    torch.set_num_threads(1)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    rows = {
        name: {
            "ms per tile": round(1e3 * value, 2),
            "times faster than the naive loop": round(median["naive loop"] / value, 2),
            "times faster than the common tool": round(median["common tool"] / value, 2),
        }
        for name, value in median.items()
    }
    norms = np.linalg.norm(exact, axis=1)
    for precision, encoder in encoders.items():
        features = features_of(encoder)
        cosine = (features * exact).sum(1) / np.linalg.norm(features, axis=1) / norms
        rows[f"HDMIL†, {precision}"] |= {
            "least cosine": round(float(cosine.min()), 6),
            "median cosine": round(float(np.median(cosine)), 6),
        }
    return {"tiles": len(grid), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder that `hdmil train` wrote; default: trained here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="pixels of the slides")
    args = parser.parse_args()

    setup()
    model = args.model or RESULTS.parents[2] / "build" / "bench_inference"
    if args.model is None:
        held_out.trained_models()["hdmil_evidence"].save_pretrained(model)
    slide = large_slides(COHORT, 1, YARDSTICK_SIDE, mpp=0.5)[0]
    encoder = load_encoder()
    result = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "encoder": f"{encoder.name}, {encoder.engine} {encoder.precision}",
        "load_average": round(os.getloadavg()[1], 1),
        "tolerance": TOLERANCE,
        "yardsticks": in_a_process(yardsticks, slide, model, args.repeats),
    }
    print(to_markdown(pd.DataFrame(result["yardsticks"]["rows"]).T), flush=True)
    result["growth"] = growth(args.sides, model, args.repeats)
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
