"""Is a cascade ever worse than random tiles? On drawn and composed cohorts, at three shares of the tiles.

    python benchmarks/against_chance.py [--tiles DIR ...] [--seeds 2] [--only NAME ...]

On each cohort and fold a DMIN, a LIPN that learns evidence and a cascade are trained. The cascade falls back
to random tiles where it is no better on the validation slides. On the test slides it is compared with as many
random tiles of each slide. Drawn cohorts have three folds, composed cohorts an official split whose parts
share no tile. Cohorts that are not at hand keep their rows in `benchmarks/results/against_chance.json`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdmil_lib.batches import BagDataset
from hdmil_lib.cohort import Cohort
from hdmil_lib.config import setup
from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import DMIN
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.synthetic.cohorts import prepare_cohort
from hdmil_lib.synthetic.composed import collection_in, compose_cohort
from hdmil_lib.training.cascade import CascadeSettings, fit_cascade
from hdmil_lib.training.crossval import cross_validate
from hdmil_lib.training.lipn import predict_screened

RESULTS = Path(__file__).resolve().parent / "results" / "against_chance.json"
KEEP_RATIOS = (0.6, 0.3, 0.1)
DRAWN = {"camelyon-mini": (32, 64, 128), "nsclc-mini": (32, 64, 128), "brca-mini": (64,)}
"""Drawn cohorts with the looks that their bags have; one of 64 pixels is used."""

FOLDS, N_DRAWS = 3, 16


@torch.inference_mode()
def random_logits(dmin: DMIN, data: BagDataset, slide_ids: list[str], shares: Tensor, seed: int) -> Tensor:
    """Logits of DMIN on so many random tiles of each slide, (S, C)."""
    generator, logits = torch.Generator().manual_seed(seed), []
    for slide_id, share in zip(slide_ids, shares.tolist(), strict=True):
        features = data.batch([slide_id]).features
        rows = torch.randperm(len(features), generator=generator)[: max(1, round(share * len(features)))]
        logits.append(dmin(features, Segments([len(rows)]), rows=rows).logits)
    return torch.cat(logits)


def compare(cohort: Cohort, recipe: str, seeds: int) -> dict:
    """AUC of the cascade and of random tiles on each fold and seed, by keep ratio."""
    bags = cohort.load_bags()
    data, found = BagDataset(bags, cohort.label_of), {ratio: [] for ratio in KEEP_RATIOS}
    for seed in range(seeds):
        methods = ["hdmil_dagger", "hdmil_evidence"]
        cv = cross_validate(cohort, methods, folds=FOLDS, seed=seed, recipe=RECIPES[recipe], bags=bags)
        for fold, split in enumerate(cv.splits):
            base, test = cv.hdmil(fold, "hdmil_evidence"), sorted(split.test)
            truth = np.array([cohort.label_of[slide_id] for slide_id in test])

            def score(logits: Tensor, truth: np.ndarray = truth) -> float:
                return auc(truth, logits.double().softmax(1).numpy())

            for ratio in KEEP_RATIOS:
                settings = CascadeSettings(keep_ratio=ratio, first=max(ratio, 0.6))
                folder = cv.folder / "against_chance" / f"fold{fold}" / f"keep{ratio}"
                model = fit_cascade(base.dmin, base.lipn, data, split, settings, out=folder)
                logits, shares = predict_screened(model, data, test)
                drawn = [score(random_logits(base.dmin, data, test, shares, k)) for k in range(N_DRAWS)]
                found[ratio].append(
                    {
                        "seed": seed,
                        "fold": fold,
                        "screening": model.screening,
                        "tiles read": round(float(shares.mean()), 4),
                        "cascade": round(score(logits), 4),
                        "random": round(float(np.mean(drawn)), 4),
                    }
                )
                print(cohort.root.name, ratio, found[ratio][-1], flush=True)
    return {str(ratio): summary(rows) for ratio, rows in found.items()}


def summary(rows: list[dict]) -> dict:
    """Mean lead of the cascade over random tiles in AUC with its standard error, and all rows."""
    leads = np.array([row["cascade"] - row["random"] for row in rows])
    error = float(leads.std(ddof=1) / np.sqrt(len(leads))) if len(leads) > 1 else float("nan")
    return {"lead": round(float(leads.mean()), 4), "standard error": round(error, 4), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=Path, nargs="*", default=[], help="folders of labeled tiles")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--composed-seed", type=int, default=2, help="seed of the composed slides")
    parser.add_argument("--only", nargs="*", help="drawn cohorts; by default all")
    given = parser.parse_args()
    setup()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, looks in DRAWN.items():
        if given.only is None or name in given.only:
            found[name] = compare(prepare_cohort(name, looks=looks), name, given.seeds)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for tiles in given.tiles:
        name = collection_in(tiles).name
        n_slides = 480 if name.startswith("camelyon") else 300
        cohort = compose_cohort(tiles, n_slides=n_slides, seed=given.composed_seed, looks=[64])
        found[name] = compare(cohort, name, given.seeds + 1)  # one fold only
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
