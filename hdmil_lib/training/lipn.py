"""Training of LIPN to predict which tiles a trained DMIN needs (paper: LIPN).

The targets of the paper are DMIN's masks. They are hard to predict from 16x16 pixels, since DMIN selects most
tiles of every kind of tissue, and other tiles for each branch. The targets "evidence" score a tile by DMIN's
prediction for that tile alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from hdmil_lib.batches import BagBatch, BagDataset
from hdmil_lib.kernels import gumbel_mask
from hdmil_lib.kernels.segments import Segments, to_device
from hdmil_lib.models import DMIN, HDMIL, LIPN, LossTerms
from hdmil_lib.models.dmin import union
from hdmil_lib.models.lipn import thresholds_for_keep_ratio
from hdmil_lib.models.ragged import bag_mean
from hdmil_lib.splits import Split
from hdmil_lib.storage import read_json, weights_digest, write_json
from hdmil_lib.training.fit import WEIGHTS, Objective, TrainSettings, describe_run, on_device, optimize

LIPNTarget = Literal["mask", "evidence"]


@dataclass(frozen=True)
class LIPNLossWeights:
    """Weights b1 and b2 of LIPN's loss; not given in the paper, so that of the rate is as in DMIN's loss."""

    mask: float = 1.0
    rate: float = 2.0


class Screening(Objective):
    """Training of LIPN on targets from a frozen DMIN.

    The validation loss is that of the two-stage prediction: with "mask" at DMIN's threshold gamma, with
    "evidence" at thresholds that keep DMIN's target ratio.
    """

    def __init__(
        self,
        lipn: LIPN,
        dmin: DMIN,
        data: BagDataset,
        slide_ids: Sequence[str],
        target: LIPNTarget,
        weights: LIPNLossWeights,
        augment: bool,
    ):
        self.learner = self.lipn = lipn
        self.dmin, self.data = dmin.eval(), data
        self.model, self.inputs = HDMIL(dmin, lipn).to(data.device), _Patches.inputs
        self.target, self.weights, self.augment = target, weights, augment
        self.targets = lipn_targets(target, dmin, data, slide_ids)
        self.files = {WEIGHTS: lipn}

    def loss(self, batch: BagBatch) -> LossTerms:
        patches = batch.inputs_for(_Patches())["patches"]
        logits = self.lipn(turn_patches(patches) if self.augment else patches)
        target = torch.cat([self.targets[slide_id] for slide_id in batch.slide_ids])
        if self.target == "evidence":
            return evidence_loss(logits, target, batch.segments)
        settings = self.dmin.settings
        return lipn_loss(
            logits, target, settings.keep_ratio, self.weights, batch.segments, threshold=settings.threshold
        )

    def predict(self, slide_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        if self.target == "evidence":
            self.model.thresholds.copy_(trained_thresholds(self.model, self.data, slide_ids))
        return predict_screened(self.model, self.data, slide_ids)

    def param_groups(self) -> list[dict[str, Any]]:
        return self.lipn.param_groups()


class _Patches:
    """The fields of a batch that LIPN takes."""

    inputs: ClassVar[tuple[str, ...]] = ("patches",)


def fit_lipn(
    lipn: LIPN,
    dmin: DMIN,
    data: BagDataset,
    split: Split,
    settings: TrainSettings,
    *,
    out: str | Path,
    target: LIPNTarget = "mask",
    weights: LIPNLossWeights | None = None,
    augment: bool = False,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> pd.DataFrame:
    """Train LIPN to predict from 16x16 patches which tiles a trained DMIN needs.

    DMIN is frozen and in evaluation mode; the targets are computed once per bag. At the end the `thresholds`
    that keep DMIN's target ratio on the validation slides are added to `config.json`; see
    `thresholds_for_keep_ratio`. Everything else is as in `fit`.

    Args:
        lipn: The network, with its initial weights.
        dmin: Trained classifier.
        data: Bags with patches and labels of the slides of `split`.
        split: Slides for training and for early stopping; the test part is not used.
        settings: Training settings.
        out: Folder for this run only.
        target: "mask" for DMIN's selection (paper: LIPN), or "evidence"; see `lipn_targets`.
        weights: Weights of the loss with "mask".
        augment: Whether patches are flipped and transposed at random.
        device: Device to train on, as in `fit`.
        progress: Whether a bar over epochs is shown.

    Returns:
        As `fit`; the terms are `mask` and `rate`, or `evidence`.

    Raises:
        ValueError: The target is unknown, or it is "mask" and DMIN has no self-distillation.
        BagError: The bags have no patches.
    """
    weights = weights or LIPNLossWeights()
    config = describe_run(lipn, data, split, settings) | {
        "loss": {"target": target, "augment": augment} | (asdict(weights) if target == "mask" else {}),
        "dmin": weights_digest(dmin),
    }
    with on_device(data, device, lipn, dmin) as data:
        objective = Screening(lipn, dmin, data, split.train, target, weights, augment)
        history = optimize(objective, data, split, settings, out=Path(out), config=config, progress=progress)
        store_thresholds(objective.model, data, split.val, Path(out))
    return history


@torch.inference_mode()
def predict_screened(model: HDMIL, data: BagDataset, slide_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Two-stage prediction of these slides: logits (S, C) and share of tiles read (S,)."""
    batches = (data.batch([slide_id]) for slide_id in slide_ids)
    outputs = [model(**batch.inputs_for(model)) for batch in batches]
    return torch.cat([o.logits.float() for o in outputs]), torch.cat([o.keep_ratio for o in outputs])


