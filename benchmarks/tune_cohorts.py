"""Measure how difficult a synthetic cohort is, for tiles and for bags, to tune the numbers of its preset.

    python benchmarks/tune_cohorts.py --preset camelyon-mini

The cohort is drawn and encoded in the cache, or taken from there. All scores are areas under the ROC curve
on held-out cases: for bags the mean over folds, for tiles pooled over folds.

- Tiles with tumor (>= 25 % of the tile by the truth mask) against tiles without: a linear model on the
  features of the encoder; color statistics (mean and standard deviation of R, G, B at 10x); the 16 x 16 patch
  at 1.25x. The last two use the better one of a linear model and gradient boosting, so that the controls are
  strong.
- Bags: mean pooling and gated attention on the features, gated attention on the color statistics.

The results go to `benchmarks/results/tuning_<preset>.json`, with the preset's numbers and the targets.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from hdmil_lib.bags import Bag, read_tile_labels
from hdmil_lib.cohort import Cohort
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.slides.reader import Slide
from hdmil_lib.synthetic.cohorts import prepare_cohort
from hdmil_lib.synthetic.presets import PRESETS
from hdmil_lib.training.crossval import cross_validate

RESULTS = Path(__file__).resolve().parent / "results"
TUMOR_SHARE = 0.25
"""Smallest share of tumor of a tile that counts as tumor."""

TARGETS = {
    "camelyon-mini": {
        "bag_mean": (0.60, 0.80),
        "bag_abmil": (0.88, 0.97),
        "bag_color": (0.0, 0.85),
        "tile_features": (0.85, 0.95),
        "tile_color": (0.0, 0.85),
        "tile_patch": (0.75, 0.85),
    },
    "nsclc-mini": {"bag_abmil": (0.85, 0.98)},
    "brca-mini": {"bag_abmil": (0.85, 0.98)},
}


def color_statistics(slide_path: Path, bag: Bag) -> np.ndarray:
    """Mean and standard deviation of R, G, B of each tile at 1 um/px, float32 (N, 6), 0 to 1."""
    with Slide(slide_path) as slide:
        tiles = (slide.read_field(int(x), int(y), (128, 128), 1.0) for x, y in bag.coords)
        pixels = ((tile / np.float32(255)).reshape(-1, 3) for tile in tiles)
        return np.stack([np.concatenate([p.mean(0), p.std(0)]) for p in pixels])


def patch_statistics(patches: np.ndarray) -> np.ndarray:
    """Color, contrast and graininess of 16 x 16 patches at several scales, float32 (N, 21)."""
    pixels = patches.astype(np.float32) / 255
    flat = pixels.reshape(len(pixels), -1, 3)
    coarse = pixels.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4)).reshape(-1, 16, 3)
    quantiles = np.quantile(flat, (0.1, 0.5, 0.9), axis=1).transpose(1, 0, 2).reshape(-1, 9)
    grain = np.abs(np.diff(pixels, axis=1)).mean((1, 2))
    return np.concatenate([flat.mean(1), flat.std(1), quantiles, grain, coarse.std(1)], axis=1)


def tile_auc(model, inputs: np.ndarray, tumor: np.ndarray, cases: np.ndarray, n_folds: int) -> float:
    """AUC of out-of-fold scores of tiles; no case is in both training and test."""
    scores = np.zeros(len(tumor))
    for train, test in GroupKFold(n_folds).split(inputs, tumor, cases):
        scores[test] = model.fit(inputs[train], tumor[train]).predict_proba(inputs[test])[:, 1]
    return float(roc_auc_score(tumor, scores))


def linear(regularization: float):
    model = LogisticRegression(C=regularization, max_iter=300, class_weight="balanced")
    return make_pipeline(StandardScaler(), model)


def boosted():
    return HistGradientBoostingClassifier(max_iter=80, learning_rate=0.08, max_leaf_nodes=15, random_state=0)


def tile_figures(cohort: Cohort, bags: dict[str, Bag], colors: dict[str, np.ndarray], n_folds: int) -> dict:
    """AUC of single tiles, for each kind of input."""
    names = cohort.slide_ids
    shares = np.concatenate([read_tile_labels(cohort.bag_path(name)) for name in names])
    case_of = dict(zip(cohort.table.slide_id, cohort.table.case_id, strict=True))
    cases = np.concatenate([np.full(len(bags[name].coords), case_of[name], dtype=object) for name in names])
    clear = (shares == 0) | (shares >= TUMOR_SHARE)
    tumor, cases = shares[clear] >= TUMOR_SHARE, cases[clear]

    def gather(arrays) -> np.ndarray:
        return np.concatenate(list(arrays))[clear].astype(np.float32)

    features = gather(bags[name].features for name in names)
    color = gather(colors[name] for name in names)
    patches = gather(bags[name].patches for name in names)
    trials = {
        "tile_features": [(linear(0.01), features)],
        "tile_color": [(linear(1.0), color), (boosted(), color)],
        "tile_patch": [
            (linear(0.001), patches.reshape(len(patches), -1)),
            (boosted(), patch_statistics(patches)),
        ],
    }
    figures = {
        key: max(tile_auc(model, inputs, tumor, cases, n_folds) for model, inputs in pairs)
        for key, pairs in trials.items()
    }
    return figures | {"tiles": len(shares), "tumor_tiles": int(tumor.sum())}


def bag_figures(
    cohort: Cohort, bags: dict[str, Bag], methods: dict[str, str], n_folds: int, seed: int
) -> dict:
    """Mean and standard deviation of the AUC of bags over folds; `methods` maps methods to score names."""
    recipe = RECIPES[cohort_name(cohort)]
    run = cross_validate(cohort, list(methods), folds=n_folds, recipe=recipe, seed=seed, bags=bags)
    table = run.predictions
    figures = {}
    for method, key in methods.items():
        folds = table[table.method == method].groupby("fold")
        aucs = [roc_auc_score(fold.label == fold.label.max(), fold.p_1) for _, fold in folds]
        figures |= {key: float(np.mean(aucs)), f"{key}_sd": float(np.std(aucs, ddof=1))}
    return figures


def cohort_name(cohort: Cohort) -> str:
    """Name of the preset from which a cohort in the cache was drawn."""
    return next(name for name in PRESETS if cohort.root.name.startswith(name))


def with_colors(bags: dict[str, Bag], colors: dict[str, np.ndarray]) -> dict[str, Bag]:
    """The same bags with standardized color statistics instead of features."""
    every = np.concatenate(list(colors.values()))
    mean, sd = every.mean(0), every.std(0)
    return {name: replace(bag, features=(colors[name] - mean) / sd) for name, bag in bags.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="camelyon-mini")
    parser.add_argument("--slides", type=int, help="number of slides; by default the preset's")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.perf_counter()
    cohort = prepare_cohort(args.preset, n_slides=args.slides)
    seconds = {"draw_and_encode": time.perf_counter() - start}
    bags = cohort.load_bags()
    start = time.perf_counter()
    names = tqdm(cohort.slide_ids, desc="colors", unit="slide")
    colors = {name: color_statistics(cohort.slide_path(name), bags[name]) for name in names}
    figures = tile_figures(cohort, bags, colors, args.folds)
    figures |= bag_figures(cohort, bags, {"mean": "bag_mean", "abmil": "bag_abmil"}, args.folds, args.seed)
    figures |= bag_figures(cohort, with_colors(bags, colors), {"abmil": "bag_color"}, args.folds, args.seed)
    seconds["measure"] = time.perf_counter() - start

    targets = TARGETS[args.preset]
    result = {
        "preset": asdict(PRESETS[args.preset]),
        "slides": len(cohort),
        "folds": args.folds,
        "seed": args.seed,
        "tumor_tile": f"tumor share >= {TUMOR_SHARE}; tiles between 0 and that are left out",
        "figures": {key: round(value, 4) for key, value in figures.items()},
        "targets": targets,
        "met": {key: low <= figures[key] <= high for key, (low, high) in targets.items()},
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
    }
    path = RESULTS / f"tuning_{args.preset}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    for key, value in figures.items():
        print(f"{key:16s} {value:.3f}  {targets.get(key, '')}")
    print(path)


if __name__ == "__main__":
    main()
