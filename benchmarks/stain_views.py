"""Does it help to encode training slides in other stains too? Needs the tiles of PatchCamelyon.

    python benchmarks/stain_views.py --tiles DIR [--views 2] [--seeds 3]

Slides are composed as in `tools/tune_composed.py` (composition 0, which no reported score has seen). Each
training slide is encoded again in other stains: its tiles are split into hematoxylin, eosin and a rest by
color deconvolution. Each part is scaled and shifted by random numbers that all tiles of the slide share,
and the parts are put together again. HDMIL† and gated ABMIL are trained with their tuned recipes on the
slides alone, and on the slide or one of its views, drawn anew at each step. Validation slides stay as they
are. The lowest validation loss and its AUC go to `benchmarks/results/stain_views.json`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tqdm.auto import tqdm

from hdmil_lib.bags import Bag
from hdmil_lib.batches import BagBatch, BagDataset
from hdmil_lib.cohort import Cohort, column_split
from hdmil_lib.config import setup
from hdmil_lib.encoders.loading import Encoder, load_encoder
from hdmil_lib.models import create_model
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.splits import Split
from hdmil_lib.synthetic.composed import compose_cohort
from hdmil_lib.training.fit import fit

RESULTS = Path(__file__).resolve().parent / "results" / "stain_views.json"
COMPOSITION, SIDE = 0, 64
SYSTEMS = {"abmil": "ABMIL, gated", "dmin": "HDMIL†"}
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical densities of hematoxylin, eosin and a rest (Ruifrok and Johnston 2001), one row each."""

SCALE, SHIFT = 0.25, 0.02
"""Largest change of an amount of stain, relative and absolute."""

LENGTH = {"epochs": 25, "min_epochs": 15, "patience": 5}
BATCH = 32


def jitter(tiles: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Tiles uint8 (n, h, w, 3) whose amounts of the three stains are scaled and shifted."""
    directions = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    change = np.linalg.inv(directions) @ np.diag(scale) @ directions
    density = -np.log((tiles.astype(np.float32) + 1) / 256)
    density = density @ change.astype(np.float32) + (shift @ directions).astype(np.float32)
    return np.clip(np.rint(256 * np.exp(-density) - 1), 0, 255).astype(np.uint8)


def views_of(cohort: Cohort, slide_ids: list[str], n_views: int, encoder: Encoder) -> dict[str, Bag]:
    """Bags of the same tiles in other stains, named `<slide_id>#<view>`."""
    bags, path_of = cohort.load_bags(), dict(zip(cohort.slide_ids, cohort.table["path"], strict=True))
    rng, answer = np.random.default_rng(0), {}
    for slide_id in tqdm(slide_ids, desc="views"):
        bag = bags[slide_id]
        with Slide(cohort.root / path_of[slide_id]) as slide:
            grid = TileGrid.from_slide(slide)
            tiles = np.stack([grid.read_tile(slide, row) for row in range(len(grid))])
        assert np.array_equal(grid.coords, bag.coords)
        for view in range(n_views):
            scale, shift = 1 + rng.uniform(-SCALE, SCALE, 3), rng.uniform(-SHIFT, SHIFT, 3)
            blocks = np.array_split(tiles, -(-len(tiles) // BATCH))
            parts = [encoder(jitter(block, scale, shift)) for block in blocks]
            name = f"{slide_id}#{view}"
            answer[name] = replace(bag, slide_id=name, features=np.concatenate(parts).astype("f2"))
    return answer


class WithViews(BagDataset):
    """Bags that have views, `<slide_id>#<k>`; a batch holds one of them or the bag itself, at random."""

    n_views = 0

    def batch(self, slide_ids: Sequence[str]) -> BagBatch:
        drawn = torch.randint(-1, self.n_views, (len(slide_ids),)).tolist()
        names = [f"{slide_id}#{view}" for slide_id, view in zip(slide_ids, drawn, strict=True)]
        batch = super().batch([n if n in self.names else s for s, n in zip(slide_ids, names, strict=True)])
        return replace(batch, slide_ids=tuple(slide_ids))

    @property
    def names(self) -> set[str]:
        return set(self._span)


def train(system: str, data: BagDataset, split: Split, seed: int) -> tuple[float, float]:
    """Lowest validation loss and its AUC."""
    recipe = RECIPES["camelyon-pcam"]
    torch.manual_seed(seed)
    options = {"in_dim": data.dim, "n_classes": 2, **recipe.models.get(system, {})}
    network = create_model(name=system, **options)
    settings = replace(recipe.training_of(system), seed=seed, **LENGTH)
    with TemporaryDirectory() as folder:
        history = fit(network, data, split, settings, out=Path(folder) / "run", device="cpu")
    best = history.loc[history["val_loss"].idxmin()]
    return float(best["val_loss"]), float(best["val_auc"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=Path, required=True)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    setup()
    cohort = compose_cohort(given.tiles, n_slides=480, seed=COMPOSITION, looks=[SIDE])
    split = column_split(cohort)
    views = views_of(cohort, list(split.train), given.views, load_encoder())
    bags = {**cohort.load_bags(), **views}
    labels = cohort.label_of | {name: cohort.label_of[name.partition("#")[0]] for name in views}
    with_views = WithViews(bags, labels)
    with_views.n_views = given.views
    kinds = {"slides": BagDataset(cohort.load_bags(), cohort.label_of), "slides and views": with_views}
    results = {}
    for system, title in SYSTEMS.items():
        for kind, data in kinds.items():
            found = [train(system, data, split, seed) for seed in range(given.seeds)]
            losses, aucs = ([round(v, 4) for v in values] for values in zip(*found, strict=True))
            results[f"{title}, {kind}"] = {"validation loss": losses, "validation AUC": aucs}
            print(title, kind, np.mean(losses).round(4), np.mean(aucs).round(4), flush=True)
    content = {"views": given.views, "seeds": given.seeds, "systems": results}
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
