"""Joint fine-tuning of DMIN and LIPN (paper: AHDMIL)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hdmil_lib.batches import BagBatch, BagDataset
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import HDMIL, LossTerms
from hdmil_lib.splits import Split
from hdmil_lib.storage import weights_digest
from hdmil_lib.training.fit import (
    WEIGHTS,
    Objective,
    TrainSettings,
    describe_run,
    on_device,
    optimize,
    weighted,
)
from hdmil_lib.training.lipn import (
    LIPNLossWeights,
    lipn_loss,
    predict_screened,
    store_thresholds,
    trained_thresholds,
)

FINE_TUNING = TrainSettings(learning_rate=1e-4, epochs=20, min_epochs=0, patience=5)
LIPN_WEIGHTS = "lipn.safetensors"


class JointLearning(Objective):
    """DMIN's loss on the tiles that LIPN keeps, and LIPN's loss on DMIN's selection of all tiles."""

    def __init__(self, model: HDMIL, data: BagDataset, weights: LIPNLossWeights):
        self.learner = self.model = model
        self.data, self.weights, self.inputs = data, weights, model.inputs
        self.files = {WEIGHTS: model.dmin, LIPN_WEIGHTS: model.lipn}

    def loss(self, batch: BagBatch) -> LossTerms:
        inputs = batch.inputs_for(self.model)
        features, rows, patches = inputs["features"], inputs["rows"], inputs["patches"]
        kept_tiles, target = self._select(features, rows, patches, batch.segments)
        chosen, kept = batch.segments.select(kept_tiles)
        dmin, settings = self.model.dmin, self.model.dmin.settings
        output = dmin(features, kept, rows=chosen if rows is None else rows[chosen])
        terms = dmin.loss(output, batch.known_labels)
        lipn_terms = lipn_loss(
            self.model.lipn(patches),
            target,
            settings.keep_ratio,
            self.weights,
            batch.segments,
            threshold=settings.threshold,
        )
        return terms | {f"lipn_{name}": value for name, value in lipn_terms.items()}

    def predict(self, slide_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.model.thresholds.copy_(trained_thresholds(self.model, self.data, slide_ids))
        return predict_screened(self.model, self.data, slide_ids)

    def param_groups(self) -> list[dict[str, Any]]:
        return [*self.model.dmin.param_groups(), *self.model.lipn.param_groups()]

    @torch.no_grad()
    def _select(
        self, features: Tensor, rows: Tensor | None, patches: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """In evaluation mode, the tiles that LIPN keeps (N,) and DMIN's mask of all tiles (N, C)."""
        self.model.eval()
        kept = self.model.screen(patches, segments).any(1)
        target = self.model.dmin(features, segments, rows=rows).mask
        self.model.train()
        return kept, target


def fine_tune(
    model: HDMIL,
    data: BagDataset,
    split: Split,
    settings: TrainSettings = FINE_TUNING,
    *,
    out: str | Path,
    weights: LIPNLossWeights | None = None,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> pd.DataFrame:
    """Fine-tune DMIN and LIPN together, as inference uses them (AHDMIL, arXiv 2508.05114).

    In each step both networks first run in evaluation mode: LIPN selects tiles at the current thresholds, and
    DMIN makes its selection of all tiles. Then DMIN learns by its own loss from the tiles that LIPN selected
    as if they were the bag, and LIPN by its own loss from DMIN's selection. The two losses share no weights,
    so one step on their sum updates both networks. After each epoch new thresholds are chosen on the patches
    of the validation slides to keep DMIN's target ratio, and the validation loss is that of the two-stage
    prediction at these thresholds. Epoch 0 only validates the initial networks, so fine-tuning never
    increases the validation loss.

    The files and resuming are as in `fit`; `model.safetensors` is DMIN, `lipn.safetensors` is LIPN, and
    `config.json` also holds the final `thresholds`. The model ends in evaluation mode with the weights and
    thresholds of the best epoch.

    Args:
        model: Trained networks with their thresholds; changed in place.
        data: Bags with patches and labels of the slides of `split`.
        split: Slides for training and for early stopping; the test part is not used.
        settings: Training settings of both networks; DMIN keeps its standardization of features.
        out: Folder for this run only.
        weights: Weights of LIPN's loss.
        device: Device to train on, as in `fit`.
        progress: Whether a bar over epochs is shown.

    Returns:
        As `fit`; LIPN's terms are `lipn_mask` and `lipn_rate`. Epoch 0 has no training loss.

    Raises:
        ValueError: DMIN has no self-distillation.
        BagError: A bag does not fit the model.
        CheckpointError: `out` holds a run of another configuration.
        HDMILError: The validation loss is infinite or nan.
    """
    if not model.dmin.settings.self_distillation:
        raise ValueError("a DMIN without self-distillation selects no tiles that LIPN could learn from")
    weights, out = weights or LIPNLossWeights(), Path(out)
    config = describe_run(model.dmin, data, split, settings) | {
        "lipn": weights_digest(model.lipn),
        "lipn_loss": asdict(weights),
        "initial_thresholds": model.thresholds.tolist(),
    }
    with on_device(data, device, model) as data, weighted(model.dmin, data, split, settings):
        history = optimize(
            JointLearning(model, data, weights),
            data,
            split,
            settings,
            out=out,
            config=config,
            progress=progress,
            first_epoch_trains=False,
        )
        thresholds = store_thresholds(model, data, split.val, out)
    for buffer in (model.thresholds, model.trained_thresholds):  # those of the best epoch, not of the last
        buffer.copy_(torch.tensor(thresholds))
    return history
