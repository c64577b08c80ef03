"""Training of one model on one fold: bags in batches, early stopping, resumable to the bit."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from hdmil_lib.data import Split
from hdmil_lib.errors import HDMILError
from hdmil_lib.features.bagstore import Bag
from hdmil_lib.models import DMIN, LIPN, ChebyshevKAN, MILModel
from hdmil_lib.training.checkpoint import (
    claim_folder,
    load_state,
    load_weights,
    read_json,
    save_state,
    save_table,
    save_weights,
    weights_digest,
    write_json,
)
from hdmil_lib.training.lipn_targets import LIPNTarget, evidence_loss, lipn_targets, turn_patches
from hdmil_lib.training.losses import LIPNLossWeights, Terms, bag_loss, lipn_loss
from hdmil_lib.training.ragged import RaggedBags, bag_of
from hdmil_lib.training.scores import auc
from hdmil_lib.training.two_stage import Threshold, calibrate_thresholds, two_stage

Step = Callable[[list[str]], tuple[Tensor, Terms]]
Score = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained; the defaults are the paper's for DMIN on Camelyon16.

    Attributes:
        learning_rate: Of the optimizer.
        weight_decay: Of the optimizer.
        epochs: At most; an epoch draws as many bags as the training part has.
        min_epochs: Early stopping waits for this many.
        patience: Stop after this many epochs in a row without a lower validation loss.
        seed: Of the order of bags, dropout and Gumbel noise.
        standardize: Let the bag classifier learn mean and spread of the training features beforehand.
        batch_size: Bags a step; the loss is their mean.
        optimizer: "adam", or "lookahead_radam" as TransMIL has it.
        betas: Of the optimizer.
        clip: Largest norm of the gradient of each of the model's tiers; no limit by default.
        drop_epoch: From this epoch on a fifth of the learning rate, as DTFD-MIL has it.
        kan_rate: Learning rate of Chebyshev coefficients, as a share of `learning_rate`. Adam moves every
            weight by about its rate a step, and an output of a Chebyshev layer sums Q (K + 1) of them where
            that of a linear layer sums Q: on small cohorts such steps are too long.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 1e-5
    epochs: int = 200
    min_epochs: int = 50
    patience: int = 20
    seed: int = 0
    standardize: bool = False
    batch_size: int = 1
    optimizer: Literal["adam", "lookahead_radam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    drop_epoch: int | None = None
    kan_rate: float = 1.0


PAPER_TRAINING = TrainSettings()
PAPER_LIPN_TRAINING = TrainSettings(learning_rate=1e-4, min_epochs=0, patience=5)
MINI_TRAINING = TrainSettings(1e-3, epochs=40, min_epochs=15, patience=10, standardize=True, batch_size=4)
MINI_LIPN_TRAINING = TrainSettings(learning_rate=1e-3, epochs=12, min_epochs=12)


def train_model(
    model: MILModel,
    bags: Mapping[str, Bag],
    split: Split,
    labels: Mapping[str, int],
    settings: TrainSettings,
    out_dir: str | Path,
    *,
    loss_options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Train a bag classifier and leave it, in evaluation mode, with the weights of its best epoch.

    Bags are drawn with replacement so that every class comes up equally often. The best epoch is the one
    of lowest cross entropy on `split.val`, from the first on. `out_dir` gets `config.json`, the best weights
    as `model.safetensors`, and `history.csv` at the end; a run that was cut off goes on after its last whole
    epoch and ends as if it had not been, a finished one is only loaded.

    Args:
        model: The network, with its initial weights.
        bags: Bags by slide_id.
        split: Slides to train on and to stop early by; the test part is not looked at.
        labels: Class index by slide_id.
        settings: Optimizer, length and seed.
        out_dir: Folder of this run alone.
        loss_options: Keyword arguments of `bag_loss`: weights, k, subtyping, detach_teacher.
        progress: Show a bar over epochs.

    Returns:
        One row an epoch: `epoch`, `train_<term>` of the loss, `train_loss`, `val_loss`, `val_auc` (nan
        where the validation slides are of one class) and `keep_ratio` (mean over validation slides).

    Raises:
        BagError: A bag holds numbers that are not finite, or does not fit the model.
        CheckpointError: `out_dir` holds a run of another configuration.
        HDMILError: The loss became infinite or undefined.
    """
    options = dict(loss_options or {})
    data = RaggedBags(bags, (*split.train, *split.val), model.inputs)
    config = describe_run(model, bags, split, labels, settings) | {
        "loss": {name: asdict(value) if name == "weights" else value for name, value in options.items()}
    }
    if settings.standardize:
        model.standardize([data.take("features", split.train)])

    def step(slide_ids: list[str]) -> tuple[Tensor, Terms]:
        output = data.forward(model, slide_ids)
        return bag_loss(model, output, torch.tensor([labels[s] for s in slide_ids]), **options)

    def score() -> tuple[Tensor, Tensor]:
        return data.predict(model, split.val)

    return fit(model, step, score, split, labels, settings, Path(out_dir), config, progress)


