"""Joint fine-tuning: DMIN learns on the tiles that LIPN keeps while LIPN follows it (paper: AHDMIL)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from hdmil_lib.data import Split
from hdmil_lib.features.bagstore import Bag
from hdmil_lib.models import DMIN, LIPN
from hdmil_lib.training.checkpoint import weights_digest
from hdmil_lib.training.losses import LIPNLossWeights, Terms, bag_loss, lipn_loss
from hdmil_lib.training.ragged import RaggedBags
from hdmil_lib.training.trainer import (
    TrainSettings,
    describe_run,
    fit,
    predict_two_stage,
    store_thresholds,
)
from hdmil_lib.training.two_stage import calibrate_thresholds, lipn_mask

FINE_TUNING = TrainSettings(learning_rate=1e-4, epochs=20, min_epochs=0, patience=5)


def fine_tune(
    dmin: DMIN,
    lipn: LIPN,
    thresholds: Sequence[float],
    bags: Mapping[str, Bag],
    split: Split,
    labels: Mapping[str, int],
    settings: TrainSettings,
    out_dir: str | Path,
    *,
    loss_options: Mapping[str, Any] | None = None,
    lipn_weights: LIPNLossWeights | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Fine-tune a trained DMIN and its LIPN together, as inference uses them (AHDMIL, arXiv 2508.05114).

    A step first asks both networks in evaluation mode: which tiles LIPN keeps at the current thresholds, and
    which of all tiles DMIN would select. Then DMIN learns, by its own loss, from the kept tiles as if they
    were the bag, and LIPN, by its own, from DMIN's selection. The two losses share no weights, so their sum
    takes a step of both at once. After each epoch the thresholds are calibrated anew on the patches of the
    validation slides, to keep DMIN's target ratio. The validation loss is that of the two-stage prediction
    at these thresholds. Epoch 0 is the networks as they came: fine-tuning that never helps changes nothing.

    `out_dir` gets the files of `train_model`, where `model.safetensors` is DMIN, `lipn.safetensors`, and in
    `config.json` the final `thresholds`. Both networks end in evaluation mode with the weights of the best
    epoch. Resuming is as in `train_model`.

    Args:
        dmin: Trained classifier; changed in place.
        lipn: Pre-screening network trained for it; changed in place.
        thresholds: On LIPN's scores, one a branch, as `train_lipn` stored them: for the first epoch.
        bags: Bags by slide_id.
        split: Slides to train on and to stop early by; the test part is not looked at.
        labels: Class index by slide_id.
        settings: Optimizer of both networks, length and seed; DMIN keeps its standardization of features.
        out_dir: Folder of this run alone.
        loss_options: Of `bag_loss`, for DMIN.
        lipn_weights: Of `lipn_loss`.
        progress: Show a bar over epochs.

    Returns:
        As `train_model`; LIPN's terms are `lipn_mask` and `lipn_rate`. Epoch 0 has no training loss.

    Raises:
        ValueError: DMIN has no self-distillation, or there is not one threshold a branch.
        BagError: A bag holds numbers that are not finite, or does not fit the model.
        CheckpointError: `out_dir` holds a run of another configuration.
        HDMILError: The validation loss became infinite or undefined.
    """
    if not dmin.settings.self_distillation:
        raise ValueError("a DMIN without self-distillation selects no tiles that LIPN could learn from")
    if len(thresholds) != dmin.n_classes:
        raise ValueError(f"{len(thresholds)} thresholds, expected one for each of {dmin.n_classes} branches")
    options, lipn_weights = dict(loss_options or {}), lipn_weights or LIPNLossWeights()
    data = RaggedBags(bags, (*split.train, *split.val), ("features", "patches"))
    gamma, keep_ratio = dmin.settings.threshold, dmin.settings.keep_ratio
    config = describe_run(dmin, bags, split, labels, settings) | {
        "loss": {name: asdict(value) if name == "weights" else value for name, value in options.items()},
        "lipn": weights_digest(lipn),
        "lipn_loss": asdict(lipn_weights),
        "initial_thresholds": [float(threshold) for threshold in thresholds],
    }
    pair = _Pair(dmin, lipn, thresholds)

    def step(slide_ids: list[str]) -> tuple[Tensor, Terms]:
        features, patches = data.take("features", slide_ids), data.take("patches", slide_ids)
        cu_seqlens = data.cu_seqlens(slide_ids)
        kept, target = pair.select(features, patches, cu_seqlens)
        output = dmin(features[kept], torch.searchsorted(kept, cu_seqlens))
        loss, terms = bag_loss(dmin, output, torch.tensor([labels[s] for s in slide_ids]), **options)
        follows, lipn_terms = lipn_loss(
            lipn(patches), target, keep_ratio, lipn_weights, cu_seqlens=cu_seqlens, threshold=gamma
        )
        return loss + follows, terms | {f"lipn_{name}": value for name, value in lipn_terms.items()}

    def score() -> tuple[Tensor, Tensor]:
        patches = (data.take("patches", [s]) for s in split.val)
        pair.thresholds.copy_(torch.tensor(calibrate_thresholds(lipn, patches, keep_ratio)))
        return predict_two_stage(dmin, lipn, data, split.val, pair.thresholds)

    out_dir = Path(out_dir)
    parts = {"model.safetensors": dmin, "lipn.safetensors": lipn}
    run = (pair, step, score, split, labels, settings, out_dir, config, progress)
    history = fit(*run, parts=parts, keep_start=True)
    store_thresholds(lipn, data, split.val, keep_ratio, out_dir)
    return history


class _Pair(nn.Module):
    """Both networks and the thresholds between them, to be optimized and resumed as one."""

    def __init__(self, dmin: DMIN, lipn: LIPN, thresholds: Sequence[float]):
        super().__init__()
        self.dmin = dmin
        self.lipn = lipn
        self.register_buffer("thresholds", torch.tensor(thresholds))

    def tiers(self) -> list[list[nn.Parameter]]:
        return [*self.dmin.tiers(), *self.lipn.tiers()]

    @torch.no_grad()
    def select(self, features: Tensor, patches: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """What both say in evaluation: numbers of the tiles that LIPN keeps, DMIN's mask of all (N, C)."""
        self.eval()
        bags = self.lipn(patches).split(cu_seqlens.diff().tolist())
        kept = torch.cat([lipn_mask(logits, self.thresholds).any(1) for logits in bags])
        target = self.dmin(features, cu_seqlens).mask
        self.train()
        return kept.nonzero()[:, 0], target