@torch.inference_mode()
def trained_thresholds(model: HDMIL, data: BagDataset, slide_ids: Sequence[str]) -> Tensor:
    """Thresholds, one per branch, with which LIPN keeps DMIN's target share of the tiles of these slides."""
    model.eval()
    patches = (data.batch([slide_id]).inputs_for(_Patches())["patches"] for slide_id in slide_ids)
    scores = (model.lipn_logits(slide).sigmoid() for slide in patches)
    return thresholds_for_keep_ratio(scores, model.dmin.settings.keep_ratio)


def store_thresholds(model: HDMIL, data: BagDataset, slide_ids: Sequence[str], folder: Path) -> list[float]:
    """Return the `thresholds` in `config.json`; add those for these slides if there are none."""
    config = read_json(folder / "config.json")
    if "thresholds" not in config:
        config["thresholds"] = trained_thresholds(model, data, slide_ids).tolist()
        write_json(folder / "config.json", config)
    return config["thresholds"]


def lipn_targets(
    target: LIPNTarget, dmin: DMIN, data: BagDataset, slide_ids: Sequence[str]
) -> dict[str, Tensor]:
    """Targets of LIPN for the tiles of each slide, by slide_id.

    Args:
        target: "mask" for M_HR, DMIN's selection for each branch, (N, C); "evidence" for `evidence_targets`,
            (N,).
        dmin: Trained classifier, in evaluation mode.
        data: Bags and labels of the slides.
        slide_ids: The slides.

    Raises:
        ValueError: The target is unknown, or it is "mask" and DMIN has no self-distillation.
    """
    if target == "evidence":
        return evidence_targets(dmin, data, slide_ids)
    if target != "mask":
        raise ValueError(f"target is {target!r}, expected {' or '.join(map(repr, get_args(LIPNTarget)))}")
    if not dmin.settings.self_distillation:
        raise ValueError("a DMIN without self-distillation selects no tiles that LIPN could learn from")
    with torch.no_grad():
        batches = ((slide_id, data.batch([slide_id])) for slide_id in slide_ids)
        return {slide_id: dmin(**batch.inputs_for(dmin)).mask for slide_id, batch in batches}