def train_lipn(
    lipn: LIPN,
    dmin: DMIN,
    bags: Mapping[str, Bag],
    split: Split,
    labels: Mapping[str, int],
    settings: TrainSettings,
    out_dir: str | Path,
    *,
    target: LIPNTarget = "mask",
    weights: LIPNLossWeights | None = None,
    augment: bool = False,
    progress: bool = False,
) -> pd.DataFrame:
    """Teach LIPN to predict from 16x16 patches which tiles a trained DMIN needs.

    DMIN is frozen and in evaluation mode: the targets are computed once a bag. The validation loss is that of
    the two-stage prediction, with "mask" at DMIN's threshold gamma, with "evidence" at thresholds that keep
    DMIN's target ratio. Afterwards `config.json` also says, as `thresholds`, where LIPN's scores must be cut
    for that on the validation slides: see `calibrate_thresholds`. Everything else is as in `train_model`.

    Args:
        lipn: The network, with its initial weights.
        dmin: Trained classifier.
        bags: As those that follow, of `train_model`.
        target: "mask" is what DMIN selects (paper: LIPN); "evidence" what it concludes from each tile alone,
            see `evidence_targets`.
        weights: Of the loss with "mask".
        augment: Show each patch in one of its eight positions, drawn anew whenever it comes up.
        progress: Show a bar over epochs.

    Returns:
        As `train_model`; the terms are `mask` and `rate`, or `evidence`.

    Raises:
        ValueError: The target is unknown, or a DMIN without self-distillation has no masks.
    """
    dmin.eval()
    weights = weights or LIPNLossWeights()
    data = RaggedBags(bags, (*split.train, *split.val), ("features", "patches"))
    gamma, keep_ratio = dmin.settings.threshold, dmin.settings.keep_ratio
    targets = lipn_targets(target, dmin, data, split.train, labels)

    def step(slide_ids: list[str]) -> tuple[Tensor, Terms]:
        patches, cu_seqlens = data.take("patches", slide_ids), data.cu_seqlens(slide_ids)
        logits = lipn(turn_patches(patches) if augment else patches)
        wanted = torch.cat([targets[s] for s in slide_ids])
        if target == "evidence":
            return evidence_loss(logits, wanted, cu_seqlens)
        return lipn_loss(logits, wanted, keep_ratio, weights, cu_seqlens=cu_seqlens, threshold=gamma)

    def score() -> tuple[Tensor, Tensor]:
        cut: Threshold = gamma
        if target == "evidence":
            cut = calibrate_thresholds(lipn, (data.take("patches", [s]) for s in split.val), keep_ratio)
        return predict_two_stage(dmin, lipn, data, split.val, cut)

    out_dir = Path(out_dir)
    config = describe_run(lipn, bags, split, labels, settings) | {
        "loss": {"target": target, "augment": augment} | (asdict(weights) if target == "mask" else {}),
        "dmin": weights_digest(dmin),
    }
    history = fit(lipn, step, score, split, labels, settings, out_dir, config, progress)
    store_thresholds(lipn, data, split.val, keep_ratio, out_dir)
    return history


