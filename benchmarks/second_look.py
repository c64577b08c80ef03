"""Which look finds the tiles that DMIN needs: LIPN at 8 um/px, or the encoder at 4, 2 or 1 um/px?

    python benchmarks/second_look.py [--pcam DIR] [--lc25000 DIR] [--seeds N] [--scratch]

On each cohort and for each seed one DMIN is trained, and networks that rank tiles learn from it: LIPN from
its masks, as published, and from its evidence, and second looks of several sides from its evidence. "8 um/px,
encoder" is the second look on LIPN's own patches, enlarged to 64 pixels: it has the pretrained features and
not the scale. With `--scratch` a small convolutional network learns from the pixels of the look at 2 um/px:
it has the scale and not the pretrained features. Second looks learn which of two tiles of a slide has more
evidence; "amounts" learns how much each has. "second round" learns from the evidence of a DMIN that was
fine-tuned on the fifth of the tiles that the first look chose.

DMIN then reads the highest tiles of each test slide, the same share of every slide. The test slides serve no
choice: epochs are chosen on validation slides. On drawn cohorts three folds are averaged, composed cohorts
have a test part whose tiles occur in no other slide. Cohorts and networks that are left out keep their rows
in `benchmarks/results/second_look.json`.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hdmil_lib.bags import Bag
from hdmil_lib.batches import BagBatch, BagDataset
from hdmil_lib.cohort import Cohort
from hdmil_lib.config import setup
from hdmil_lib.encoders.loading import load_encoder
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import DMIN, HDMIL, LIPN, LossTerms, SecondLook
from hdmil_lib.reproduce.keep_ratio import (
    attention_scores,
    lipn_scores,
    n_kept,
    place_in_bag,
    score_rankings,
    tile_tumor_shares,
)
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.splits import Split
from hdmil_lib.storage import weights_digest
from hdmil_lib.synthetic.cohorts import prepare_cohort
from hdmil_lib.synthetic.composed import compose_cohort
from hdmil_lib.training.crossval import cross_validate
from hdmil_lib.training.fit import TrainSettings, optimize
from hdmil_lib.training.lipn import evidence_loss, evidence_targets, fit_lipn
from hdmil_lib.training.look import KEEP_RATIO, LOOK_TRAINING, LookLearning, fit_look

RESULTS = Path(__file__).resolve().parent / "results" / "second_look.json"
KEEP_RATIOS = (1.0, 0.6, 0.3, 0.1, 0.05)
SIDES = {32: "look, 4 um/px", 64: "look, 2 um/px", 128: "look, 1 um/px"}
PATCHES = 16
"""Stands for the second look on LIPN's patches among the looks of a bag."""

LIPN_TRAINING = TrainSettings(1e-3, epochs=12, min_epochs=12)
FOLDS = 3
FIRST = (0.6, 0.3)
"""Shares of the tiles that LIPN lets through to a second look."""


def with_patches(bags: Mapping[str, Bag]) -> dict[str, Bag]:
    """Bags with the features of their patches, enlarged to 64 pixels, as one more look."""
    encoder = load_encoder().at(64)
    answer = {}
    for slide_id, bag in tqdm(bags.items(), desc="patches"):
        enlarged = [cv2.resize(p, (64, 64), interpolation=cv2.INTER_CUBIC) for p in bag.known_patches]
        answer[slide_id] = replace(
            bag, looks={**bag.looks, PATCHES: encoder(np.stack(enlarged)).astype("f2")}
        )
    return answer


@torch.inference_mode()
def look_scores(look: SecondLook, data: BagDataset, slide_ids: Iterable[str]) -> Tensor:
    """The look's logit of each tile of these slides (N,)."""
    return torch.cat([look(data.batch([slide_id]).look(look.side)) for slide_id in slide_ids])


