"""Training of the second look to predict which tiles are evidence for a trained DMIN."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hdmil_lib.batches import BagBatch, BagDataset
from hdmil_lib.models import DMIN, LossTerms, SecondLook
from hdmil_lib.models.lipn import thresholds_for_keep_ratio
from hdmil_lib.splits import Split
from hdmil_lib.storage import weights_digest
from hdmil_lib.training.fit import WEIGHTS, Objective, TrainSettings, describe_run, on_device, optimize
from hdmil_lib.training.lipn import evidence_loss, evidence_targets

LOOK_TRAINING = TrainSettings(1e-3, epochs=20, min_epochs=20, batch_size=4)
KEEP_RATIO = 0.2
"""Share of the tiles that the validation reads."""


class LookLearning(Objective):
    """The evidence of tiles as the target; the validation loss is DMIN's on the tiles of highest score."""

    def __init__(self, look: SecondLook, dmin: DMIN, data: BagDataset, slide_ids: Sequence[str]):
        self.learner = self.look = look
        self.dmin, self.data, self.inputs = dmin.eval(), data, (f"look_{look.side}",)
        self.targets = evidence_targets(dmin, data, slide_ids)
        self.files = {WEIGHTS: look}

    def loss(self, batch: BagBatch) -> LossTerms:
        logits = self.look(batch.look(self.look.side))
        target = torch.cat([self.targets[slide_id] for slide_id in batch.slide_ids])
        return evidence_loss(logits[:, None], target, batch.segments)

    def predict(self, slide_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        batches = [self.data.batch([slide_id]) for slide_id in slide_ids]
        scores = [self.look(batch.look(self.look.side)).sigmoid() for batch in batches]
        threshold = thresholds_for_keep_ratio([s[:, None] for s in scores], KEEP_RATIO)[0]
        logits, kept = [], []
        for batch, score in zip(batches, scores, strict=True):
            read = (score > threshold) | (score == score.max())
            rows, segments = batch.segments.select(read)
            logits.append(self.dmin(batch.features, segments, rows=rows).logits)
            kept.append(read.float().mean())
        return torch.cat(logits), torch.stack(kept)

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.look.parameters())}]


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
    """Train a second look to predict the evidence of tiles according to a trained DMIN.

    DMIN is frozen; see `evidence_targets`. The features of the look are standardized. The best epoch is the
    one whose tiles of highest score, a fifth of all, give DMIN the lowest cross entropy on the validation
    slides. Everything else is as in `fit`.

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
        As `fit`; the term is `evidence`.

    Raises:
        BagError: The bags have no looks of this side.
    """
    config = describe_run(look, data, split, settings) | {
        "dmin": weights_digest(dmin),
        "side": look.side,
    }
    look.standardize([data.to("cpu").batch(split.train).look(look.side)])
    with on_device(data, device, look, dmin) as data:
        objective = LookLearning(look, dmin, data, split.train)
        return optimize(objective, data, split, settings, out=Path(out), config=config, progress=progress)