@torch.no_grad()
def evidence_targets(dmin: DMIN, data: BagDataset, slide_ids: Sequence[str]) -> dict[str, Tensor]:
    """Evidence of each tile for the class of its slide according to DMIN, between 0 and 1.

    e = [p_y > q_y] sigmoid(max_c A_c) KL(p || q) / max_c(-ln q_c). Here p is DMIN's prediction for the tile
    as a bag of its own, q the mean of p over the tiles of a slide and then over slides, and y the class of
    the slide. Tissue that occurs in all slides has p close to q, so it need not be known which classes have
    tiles of their own. The attention is a factor because the heads learn mainly from tiles of high attention.
    A tile with evidence for another class than that of its slide is an error of DMIN; its evidence is 0.

    Args:
        dmin: Trained classifier, in evaluation mode.
        data: Bags and labels of the slides.
        slide_ids: The slides, which also define q.

    Returns:
        Evidence, (N,), by slide_id.
    """
    attention, alone = {}, {}
    for slide_id in slide_ids:
        features = data.batch([slide_id]).features
        output = dmin(features, Segments([1] * len(features), features.device))
        attention[slide_id] = output.attention.amax(1).sigmoid()
        alone[slide_id] = output.logits.log_softmax(1)
    usual = torch.stack([tiles.exp().mean(0) for tiles in alone.values()]).mean(0).log()
    targets = {}
    for slide_id, tiles in alone.items():
        y = data.labels[slide_id]
        divergence = (tiles.exp() * (tiles - usual)).sum(1) / -usual.min()
        targets[slide_id] = attention[slide_id] * divergence * (tiles[:, y] > usual[y])
    return targets


def lipn_loss(
    logits: Tensor,
    target_mask: Tensor,
    keep_ratio: float | None,
    weights: LIPNLossWeights | None = None,
    segments: Segments | None = None,
    *,
    threshold: float = 0.5,
) -> LossTerms:
    """L = b1 mean_c L1(M_LR,c, M_HR,c) + b2 (r~_LR - r)^2 (paper: objective of LIPN).

    Args:
        logits: P, LIPN's output, (N, C).
        target_mask: M_HR, the selection of a frozen DMIN in evaluation mode, (N, C).
        keep_ratio: r; `None` for the share of each bag that DMIN selects.
        weights: Weights b1 and b2.
        segments: The bags; `None` for one bag.
        threshold: gamma.

    Returns:
        The weighted terms "mask" and "rate", each a mean over bags.
    """
    weights = weights or LIPNLossWeights()
    segments = segments or Segments([len(logits)], logits.device)
    target_mask = target_mask.detach().to(logits.dtype)
    mask = gumbel_mask(logits, threshold=threshold)
    kept = bag_mean(union(mask), segments)
    wanted = bag_mean(union(target_mask), segments) if keep_ratio is None else keep_ratio
    differing = (mask - target_mask).abs().mean(1)
    return {
        "mask": weights.mask * bag_mean(differing, segments).mean(),
        "rate": weights.rate * (kept - wanted).square().mean(),
    }


def evidence_loss(logits: Tensor, target: Tensor, segments: Segments) -> LossTerms:
    """Binary cross entropy between the sigmoid of every branch and the evidence of the tile.

    All branches have the same target, so that they rank tiles alike and their union stays small.

    Args:
        logits: P, LIPN's output, (N, C).
        target: Evidence between 0 and 1, (N,).
        segments: The bags.

    Returns:
        The term "evidence", a mean over branches, tiles of a bag, and bags.
    """
    errors = binary_cross_entropy_with_logits(logits, target[:, None].expand_as(logits), reduction="none")
    return {"evidence": bag_mean(errors.mean(1), segments).mean()}


def turn_patches(patches: Tensor) -> Tensor:
    """Apply to each patch (N, 16, 16, 3) a random one of the eight symmetries of a square."""
    drawn = torch.randint(0, 2, (3, len(patches), 1, 1, 1), device="cpu").bool()
    flip_rows, flip_columns, transpose = to_device(drawn, patches.device)
    patches = torch.where(flip_rows, patches.flip(1), patches)
    patches = torch.where(flip_columns, patches.flip(2), patches)
    return torch.where(transpose, patches.transpose(1, 2), patches)
