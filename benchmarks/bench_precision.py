"""What do fewer bits cost? The default encoder on the CPU in fp32, bf16 and int8.

    python benchmarks/bench_precision.py

Every tile of the cohort camelyon-mini (synthetic) is read once and encoded by all of them, block by block in
turns; DMIN of the fold that did not train on a slide says what becomes of it. The ranges of int8 come from 96
tiles of four slides of a training part. `benchmarks/results/precision.json` gets milliseconds per tile, the
cosine of the features with those of fp32, and AUC, mean and standard deviation over folds.
"""

import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hdmil_lib.config import setup
from hdmil_lib.encoders.extraction import spread_tiles
from hdmil_lib.encoders.loading import load_encoder
from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.synthetic.cohorts import prepare_cohort
from hdmil_lib.training.crossval import cross_validate

RESULTS = Path(__file__).resolve().parent / "results" / "precision.json"
COHORT, FOLDS, METHOD = "camelyon-mini", 5, "hdmil_dagger"


def main() -> None:
    setup()
    cohort = prepare_cohort(COHORT)
    cv = cross_validate(cohort, [METHOD], folds=FOLDS, seed=0, recipe=RECIPES[COHORT])
    labels, splits = cohort.label_of, cv.splits

    seen = spread_tiles([cohort.slide_path(s) for s in splits[0].train[:4]])
    encoders = {p: load_encoder(device="cpu", precision=p, int8_tiles=seen) for p in ("fp32", "bf16", "int8")}
    for encoder in encoders.values():
        encoder(seen[:8])
    seconds, cosines = dict.fromkeys(encoders, 0.0), {name: [] for name in encoders}
    aucs, n_tiles = {name: [] for name in encoders}, 0
    bar = tqdm(total=len(cohort), desc="slides")
    for fold, split in enumerate(splits):
        dmin = cv.classifier(METHOD, fold)
        said = {name: [] for name in encoders}
        for turn, slide_id in enumerate(split.test):
            with Slide(cohort.slide_path(slide_id)) as slide:
                grid = TileGrid.from_slide(slide)
                tiles = np.stack([grid.read_tile(slide, i) for i in range(len(grid))])
            n_tiles += len(tiles)
            features = {}
            for name in encoders if turn % 2 == 0 else reversed(encoders):
                start = time.perf_counter()
                features[name] = encoders[name](tiles)
                seconds[name] += time.perf_counter() - start
            norms = {name: np.linalg.norm(f, axis=1) for name, f in features.items()}
            for name, values in features.items():
                cosines[name].append((values * features["fp32"]).sum(1) / norms[name] / norms["fp32"])
                with torch.inference_mode():
                    half = torch.from_numpy(values).half().float()  # as bags hold them
                    said[name].append(dmin(half).probabilities[0].numpy())
            bar.update()
        for name, probabilities in said.items():
            aucs[name].append(100 * auc([labels[s] for s in split.test], np.stack(probabilities)))
    result = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "amx": bool(torch.cpu.get_capabilities().get("amx_bf16")),
        "encoder": repr(encoders["fp32"]),
        "slides": len(cohort),
        "tiles": n_tiles,
        "precisions": {
            name: {
                "ms per tile": round(1e3 * seconds[name] / n_tiles, 2),
                "times faster than fp32": round(seconds["fp32"] / seconds[name], 2),
                "least cosine": round(float(np.concatenate(cosines[name]).min()), 5),
                "median cosine": round(float(np.median(np.concatenate(cosines[name]))), 5),
                "AUC": f"{np.mean(aucs[name]):.2f} ({np.std(aucs[name], ddof=1):.2f})",
                "AUC minus fp32, by fold": np.subtract(aucs[name], aucs["fp32"]).round(2).tolist(),
            }
            for name in encoders
        },
    }
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
