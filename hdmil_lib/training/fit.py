"""Training on one fold: bags in batches, early stopping, resumable to the bit."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from hdmil_lib.batches import BagBatch, BagDataset
from hdmil_lib.cohort import Split
from hdmil_lib.errors import CohortError, HDMILError
from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.models import LossTerms, MILModel
from hdmil_lib.storage import load_weights, save_weights, weights_digest, write_table
from hdmil_lib.training.state import claim_folder, load_state, save_state

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained; the defaults are those of the paper for DMIN on Camelyon16.

    Attributes:
        learning_rate: Optimizer learning rate.
        weight_decay: Optimizer weight decay.
        epochs: Largest number of epochs; an epoch draws as many bags as the training part has.
        min_epochs: Number of epochs before early stopping.
        patience: Number of epochs without a lower validation loss after which training stops.
        seed: Seed of the order of bags, of dropout and of Gumbel noise.
        standardize: Whether the features are standardized, see `MILModel.standardize`.
        batch_size: Number of bags per step; the loss is their mean.
        optimizer: "adam", or "lookahead_radam" as for TransMIL.
        betas: Optimizer betas.
        clip: Largest gradient norm of each parameter group; no limit by default.
        drop_epoch: Epoch from which the learning rate is divided by five, as for DTFD-MIL.
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

    def rate_at(self, epoch: int) -> float:
        """Learning rate of an epoch."""
        dropped = self.drop_epoch is not None and epoch >= self.drop_epoch
        return self.learning_rate * (0.2 if dropped else 1.0)


class Objective(ABC):
    """What `optimize` minimizes: the loss of a batch, and the predictions of the validation slides.

    Attributes:
        learner: Module that is trained and whose state is saved for resuming.
        files: Networks whose best weights are saved, by file name.
    """

    learner: nn.Module
    files: dict[str, nn.Module]

    @abstractmethod
    def loss(self, batch: BagBatch) -> LossTerms:
        """Compute the weighted terms of the loss of a batch; the learner is in training mode."""

    @abstractmethod
    def predict(self, slide_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Predict logits (S, C) and the share of tiles read (S,); the learner is in evaluation mode."""

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""


