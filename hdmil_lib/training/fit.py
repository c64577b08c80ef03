"""Training on one fold: bags in batches, early stopping, resumable to the bit."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hdmil_lib.batches import BagBatch, BagDataset
from hdmil_lib.devices import widest
from hdmil_lib.errors import CohortError, HDMILError
from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.models import LossTerms, MILModel
from hdmil_lib.models.base import cross_entropy
from hdmil_lib.splits import Split
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
        instance_dropout: Share of each bag's tiles that a step of a bag classifier leaves out at random.
        balance: What makes up for classes of unequal size. "sampling": bags are drawn with replacement so
            that every class is equally likely. "loss": every bag is drawn once per epoch, and the cross
            entropy of a class with n of the N bags has the weight N / (C n).
        precision: "bf16" for autocast to bfloat16; weights, optimizer and losses stay in float32.
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
    instance_dropout: float = 0.0
    balance: Literal["sampling", "loss"] = "sampling"
    precision: Literal["fp32", "bf16"] = "fp32"

    def rate_at(self, epoch: int) -> float:
        """Learning rate of an epoch."""
        dropped = self.drop_epoch is not None and epoch >= self.drop_epoch
        return self.learning_rate * (0.2 if dropped else 1.0)


class Objective(ABC):
    """What `optimize` minimizes: the loss of a batch, and the predictions of the validation slides.

    Attributes:
        learner: Module that is trained and whose state is saved for resuming.
        files: Networks whose best weights are saved, by file name.
        inputs: Fields of a `BagBatch` that the loss takes.
    """

    learner: nn.Module
    files: dict[str, nn.Module]
    inputs: Sequence[str]

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
    """Training of a bag classifier with its own loss, in each step on a random share of the tiles."""

    def __init__(self, model: MILModel, data: BagDataset, instance_dropout: float = 0.0):
        self.learner = self.model = model
        self.data, self.share = data, 1 - instance_dropout
        self.files = {WEIGHTS: model}
        self.inputs = model.inputs

    def loss(self, batch: BagBatch) -> LossTerms:
        if self.share < 1:
            batch = batch.sample(self.share)
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
    device: str | torch.device = "auto",
    progress: bool = False,
) -> pd.DataFrame:
    """Train a bag classifier; it ends in evaluation mode with the weights of its best epoch.

    Bags are drawn as `TrainSettings.balance` says. The best epoch has the lowest
    cross entropy on `split.val`. `config.json`, the best weights as `model.safetensors`, and at the end
    `history.csv` are written to `out`. An interrupted run resumes after its last complete epoch with the same
    result, on a CPU to the bit; a finished run is only loaded.

    Args:
        model: The network, with its initial weights; after training it is on the device where it was before.
        data: Bags and labels of the slides of `split`.
        split: Slides for training and for early stopping; the test part is not used.
        settings: Training settings; those of the paper by default.
        out: Folder for this run only.
        device: Device to train on, as `devices.resolve` takes it; "auto" is the first GPU or the CPU.
        progress: Whether a bar over epochs is shown.

    Returns:
        One row per epoch: `epoch`, `train_<term>` for each weighted term of the loss, `train_loss`,
        `val_loss`, `val_auc` (nan if the validation slides lack a class) and `keep_ratio` (mean over
        validation slides).

    Raises:
        BagError: A slide has no bag, or a bag does not fit the model.
        CohortError: A slide has no label.
        CheckpointError: `out` holds a run of another configuration.
        HDMILError: The device is not there or has too little memory, or the validation loss is not finite.
    """
    settings = settings or TrainSettings()
    config = describe_run(model, data, split, settings)
    if settings.standardize:  # on the host, which has the memory for it
        model.standardize([data.to("cpu").batch(split.train).features])
    with on_device(data, device, model) as data, weighted(model, data, split, settings):
        objective = Classification(model, data, settings.instance_dropout)
        return optimize(objective, data, split, settings, out=Path(out), config=config, progress=progress)


@contextmanager
def on_device(data: BagDataset, device: str | torch.device, *networks: nn.Module) -> Iterator[BagDataset]:
    """Bags, and for a while the networks too, on a device."""
    moved = data.to(device)
    homes = [next(network.parameters()).device for network in networks]
    for network in networks:
        network.to(moved.device)
    try:
        yield moved
    finally:
        for network, home in zip(networks, homes, strict=True):
            network.to(home)


@contextmanager
def weighted(model: MILModel, data: BagDataset, split: Split, settings: TrainSettings) -> Iterator[None]:
    """For a while, the class weights that the settings ask for, from the training slides."""
    if settings.balance == "loss":
        labels = [data.labels[slide_id] for slide_id in split.train]
        counts = np.bincount(labels, minlength=model.n_classes)
        weights = len(labels) / (len(counts) * np.maximum(counts, 1))
        model.class_weights = torch.tensor(weights, dtype=torch.float32, device=model.feature_mean.device)
    try:
        yield
    finally:
        model.class_weights = None


@torch.inference_mode()
def predict_slides(model: MILModel, data: BagDataset, slide_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Logits (S, C) of these slides, and the share of tiles that are selected (S,): 1 without a mask."""
    logits, kept = [], []
    for batch in data.batches(slide_ids):
        output = model(**batch.inputs_for(model))
        share = getattr(output, "keep_ratio", None)
        logits.append(output.logits.float())
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
        with torch.random.fork_rng([data.device.index] if data.device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            optimizer = make_optimizer(objective.param_groups(), settings)
            if state_path.is_file():
                history = load_state(state_path, objective.learner, optimizer)
            bar = tqdm(total=settings.epochs, initial=len(history), disable=not progress, desc=out.name)
            while not finished(history, settings):
                epoch = len(history)
                measured: dict[str, Tensor] = {}
                if epoch > 0 or first_epoch_trains:
                    for group in optimizer.param_groups:
                        group["lr"] = settings.rate_at(epoch)
                    drawn = draw(split.train, labels, settings)
                    measured = train_epoch(objective, optimizer, data, drawn, settings)
                measured |= validate(objective, split.val, labels, settings)
                history.append({"epoch": epoch} | log_row(measured, [labels[s] for s in split.val]))
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


def draw(slide_ids: Sequence[str], labels: Mapping[str, int], settings: TrainSettings) -> list[str]:
    """Draw the slides of an epoch, as many as there are."""
    if settings.balance == "sampling":
        return balanced_draw(slide_ids, labels)
    return [slide_ids[i] for i in torch.randperm(len(slide_ids)).tolist()]


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
) -> dict[str, Tensor]:
    """Train for one epoch; return the sums over slides of the loss and of its terms.

    Nothing is read from the device here, so that a GPU always has work in its queue.
    """
    objective.learner.train()
    sums: LossTerms = {}
    groups = [slide_ids[i : i + settings.batch_size] for i in range(0, len(slide_ids), settings.batch_size)]
    for batch in data.batches_of(groups, objective.inputs):
        try:
            terms = train_step(objective, optimizer, batch, settings)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(batch, settings) from error
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + len(batch.slide_ids) * value
    return {f"train_{name}": value.to(widest(value.device)) / len(slide_ids) for name, value in sums.items()}