def predict_two_stage(
    dmin: DMIN, lipn: LIPN, data: RaggedBags, slide_ids: Sequence[str], threshold: Threshold
) -> tuple[Tensor, Tensor]:
    """Logits (S, C) of the two-stage prediction of these slides, and the share of tiles kept (S,)."""
    bags = ((data.take("features", [s]), data.take("patches", [s])) for s in slide_ids)
    outputs = [two_stage(dmin, lipn, *bag, threshold) for bag in bags]
    return torch.stack([o.logits for o, _ in outputs]), torch.stack([kept for _, kept in outputs])


def store_thresholds(
    lipn: LIPN, data: RaggedBags, slide_ids: Sequence[str], keep_ratio: float, folder: Path
) -> None:
    """Calibrate a trained LIPN on these slides and add `thresholds` to the run's `config.json`, once."""
    config = read_json(folder / "config.json")
    if "thresholds" not in config:
        thresholds = calibrate_thresholds(lipn, (data.take("patches", [s]) for s in slide_ids), keep_ratio)
        write_json(folder / "config.json", config | {"thresholds": thresholds})


def describe_run(
    model: nn.Module,
    bags: Mapping[str, Bag],
    split: Split,
    labels: Mapping[str, int],
    settings: TrainSettings,
) -> dict[str, Any]:
    """What a run's result depends on, for `config.json`."""
    data = {part: {s: int(labels[s]) for s in getattr(split, part)} for part in ("train", "val")}
    model_settings = getattr(model, "settings", None)
    return {
        "model": type(model).__name__,
        "model_settings": None if model_settings is None else asdict(model_settings),
        "initial_weights": weights_digest(model),
        "settings": asdict(settings),
        "split": hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16],
        "features": bags_digest(bags, (*split.train, *split.val)),
    }


def bags_digest(bags: Mapping[str, Bag], slide_ids: Sequence[str]) -> str:
    """Short hash of the features of these slides."""
    digest = hashlib.sha256()
    for slide_id in slide_ids:
        digest.update(np.ascontiguousarray(bag_of(bags, slide_id).features))
    return digest.hexdigest()[:16]


def fit(
    model: nn.Module,
    step: Step,
    score: Score,
    split: Split,
    labels: Mapping[str, int],
    settings: TrainSettings,
    folder: Path,
    config: dict[str, Any],
    progress: bool,
    *,
    parts: Mapping[str, nn.Module] | None = None,
    keep_start: bool = False,
) -> pd.DataFrame:
    """The loop of all trainings, resumable; leaves the model with the weights of its best epoch.

    Args:
        model: What learns.
        step: The loss of a batch of slides, with its terms; the model is in training mode.
        score: Logits of the validation slides and the share of tiles read; the model is in evaluation mode.
        split: Slides to draw from and to validate on.
        labels: Class index by slide_id.
        settings: Optimizer, length and seed.
        folder: Of this run alone.
        config: What the result depends on.
        progress: Show a bar over epochs.
        parts: Files of the best weights and whose they are; all of the model in `model.safetensors` by
            default.
        keep_start: The weights given are those of epoch 0, which then only validates: for fine-tuning.
    """
    claim_folder(folder, config)
    parts = parts or {"model.safetensors": model}
    state_path, history_path = folder / "state.safetensors", folder / "history.csv"
    if not history_path.is_file():
        history: list[dict] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            optimizer = _optimizer(model, settings)
            if state_path.is_file():
                history = load_state(state_path, model, optimizer)
            bar = tqdm(total=settings.epochs, initial=len(history), disable=not progress, desc=folder.name)
            while not _finished(history, settings):
                row = {"epoch": len(history)}
                _set_rate(optimizer, settings, row["epoch"])
                if row["epoch"] > 0 or not keep_start:
                    drawn = _balanced_draw(split.train, labels)
                    row |= _train_epoch(model, optimizer, step, drawn, settings)
                row |= _validate(model, score, [labels[s] for s in split.val])
                history.append(row)
                if _best_epoch(history) == row["epoch"]:
                    for name, part in parts.items():
                        save_weights(part, folder / name)
                save_state(state_path, model, optimizer, history)
                bar.update()
            bar.close()
        save_table(history_path, pd.DataFrame(history))
    state_path.unlink(missing_ok=True)
    for name, part in parts.items():
        load_weights(part, folder / name)
    model.eval()
    return pd.read_csv(history_path, float_precision="round_trip")