class Classification(Objective):
    """Training of a bag classifier with its own loss."""

    def __init__(self, model: MILModel, data: BagDataset):
        self.learner = self.model = model
        self.data = data
        self.files = {WEIGHTS: model}

    def loss(self, batch: BagBatch) -> LossTerms:
        output = self.model(**batch.inputs_for(self.model))
        return self.model.loss(output, batch.known_labels)

    def predict(self, slide_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        return predict_slides(self.model, self.data, slide_ids)

    def param_groups(self) -> list[dict[str, Any]]:
        return self.model.param_groups()


def fit(
    model: MILModel,
    data: BagDataset,
    split: Split,
    settings: TrainSettings | None = None,
    *,
    out: str | Path,
    progress: bool = False,
) -> pd.DataFrame:
    """Train a bag classifier; it ends in evaluation mode with the weights of its best epoch.

    Bags are drawn with replacement so that every class is equally likely. The best epoch has the lowest
    cross entropy on `split.val`. `config.json`, the best weights as `model.safetensors`, and at the end
    `history.csv` are written to `out`. An interrupted run resumes after its last complete epoch with the same
    result, to the bit; a finished run is only loaded.

    Args:
        model: The network, with its initial weights, on the device of `data`.
        data: Bags and labels of the slides of `split`.
        split: Slides for training and for early stopping; the test part is not used.
        settings: Training settings; those of the paper by default.
        out: Folder for this run only.
        progress: Whether a bar over epochs is shown.

    Returns:
        One row per epoch: `epoch`, `train_<term>` for each weighted term of the loss, `train_loss`,
        `val_loss`, `val_auc` (nan if the validation slides lack a class) and `keep_ratio` (mean over
        validation slides).

    Raises:
        BagError: A slide has no bag, or a bag does not fit the model.
        CohortError: A slide has no label.
        CheckpointError: `out` holds a run of another configuration.
        HDMILError: The validation loss is infinite or nan.
    """
    settings = settings or TrainSettings()
    config = describe_run(model, data, split, settings)
    if settings.standardize:
        model.standardize([data.batch(split.train).features])
    objective = Classification(model, data)
    return optimize(objective, data, split, settings, out=Path(out), config=config, progress=progress)


@torch.inference_mode()
def predict_slides(model: MILModel, data: BagDataset, slide_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Logits (S, C) of these slides, and the share of tiles that are selected (S,): 1 without a mask."""
    logits, kept = [], []
    for batch in data.batches(slide_ids):
        output = model(**batch.inputs_for(model))
        share = getattr(output, "keep_ratio", None)
        logits.append(output.logits)
        kept.append(torch.ones(len(batch.slide_ids), device=data.device) if share is None else share)
    return torch.cat(logits), torch.cat(kept)


def optimize(
    objective: Objective,
    data: BagDataset,
    split: Split,
    settings: TrainSettings,
    *,
    out: Path,
    config: dict[str, Any],
    progress: bool = False,
    first_epoch_trains: bool = True,
) -> pd.DataFrame:
    """The training loop, resumable; the networks end with the weights of the best epoch.

    Args:
        objective: What is minimized.
        data: Bags and labels of the slides of `split`.
        split: Slides for training and for validation.
        settings: Training settings.
        out: Folder for this run only.
        config: Everything that the result depends on.
        progress: Whether a bar over epochs is shown.
        first_epoch_trains: Whether epoch 0 trains; otherwise it only validates the initial weights.

    Returns:
        The history, one row per epoch.
    """
    claim_folder(out, config)
    labels = _labels(data, (*split.train, *split.val))
    state_path, history_path = out / "state.safetensors", out / "history.csv"
    if not history_path.is_file():
        history: list[dict[str, float]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            optimizer = make_optimizer(objective.param_groups(), settings)
            if state_path.is_file():
                history = load_state(state_path, objective.learner, optimizer)
            bar = tqdm(total=settings.epochs, initial=len(history), disable=not progress, desc=out.name)
            while not finished(history, settings):
                epoch = len(history)
                row: dict[str, float] = {"epoch": epoch}
                if epoch > 0 or first_epoch_trains:
                    for group in optimizer.param_groups:
                        group["lr"] = settings.rate_at(epoch)
                    drawn = balanced_draw(split.train, labels)
                    row |= train_epoch(objective, optimizer, data, drawn, settings)
                row |= validate(objective, split.val, labels)
                history.append(row)
                if best_epoch(history) == epoch:
                    for name, network in objective.files.items():
                        save_weights(network, out / name)
                save_state(state_path, objective.learner, optimizer, history)
                bar.update()
            bar.close()
        write_table(history_path, pd.DataFrame(history))
    state_path.unlink(missing_ok=True)
    for name, network in objective.files.items():
        load_weights(network, out / name)
    objective.learner.eval()
    return pd.read_csv(history_path, float_precision="round_trip")


def balanced_draw(slide_ids: Sequence[str], labels: Mapping[str, int]) -> list[str]:
    """Draw len(slide_ids) slides with replacement so that every class is equally likely."""
    classes = np.array([labels[slide_id] for slide_id in slide_ids])
    weights = 1 / np.bincount(classes)[classes]
    draw = torch.multinomial(torch.from_numpy(weights), len(slide_ids), replacement=True)
    return [slide_ids[i] for i in draw.tolist()]


def train_epoch(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    data: BagDataset,
    slide_ids: Sequence[str],
    settings: TrainSettings,
) -> dict[str, float]:
    """Train for one epoch; return the mean over slides of the loss and of its terms."""
    objective.learner.train()
    sums: LossTerms = {}
    for start in range(0, len(slide_ids), settings.batch_size):
        batch = data.batch(slide_ids[start : start + settings.batch_size])
        terms = objective.loss(batch)
        loss = torch.as_tensor(sum(terms.values()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if settings.clip is not None:
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], settings.clip)
        optimizer.step()
        for name, value in (terms | {"loss": loss}).items():
            sums[name] = sums.get(name, 0) + len(batch.slide_ids) * value.detach()
    return {f"train_{name}": float(value) / len(slide_ids) for name, value in sums.items()}


@torch.inference_mode()
def validate(objective: Objective, slide_ids: Sequence[str], labels: Mapping[str, int]) -> dict[str, float]:
    """Compute cross entropy, AUC and mean share of tiles read of the validation slides."""
    objective.learner.eval()
    logits, kept = objective.predict(slide_ids)
    truth = [labels[slide_id] for slide_id in slide_ids]
    loss = float(cross_entropy(logits, torch.tensor(truth, device=logits.device)))
    if not np.isfinite(loss):
        raise HDMILError(f"the validation loss is {loss}; lower the learning rate")
    every_class = len(set(truth)) == logits.shape[1]
    val_auc = auc(truth, logits.double().softmax(1).cpu().numpy()) if every_class else float("nan")
    return {"val_loss": loss, "val_auc": val_auc, "keep_ratio": float(kept.mean())}


def best_epoch(history: list[dict[str, float]]) -> int:
    """The epoch of lowest validation loss; the first of equal ones."""
    return int(np.argmin([row["val_loss"] for row in history]))


def finished(history: list[dict[str, float]], settings: TrainSettings) -> bool:
    """Whether all epochs are done, or the validation loss has not decreased for `patience` epochs."""
    n = len(history)
    if n >= settings.epochs:
        return True
    if n < max(settings.min_epochs, 1):
        return False
    return n - 1 - best_epoch(history) >= settings.patience


def make_optimizer(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """Create the optimizer of the settings."""
    rate, decay, betas = settings.learning_rate, settings.weight_decay, settings.betas
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, weight_decay=decay, betas=betas, fused=True)
    from timm.optim.lookahead import Lookahead  # takes a second to import

    return Lookahead(torch.optim.RAdam(groups, lr=rate, weight_decay=decay, betas=betas))


def describe_run(model: nn.Module, data: BagDataset, split: Split, settings: TrainSettings) -> dict[str, Any]:
    """Everything that the result of a run depends on, for `config.json`."""
    labels = _labels(data, (*split.train, *split.val))
    parts = {part: {s: labels[s] for s in getattr(split, part)} for part in ("train", "val")}
    return {
        "model": type(model).__name__,
        "initial_weights": weights_digest(model),
        "settings": asdict(settings),
        "split": hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16],
        "features": data.digest((*split.train, *split.val)),
        "encoder": asdict(data.encoder),
    }


def _labels(data: BagDataset, slide_ids: Sequence[str]) -> dict[str, int]:
    missing = [slide_id for slide_id in slide_ids if slide_id not in data.labels]
    if missing:
        raise CohortError(f"slide '{missing[0]}' has no label; give BagDataset the labels of all slides")
    return {slide_id: int(data.labels[slide_id]) for slide_id in slide_ids}