def train_step(
    objective: Objective, optimizer: torch.optim.Optimizer, batch: BagBatch, settings: TrainSettings
) -> LossTerms:
    """Take one step on a batch; return the weighted terms of the loss, and the loss as "loss"."""
    with autocast(batch.segments.offsets.device, settings):
        terms = objective.loss(batch)
    loss = torch.as_tensor(sum(terms.values()))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if settings.clip is not None:
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], settings.clip)
    optimizer.step()
    return {name: value.detach() for name, value in (terms | {"loss": loss}).items()}


def autocast(device: torch.device, settings: TrainSettings) -> torch.autocast:
    """Autocast as the settings have it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def out_of_memory(batch: BagBatch, settings: TrainSettings) -> HDMILError:
    """The error of a step for which the memory of a GPU does not suffice."""
    n_bags, n_tiles = len(batch.slide_ids), batch.segments.n_tiles
    remedy = "set precision='bf16' or use another GPU"
    if n_bags > 1:
        remedy = f"lower batch_size, which is {settings.batch_size}, or {remedy}"
    return HDMILError(
        f"{batch.segments.offsets.device} has too little memory for a step on {n_bags} bags with {n_tiles:,} "
        f"tiles: {remedy}. Finished epochs are kept: with other settings name another folder"
    )


@torch.inference_mode()
def validate(
    objective: Objective, slide_ids: Sequence[str], labels: Mapping[str, int], settings: TrainSettings
) -> dict[str, Tensor]:
    """Compute cross entropy, logits and mean share of tiles read of the validation slides."""
    objective.learner.eval()
    with autocast(next(objective.learner.parameters()).device, settings):
        logits, kept = objective.predict(slide_ids)
    loss = cross_entropy(logits, torch.tensor([labels[slide_id] for slide_id in slide_ids]))
    return {"val_loss": loss, "logits": logits, "keep_ratio": kept.mean()}


def log_row(measured: Mapping[str, Tensor], truth: Sequence[int]) -> dict[str, float]:
    """A row of the history from what an epoch measured, read from the device at once."""
    number = widest(measured["logits"].device)
    read = torch.cat([value.to(number).flatten() for value in measured.values()]).cpu()
    parts = read.split([value.numel() for value in measured.values()])
    values = dict(zip(measured, parts, strict=True))
    logits = values.pop("logits").view(measured["logits"].shape)
    row = {name: float(value) for name, value in values.items()}
    if not np.isfinite(row["val_loss"]):
        raise HDMILError(f"the validation loss is {row['val_loss']}; lower the learning rate")
    every_class = len(set(truth)) == logits.shape[1]
    row["val_auc"] = auc(truth, logits.softmax(1).numpy()) if every_class else float("nan")
    return {name: row[name] for name in (*(n for n in row if n != "keep_ratio"), "keep_ratio")}


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
