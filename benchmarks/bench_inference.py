"""Does pre-screening save the time that it promises? HDMIL against HDMIL† on the same slides in one run.

    python benchmarks/bench_inference.py [--model DIR] [--slides N] [--repeats N]

Draws large synthetic slides once (in the cache), times both methods in turns, and writes
`benchmarks/results/inference.json`: seconds a slide by stage, and for each share of tiles read the
share of time spent, which is to exceed it by 0.05 at most. Without `--model` the networks are
untrained: what a tile costs does not depend on their weights.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import torch

from hdmil_lib.config import setup
from hdmil_lib.data import large_slides
from hdmil_lib.evaluation.tables import table2, to_markdown
from hdmil_lib.evaluation.timing import stage_medians, time_slides
from hdmil_lib.features.encoders import load_encoder
from hdmil_lib.inference import ModelConfig, Predictor
from hdmil_lib.models import DMIN, LIPN, DMINSettings
from hdmil_lib.slides import Slide, TileGrid

RESULTS = Path(__file__).resolve().parent / "results" / "inference.json"
KEEP_RATIOS = (0.3,)
TOLERANCE = 0.05
SIDE = 16_384


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
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
