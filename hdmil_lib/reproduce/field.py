"""Fast methods of others, rebuilt from their papers in the simplest form, on the same bags and split.

All three see every tile at 2 um/px first, by the looks of the bags. Their authors use other encoders and
larger models, so the rows compare ideas, not products.

- EAGLE (Neidlinger et al., arXiv 2502.13027): attention at 2 um/px chooses 25 tiles; their mean is
  classified.
- LRMIL (Shin and Jeong, arXiv 2606.06864): only low resolution. Its distillations are left out.
- PathCTM (Ge et al., arXiv 2605.19491): reads on until the prediction is confident, with no guarantee. Tiles
  come in the order of attention at 2 um/px, DMIN predicts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdmil_lib.bags import Bag
from hdmil_lib.batches import BagDataset
from hdmil_lib.errors import BagError
from hdmil_lib.models import ABMIL, DMIN, MeanPooling, MILModel
from hdmil_lib.splits import Split
from hdmil_lib.training.fit import TrainSettings, fit, predict_slides

LOW_RESOLUTION = "Low resolution only, ABMIL at 2 um/px (after LRMIL)"
TOP_TILES = "Mean of 25 tiles by attention at 2 um/px (after EAGLE)"
UNTIL_SURE = "Tiles until 95 % confidence (after PathCTM)"


@dataclass(frozen=True, eq=False)
class FieldRow:
    """Predictions of a method on test slides.

    Attributes:
        method: Name for tables.
        logits: Class scores, (S, C).
        keep_ratio: Share of the tiles that are read at 0.5 um/px, (S,).
    """

    method: str
    logits: Tensor
    keep_ratio: Tensor


def coarse(bags: Mapping[str, Bag], side: int) -> dict[str, Bag]:
    """Bags whose features are those of the looks of this side.

    Raises:
        BagError: A bag has no such look.
    """
    for slide_id, bag in bags.items():
        if side not in bag.looks:
            raise BagError(
                f"bag {slide_id} has no look of {side} pixels; extract its slide with `--look {side}`"
            )
    return {slide_id: replace(bag, features=bag.looks[side]) for slide_id, bag in bags.items()}


def attention_order(model: ABMIL, bags: Mapping[str, Bag], slide_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows of the tiles of each slide by falling attention, int64 (n,)."""
    with torch.inference_mode():
        scores = {s: model(torch.from_numpy(bags[s].features).float()).attention[:, 0] for s in slide_ids}
    return {s: score.argsort(descending=True, stable=True).numpy() for s, score in scores.items()}


def mean_of(bag: Bag, rows: np.ndarray) -> Bag:
    """A bag with one tile, whose features are the mean over these rows."""
    mean = bag.features[rows].astype(np.float32).mean(0, keepdims=True).astype(bag.features.dtype)
    return replace(bag, features=mean, coords=bag.coords[:1], rowcol=bag.rowcol[:1], patches=None, looks={})


@torch.inference_mode()
def read_until_sure(
    dmin: DMIN, bags: Mapping[str, Bag], order: Mapping[str, np.ndarray], confidence: float, block: int = 16
) -> tuple[Tensor, Tensor]:
    """Logits (S, C) of the slides of `order` after the first block at which DMIN is confident, shares read.

    Args:
        dmin: The classifier.
        bags: Bags with the features of all tiles.
        order: Rows of the tiles of each slide in the order of reading.
        confidence: Probability of the likeliest class at which reading ends.
        block: Number of tiles per block.
    """
    logits, shares = [], []
    for slide_id, rows in order.items():
        features = torch.from_numpy(bags[slide_id].features[rows]).float()
        end, found = block, dmin(features[:block]).logits
        while end < len(rows) and float(found.softmax(1).max()) < confidence:
            end += block
            found = dmin(features[:end]).logits
        logits.append(found)
        shares.append(min(end, len(rows)) / len(rows))
    return torch.cat(logits), torch.tensor(shares)


def field_rows(
    dmin: DMIN,
    bags: Mapping[str, Bag],
    labels: Mapping[str, int],
    split: Split,
    training: TrainSettings,
    *,
    out: str | Path,
    side: int = 64,
    n_tiles: int = 25,
    confidence: float = 0.95,
    **options: Any,
) -> list[FieldRow]:
    """Train and test the three methods.

    Args:
        dmin: Trained DMIN, which predicts where reading ends by confidence.
        bags: Bags with looks of this side, of all slides of the split.
        labels: Class index by slide_id.
        split: Slides for training, validation and test.
        training: Settings of both trainings; their seed is also that of the initial weights.
        out: Folder for the trainings.
        side: Side of the looks, in pixels.
        n_tiles: Number of tiles whose mean is classified.
        confidence: Probability at which reading ends.
        **options: Settings of both classifiers, such as `embed_dim`.

    Raises:
        BagError: A bag has no look of this side.
    """
    low_bags, out = coarse(bags, side), Path(out)
    shape = {"in_dim": dmin.in_dim, "n_classes": dmin.n_classes} | options

    def trained(build: type[MILModel], data: BagDataset, folder: str) -> MILModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            model = build(**shape)
        fit(model, data, split, training, out=out / folder, device="cpu")
        return model

    low_data = BagDataset(low_bags, labels)
    low = trained(ABMIL, low_data, "low_resolution")
    assert isinstance(low, ABMIL)
    n_test = len(split.test)
    rows = [FieldRow(LOW_RESOLUTION, predict_slides(low, low_data, split.test)[0], torch.zeros(n_test))]
    order = attention_order(low, low_bags, [*split.train, *split.val, *split.test])
    means = {s: mean_of(bags[s], read[:n_tiles]) for s, read in order.items()}
    top_data = BagDataset(means, labels)
    top = trained(MeanPooling, top_data, "top_tiles")
    shares = torch.tensor([min(n_tiles / len(bags[s]), 1) for s in split.test])
    rows.append(FieldRow(TOP_TILES, predict_slides(top, top_data, split.test)[0], shares))
    test_order = {s: order[s] for s in split.test}
    rows.append(FieldRow(UNTIL_SURE, *read_until_sure(dmin.eval(), bags, test_order, confidence)))
    return rows
