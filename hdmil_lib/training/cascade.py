"""Screening as a cascade: LIPN at 8 um/px, a second look at 2 um/px, and the encoder at 0.5 um/px.

Not in the paper. LIPN and the second look learn the evidence that DMIN finds in single tiles, and a tile that
LIPN lets through is scored by both. All rules are chosen on validation slides, which then also tell whether
the cascade is better than random tiles.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hdmil_lib.batches import BagBatch, BagDataset
from hdmil_lib.errors import CheckpointError
from hdmil_lib.inference.anytime import RunningDMIN, ranked
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import DMIN, HDMIL, LIPN, SecondLook
from hdmil_lib.models.lipn import thresholds_for_keep_ratio
from hdmil_lib.models.settling import SHARES, centered, fit_settling
from hdmil_lib.splits import Split
from hdmil_lib.storage import load_weights, read_json, write_json
from hdmil_lib.training.fit import WEIGHTS, TrainSettings
from hdmil_lib.training.look import LOOK_TRAINING, fit_look
from hdmil_lib.training.records import fitting, read_run

LIPN_WEIGHTS = (0.0, 0.5, 1.0, 2.0)
"""Candidates for the weight of LIPN's logit beside the second look's, relative to their spreads."""

BLOCK = 4
"""Tiles per block where it is measured how answers settle."""


@dataclass(frozen=True)
class CascadeSettings:
    """What a cascade reads.

    Attributes:
        side: Side of the second look, in pixels; 64 is 2 um/px.
        first: Share of the tiles that LIPN lets through to the second look.
        keep_ratio: Share of the tiles that are read in full.
        n_draws: Number of draws of random tiles with which the cascade is compared.
    """

    side: int = 64
    first: float = 0.6
    keep_ratio: float = 0.1
    n_draws: int = 8

    def __post_init__(self):
        if not 0 < self.keep_ratio <= self.first <= 1:
            raise ValueError(
                f"keep_ratio is {self.keep_ratio} and first {self.first}: the cascade narrows, so that "
                "0 < keep_ratio <= first <= 1"
            )


def fit_cascade(
    dmin: DMIN,
    lipn: LIPN,
    data: BagDataset,
    split: Split,
    settings: CascadeSettings | None = None,
    training: TrainSettings = LOOK_TRAINING,
    *,
    out: str | Path,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> HDMIL:
    """Train a second look, and choose the rules of the cascade on the validation slides.

    The files of `fit_look` are in `out`. "cascade" in its `config.json` has the rules, and `judged`: how the
    cascade compares with random tiles. If its cross entropy on the validation slides is not below that of as
    many random tiles, the model reads random tiles.

    Args:
        dmin: Trained classifier.
        lipn: LIPN that was trained for it, on evidence.
        data: Bags with patches, looks of this side, and labels, of the slides of `split`.
        split: Slides for training and for all choices; the test part is not used.
        settings: What the cascade reads.
        training: Training settings of the second look; its seed is also that of its initial weights.
        out: Folder for this run only.
        device: Device to train on, as in `fit`.
        progress: Whether a bar over epochs is shown.

    Returns:
        The model, without its `info`, on the CPU.

    Raises:
        BagError: The bags have no looks of this side.
        CheckpointError: `out` holds a run of another configuration.
    """
    settings, out = settings or CascadeSettings(), Path(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        look = SecondLook(data.dim, settings.side)
    fit_look(look, dmin, data, split, training, out=out, device=device, progress=progress)
    config = read_json(out / "config.json")
    if config.get("cascade", {}).get("settings") != asdict(settings):
        networks = HDMIL(dmin, lipn, look=look.eval())
        model, judged = choose_rules(networks, data.to("cpu"), split.val, settings)
        assert model.look is not None
        config["cascade"] = {
            "settings": asdict(settings),
            "thresholds": model.thresholds.tolist(),
            "coarse_weight": float(model.look.coarse_weight),
            "slope": float(model.slope),
            "bias": model.bias.tolist(),
            "settling": model.settling.tolist(),
            "screening": model.screening,
            "judged": judged,
        }
        write_json(out / "config.json", config)
    return load_cascade(dmin, lipn, out)


def load_cascade(dmin: DMIN, lipn: LIPN, folder: Path) -> HDMIL:
    """The model of a folder that `fit_cascade` wrote, given the networks that it was trained for."""
    rules = read_run(folder).cascade
    if rules is None:
        raise CheckpointError(f"{folder}: the cascade has no rules yet; run the cross-validation again")
    with fitting(folder / "config.json"):
        look = SecondLook(dmin.in_dim, rules.settings.side)
        load_weights(look, folder / WEIGHTS)
        look.coarse_weight.fill_(rules.coarse_weight)
        return HDMIL(
            dmin,
            lipn,
            thresholds=rules.thresholds,
            screening=rules.screening,
            random_share=rules.settings.keep_ratio,
            look=look.eval(),
            look_share=rules.settings.keep_ratio,
            slope=rules.slope,
            bias=rules.bias,
            settling=rules.settling,
        )


@torch.no_grad()
def choose_rules(
    model: HDMIL, data: BagDataset, slide_ids: Sequence[str], settings: CascadeSettings
) -> tuple[HDMIL, dict[str, float]]:
    """Choose the rules of a cascade on slides that served no training.

    LIPN lets the share `first` of the tiles through, a mean over slides. A tile's score is that of the second
    look plus LIPN's logit, with the weight among `LIPN_WEIGHTS` at which the calibrated cross entropy is
    lowest. In each slide the share `keep_ratio` of highest scores is read. Then the cascade is compared with
    random tiles.

    Args:
        model: Networks with any rules.
        data: Bags on the CPU.
        slide_ids: The slides.
        settings: What the cascade reads.

    Returns:
        model: The model with its rules.
        judged: Cross entropy with `all` tiles, and after calibration with the `cascade` and with `random`
            tiles; mean and standard error over slides of how much lower it is with the cascade, `gain` and
            `gain_se`; and the share of tiles that the cascade reads, `keep_ratio`.
    """
    look = model.look
    assert look is not None
    batches = [data.batch([slide_id]) for slide_id in slide_ids]
    labels = torch.tensor([data.labels[slide_id] for slide_id in slide_ids])
    logits = [model.lipn_logits(batch.patches) for batch in batches if batch.patches is not None]
    thresholds = thresholds_for_keep_ratio([each.sigmoid() for each in logits], settings.first)
    coarse = [each.amax(1) for each in logits]
    fine = [look(batch.look(settings.side)) for batch in batches]
    ratio = float(torch.cat(fine).std() / torch.cat(coarse).std().clamp(min=1e-6))
    chosen, outputs, ours = None, [], torch.tensor(math.inf)
    for weight in LIPN_WEIGHTS:
        added = deepcopy(look)
        added.coarse_weight.fill_(weight * ratio)
        candidate = HDMIL(
            model.dmin,
            model.lipn,
            thresholds=thresholds,
            look=added,
            look_share=settings.keep_ratio,
            random_share=settings.keep_ratio,
            info=model.info,
        )
        found = [candidate(**batch.inputs_for(candidate)) for batch in batches]
        answers = torch.cat([output.logits for output in found])
        errors, slope, bias = _calibrated_errors(answers, labels)
        if errors.mean() < ours.mean():
            chosen, outputs, ours = candidate, found, errors
            chosen.slope.fill_(slope)
            chosen.bias.copy_(bias)
    assert chosen is not None
    chosen.settling.copy_(settling_on(chosen, batches))
    whole = torch.cat([model.dmin(batch.features).logits for batch in batches])
    shares = [int(output.read.sum()) for output in outputs]
    drawn = [_random_logits(model.dmin, data, slide_ids, shares, seed) for seed in range(settings.n_draws)]
    random = torch.stack([_calibrated_errors(each, labels)[0] for each in drawn]).mean(0)
    gain = random - ours
    judged = {
        "all": float(cross_entropy(whole, labels)),
        "cascade": float(ours.mean()),
        "random": float(random.mean()),
        "gain": float(gain.mean()),
        "gain_se": float(gain.std() / math.sqrt(len(gain))),
        "keep_ratio": float(np.mean([float(output.keep_ratio) for output in outputs])),
    }
    if judged["gain"] <= 0:
        chosen.screening = "random"
    return chosen, judged


@torch.no_grad()
def settling_on(model: HDMIL, batches: Sequence[BagBatch]) -> Tensor:
    """How answers settle on these slides, one per batch, as more tiles are read; see `models.settling`."""
    scores, final = [], []
    for batch in batches:
        order = reading_order(model, batch)
        running = RunningDMIN(model.dmin)
        answers = [running.update(batch.features[rows]).numpy() for rows in order.split(BLOCK)]
        shares = np.minimum(np.arange(1, len(answers) + 1) * BLOCK, len(order)) / len(order)
        grown = centered(np.stack(answers))
        scores.append(np.stack([np.interp(SHARES, shares, column) for column in grown.T], 1))
        final.append(grown[-1])
    return fit_settling(np.stack(scores), np.stack(final))


def reading_order(model: HDMIL, batch: BagBatch) -> Tensor:
    """Rows of the tiles of a slide, the most suspicious first, int64 (N,)."""
    assert model.look is not None
    assert batch.patches is not None
    logits = model.lipn_logits(batch.patches)
    shown = model.screen(batch.patches, batch.segments, logits).any(1)
    scores = model.look(batch.look(model.look.side), logits.amax(1)).masked_fill(~shown, -torch.inf)
    return torch.from_numpy(ranked(scores, logits)).argsort(descending=True, stable=True)


def _random_logits(
    dmin: DMIN, data: BagDataset, slide_ids: Sequence[str], n_tiles: Sequence[int], seed: int
) -> Tensor:
    """Logits (S, C) of slides from so many random tiles each."""
    generator, logits = torch.Generator().manual_seed(seed), []
    for slide_id, n in zip(slide_ids, n_tiles, strict=True):
        features = data.batch([slide_id]).features
        rows = torch.randperm(len(features), generator=generator)[:n]
        logits.append(dmin(features, Segments([n]), rows=rows).logits)
    return torch.cat(logits)


def _calibrated_errors(logits: Tensor, labels: Tensor) -> tuple[Tensor, float, Tensor]:
    """Cross entropy of each slide (S,) after calibration, and slope and biases of `calibrate`."""
    slope, bias = calibrate(logits, labels)
    return cross_entropy(logits * slope + bias, labels, reduction="none"), slope, bias


def calibrate(logits: Tensor, labels: Tensor, weight: float = 1e-2) -> tuple[float, Tensor]:
    """Slope and biases of class scores of lowest cross entropy (Platt scaling with one slope).

    A slight penalty keeps them finite where the slides are separated without error.

    Args:
        logits: Class scores, (S, C).
        labels: Class indices, (S,).
        weight: Weight of the squared logarithm of the slope, and of the squared biases.

    Returns:
        The slope, above 0, and the biases (C,), whose sum is 0.
    """
    given = logits.double()
    parameters = torch.zeros(1 + logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        with torch.enable_grad():
            optimizer.zero_grad()
            scaled = given * parameters[0].exp() + parameters[1:] - parameters[1:].mean()
            value = cross_entropy(scaled, labels) + weight * parameters.square().sum()
            value.backward()
        return value.detach()

    optimizer.step(loss)
    found = parameters.detach()
    return float(found[0].exp()), (found[1:] - found[1:].mean()).float()


def judgments(folders: Sequence[Path]) -> pd.DataFrame:
    """How cascades compared with random tiles on validation slides, one row per folder of `fit_cascade`."""
    rules = [rule for folder in folders if (rule := read_run(folder).cascade) is not None]
    return pd.DataFrame([rule.judged | {"screening": rule.screening} for rule in rules])
