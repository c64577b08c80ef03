"""Training of the second look to order the tiles of a slide by their evidence for a trained DMIN."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import softplus

from hdmil_lib.batches import BagBatch, BagDataset
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import DMIN, LossTerms, SecondLook
from hdmil_lib.models.ragged import highest
from hdmil_lib.splits import Split
from hdmil_lib.storage import weights_digest
from hdmil_lib.training.fit import WEIGHTS, Objective, TrainSettings, describe_run, on_device, optimize
from hdmil_lib.training.lipn import evidence_targets

LOOK_TRAINING = TrainSettings(1e-3, epochs=20, min_epochs=20, batch_size=4)
KEEP_RATIO = 0.2
"""Share of the tiles of each slide that the validation reads."""

N_PAIRS = 8
"""Number of other tiles of its slide with which each tile is compared in one step."""


class LookLearning(Objective):
    """Order of the tiles by evidence; the validation loss is DMIN's on the tiles of highest score."""

    def __init__(self, look: SecondLook, dmin: DMIN, data: BagDataset, slide_ids: Sequence[str]):
        self.learner = self.look = look
        self.dmin, self.data, self.inputs = dmin.eval(), data, (f"look_{look.side}",)
        self.targets = evidence_targets(dmin, data, slide_ids)
        self.files = {WEIGHTS: look}

    def loss(self, batch: BagBatch) -> LossTerms:
        logits = self.look(batch.look(self.look.side))
        target = torch.cat([self.targets[slide_id] for slide_id in batch.slide_ids])
        return {"ranks": rank_loss(logits, target, batch.segments)}

    def predict(self, slide_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        logits, kept = [], []
        for slide_id in slide_ids:
            batch = self.data.batch([slide_id])
            read = highest(self.look(batch.look(self.look.side)), batch.segments, KEEP_RATIO)
            rows, segments = batch.segments.select(read)
            logits.append(self.dmin(batch.features, segments, rows=rows).logits)
            kept.append(read.float().mean())
        return torch.cat(logits), torch.stack(kept)

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.look.parameters())}]


def rank_loss(scores: Tensor, evidence: Tensor, segments: Segments, n_pairs: int = N_PAIRS) -> Tensor:
    """Logistic loss of the order of pairs of tiles of one slide, weighted by their difference in evidence.

    Screening needs only the order of the tiles, and only where evidence differs. A look that learns the
    amounts is measured beside it in `benchmarks/second_look.py`.

    Args:
        scores: Logits of the look (N,).
        evidence: Evidence of the tiles according to DMIN (N,).
        segments: Slides of the tiles.
        n_pairs: Number of tiles, drawn with replacement from the same slide, that each tile meets.

    Returns:
        Mean of softplus(-sign(e_i - e_j) (s_i - s_j)) over pairs with the weights |e_i - e_j|.
    """
    start, size = segments.offsets[segments.bag], segments.sizes[segments.bag]
    drawn = torch.rand(n_pairs, len(scores), device=scores.device)
    others = start + (drawn * size).long()
    difference = evidence - evidence[others]
    losses = softplus(-difference.sign() * (scores - scores[others]))
    weights = difference.abs()
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)


def fit_look(
    look: SecondLook,
    dmin: DMIN,
    data: BagDataset,
    split: Split,
    settings: TrainSettings = LOOK_TRAINING,
    *,
    out: str | Path,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> pd.DataFrame:
    """Train a second look to order the tiles of a slide by their evidence according to a trained DMIN.

    DMIN is frozen; see `evidence_targets` and `rank_loss`. The features of the look are standardized. The
    best epoch is the one whose tiles of highest score, a fifth of each slide, give DMIN the lowest cross
    entropy on the validation slides. Everything else is as in `fit`.

    Args:
        look: The network, with its initial weights.
        dmin: Trained classifier.
        data: Bags with looks of this side, and labels, of the slides of `split`.
        split: Slides for training and for early stopping; the test part is not used.
        settings: Training settings.
        out: Folder for this run only.
        device: Device to train on, as in `fit`.
        progress: Whether a bar over epochs is shown.

    Returns:
        As `fit`; the term is `ranks`.

    Raises:
        BagError: The bags have no looks of this side.
    """
    config = describe_run(look, data, split, settings) | {
        "dmin": weights_digest(dmin),
        "side": look.side,
        "pairs": N_PAIRS,
    }
    look.standardize([data.to("cpu").batch(split.train).look(look.side)])
    with on_device(data, device, look, dmin) as data:
        objective = LookLearning(look, dmin, data, split.train)
        return optimize(objective, data, split, settings, out=Path(out), config=config, progress=progress)