def rankings(
    dmin: DMIN,
    data: BagDataset,
    split: Split,
    seed: int,
    pixels: Mapping[str, Tensor] | None,
    folder: Path,
) -> dict[str, Tensor]:
    """Scores of the tiles of the test slides by what gives them; trained networks stay in the folder."""
    scores = {"DMIN's attention": attention_scores(dmin, data, split.test)}
    for name, options in (
        ("LIPN, masks as published", {"target": "mask"}),
        ("LIPN, evidence", {"target": "evidence", "augment": True}),
    ):
        torch.manual_seed(seed)
        lipn = LIPN(dmin.n_classes)
        out = folder / f"lipn_{options['target']}"
        fit_lipn(lipn, dmin, data, split, replace(LIPN_TRAINING, seed=seed), out=out, **options)
        scores[name] = lipn_scores(HDMIL(dmin, lipn), data, split.test)
    for side, name in ({PATCHES: "8 um/px, encoder"} | SIDES).items():
        torch.manual_seed(seed)
        look = SecondLook(data.dim, side)
        fit_look(look, dmin, data, split, replace(LOOK_TRAINING, seed=seed), out=folder / f"look{side}")
        scores[name] = look_scores(look, data, split.test)
    looks: dict[str, LookLearning]
    looks = {"amounts": AmountLearning(SecondLook(data.dim, 64), dmin, data, split.train)}
    looks["second round"] = second_round(dmin, data, split, seed, folder)
    for name, objective in looks.items():
        torch.manual_seed(seed)
        objective.look.standardize([data.batch(split.train).look(64)])
        settings = replace(LOOK_TRAINING, seed=seed)
        config = {"what": name, "dmin": weights_digest(objective.dmin), "settings": asdict(settings)}
        optimize(objective, data, split, settings, out=folder / name, config=config)
        scores[f"{SIDES[64]}, {name}"] = look_scores(objective.look, data, split.test)
    segments = Segments([data.length(slide_id) for slide_id in split.test])
    for side in (64, 128):
        coarse, fine = scores["LIPN, evidence"], scores[SIDES[side]]
        for share in FIRST:
            shown = place_in_bag(coarse, segments) < n_kept(segments, share)[segments.bag]
            scores[f"LIPN keeps {share}, then {SIDES[side]}"] = torch.where(shown, fine, coarse - 1e3)
        scores[f"LIPN and {SIDES[side]}, sum"] = standard(coarse) + standard(fine)
    if pixels is not None:
        scores["2 um/px, from scratch"] = from_scratch(dmin, data, split, seed, pixels)
    return scores


class AmountLearning(LookLearning):
    """The look learns the evidence of each tile, as LIPN does."""

    def loss(self, batch: BagBatch) -> LossTerms:
        logits = self.look(batch.look(self.look.side))
        target = torch.cat([self.targets[slide_id] for slide_id in batch.slide_ids])
        return evidence_loss(logits[:, None], target, batch.segments)