def _best_epoch(history: list[dict]) -> int:
    return int(np.argmin([row["val_loss"] for row in history]))


def _finished(history: list[dict], settings: TrainSettings) -> bool:
    n = len(history)
    if n < settings.epochs and n > 0:
        return n >= settings.min_epochs and n - 1 - _best_epoch(history) >= settings.patience
    return n >= settings.epochs


def _balanced_draw(slide_ids: Sequence[str], labels: Mapping[str, int]) -> list[str]:
    """As many slides as there are, drawn with replacement so that every class is equally likely."""
    classes = np.array([labels[slide_id] for slide_id in slide_ids])
    weights = 1 / np.bincount(classes)[classes]
    draw = torch.multinomial(torch.from_numpy(weights), len(slide_ids), replacement=True)
    return [slide_ids[i] for i in draw.tolist()]


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    kan = [p for m in model.modules() if isinstance(m, ChebyshevKAN) for p in m.parameters()]
    others = [p for p in model.parameters() if all(p is not q for q in kan)]
    groups = [{"params": others, "share": 1.0}, {"params": kan, "share": settings.kan_rate}]
    groups = [group for group in groups if group["params"]]
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "betas": settings.betas}
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True, **options)
    from timm.optim import Lookahead  # takes a second to import

    return Lookahead(torch.optim.RAdam(groups, **options))


def _set_rate(optimizer: torch.optim.Optimizer, settings: TrainSettings, epoch: int) -> None:
    dropped = settings.drop_epoch is not None and epoch >= settings.drop_epoch
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * group["share"] * (0.2 if dropped else 1.0)


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Step,
    slide_ids: Sequence[str],
    settings: TrainSettings,
) -> dict[str, float]:
    """Steps of `batch_size` slides; returns the mean over slides of the loss and of its terms."""
    model.train()
    sums: Terms = {}
    for start in range(0, len(slide_ids), settings.batch_size):
        batch = slide_ids[start : start + settings.batch_size]
        loss, terms = step(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if settings.clip is not None:
            for weights in model.tiers():
                nn.utils.clip_grad_norm_(weights, settings.clip)
        optimizer.step()
        for name, value in (terms | {"loss": loss.detach()}).items():
            sums[name] = sums.get(name, 0) + len(batch) * value
    return {f"train_{name}": float(value) / len(slide_ids) for name, value in sums.items()}


@torch.inference_mode()
def _validate(model: nn.Module, score: Score, labels: Sequence[int]) -> dict[str, float]:
    model.eval()
    logits, kept = score()
    loss = float(cross_entropy(logits, torch.tensor(labels)))
    if not np.isfinite(loss):
        raise HDMILError(f"the validation loss is {loss}; lower the learning rate")
    every_class = len(set(labels)) == logits.shape[1]
    val_auc = auc(labels, logits.double().softmax(1).numpy()) if every_class else float("nan")
    return {"val_loss": loss, "val_auc": val_auc, "keep_ratio": float(kept.mean())}