def second_round(dmin: DMIN, data: BagDataset, split: Split, seed: int, folder: Path) -> LookLearning:
    """A new look, and a DMIN that first learned a little more from the tiles that the first look chose."""
    first = SecondLook(data.dim, 64)
    first.load_state_dict(load_file(folder / "look64" / "model.safetensors"))
    learned = deepcopy(dmin)
    optimizer = torch.optim.Adam(learned.parameters(), 1e-4, weight_decay=1e-4)
    torch.manual_seed(seed)
    for _ in range(3):
        for place in torch.randperm(len(split.train)).tolist():
            batch = data.batch([split.train[place]])
            scores = first.eval()(batch.look(64)).detach()
            rows, segments = batch.segments.select(scores >= scores.quantile(1 - KEEP_RATIO))
            output = learned.train()(batch.features, segments, rows=rows)
            loss = sum(learned.loss(output, batch.labels).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return LookLearning(SecondLook(data.dim, 64), learned.eval(), data, split.train)


def standard(scores: Tensor) -> Tensor:
    """Scores with mean 0 and standard deviation 1."""
    return (scores - scores.mean()) / scores.std()


def look_pixels(cohort: Cohort) -> dict[str, Tensor]:
    """Images of all tiles at 2 um/px, uint8 (N, 3, 64, 64), by slide_id."""
    pixels = {}
    for slide_id, path in tqdm(zip(cohort.slide_ids, cohort.table["path"], strict=True), total=len(cohort)):
        with Slide(cohort.root / path) as slide:
            grid = TileGrid.from_slide(slide).at(64)
            tiles = np.stack([grid.read_tile(slide, row) for row in range(len(grid))])
        pixels[slide_id] = torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()
    return pixels


def from_scratch(
    dmin: DMIN, data: BagDataset, split: Split, seed: int, pixels: Mapping[str, Tensor], epochs: int = 10
) -> Tensor:
    """Scores of a small convolutional network that learns the evidence from pixels (N,)."""
    torch.manual_seed(seed)
    widths = (3, 16, 32, 64, 96)
    layers = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in zip(widths, widths[1:], strict=False)
    ]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1))
    targets = evidence_targets(dmin, data, split.train)
    images = torch.cat([pixels[slide_id] for slide_id in split.train])
    wanted = torch.cat([targets[slide_id] for slide_id in split.train])
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=1e-5)
    for _ in tqdm(range(epochs), desc="from scratch", leave=False):
        for rows in torch.randperm(len(images)).split(256):
            x = images[rows].float() / 255
            x = x.flip(2) if torch.rand(()) < 0.5 else x
            x = x.transpose(2, 3) if torch.rand(()) < 0.5 else x
            loss = nn.functional.binary_cross_entropy_with_logits(network(x)[:, 0], wanted[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.inference_mode():
        return torch.cat([network(pixels[slide_id].float() / 255)[:, 0] for slide_id in split.test])


def scores_of(name: str, cohort: Cohort, recipe: str, seeds: int, scratch: bool) -> pd.DataFrame:
    """AUC and tumor recall by seed, fold, source and keep ratio, on test slides."""
    bags = with_patches(cohort.load_bags())
    data = BagDataset(bags, cohort.label_of)
    pixels = look_pixels(cohort) if scratch else None
    tables = []
    for seed in range(seeds):
        cv = cross_validate(
            cohort, ["hdmil_dagger"], folds=FOLDS, seed=seed, recipe=RECIPES[recipe], bags=bags, workers=2
        )
        for fold, split in enumerate(cv.splits):
            dmin = cv.classifier("hdmil_dagger", fold)
            table = score_rankings(
                dmin,
                data,
                split.test,
                rankings(dmin, data, split, seed, pixels, cv.folder / "second_look" / f"fold{fold}"),
                tile_tumor_shares(cohort, split.test),
                keep_ratios=KEEP_RATIOS,
                n_draws=8,
                generator=torch.Generator().manual_seed(seed),
            )
            tables.append(table.assign(seed=seed, fold=fold))
            shown = table.pivot_table(index="source", columns="keep_ratio", values="auc", sort=False)
            print(f"{name}, seed {seed}, fold {fold}", shown.round(3).to_string(), sep="\n", flush=True)
    return pd.concat(tables)


def summary(scores: pd.DataFrame) -> dict[str, dict[str, dict[str, list[float] | float]]]:
    """By source and keep ratio: AUC of each seed (mean over folds), and mean tumor recall."""
    auc = scores.groupby(["source", "keep_ratio", "seed"], sort=False)["auc"].mean()
    recall = scores.groupby(["source", "keep_ratio"], sort=False)["tumor_recall"].mean()
    return {
        source: {
            str(ratio): {
                "auc by seed": [round(float(v), 4) for v in auc[source, ratio]],
                "tumor recall": round(float(recall[source, ratio]), 4),
            }
            for ratio in KEEP_RATIOS
        }
        for source in scores["source"].unique()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pcam", type=Path, help="folder of PatchCamelyon tiles")
    parser.add_argument("--lc25000", type=Path, help="folder of LC25000 lung tiles")
    parser.add_argument("--drawn", nargs="*", default=["camelyon-mini", "nsclc-mini"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scratch", action="store_true")
    given = parser.parse_args()
    setup()
    looks = sorted(SIDES)
    cohorts = {name: (lambda name=name: prepare_cohort(name, looks=looks), name) for name in given.drawn}
    if given.pcam:
        cohorts["composed, lymph node"] = (
            lambda: compose_cohort(given.pcam, n_slides=480, looks=looks),
            "camelyon-mini",
        )
    if given.lc25000:
        cohorts["composed, lung"] = (
            lambda: compose_cohort(given.lc25000, n_slides=300, looks=looks),
            "nsclc-mini",
        )
    for name, (make, recipe) in cohorts.items():
        cohort = make()
        scores = scores_of(name, cohort, recipe, given.seeds, given.scratch)
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        sources = results.get(name, {}).get("sources", {}) | summary(scores)
        results[name] = {"slides": len(cohort), "seeds": given.seeds, "sources": sources}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
