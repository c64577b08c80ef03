"""Anytime prediction: tiles are read in the order of LIPN's scores, with a prediction after each block.

A model with a second look reads those first that both networks find most suspicious.

DMIN pools with a softmax over tiles, so its prediction follows from sums. `RunningDMIN` updates these sums
block by block without computing anything twice; after the last tile the prediction is that of DMIN on the
whole bag. The first tiles are not a random sample but the most suspicious ones, so the more tiles are unread,
the more certain the prediction must be to stop. Reading stops when the lead of the first class over the
second, in log odds, reaches a margin times the share of unread tiles, or when a budget is spent. The margin
is learned on other slides (`rules.learn_margin`).

A model with a second look knows from validation slides what answer of all tiles is to be expected
(`models.settling`). Its predictions are these, and the margin is multiplied by their spread.
"""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hdmil_lib import devices
from hdmil_lib.bags import Bag
from hdmil_lib.encoders.encoding import encode_blocks
from hdmil_lib.errors import BagError, SlideError
from hdmil_lib.inference.prediction import stage
from hdmil_lib.inference.slides import check_bag, grid_of, look_scores, running_on
from hdmil_lib.kernels.random import bits_at
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import DMIN, HDMIL
from hdmil_lib.slides import Slide, TileGrid

if TYPE_CHECKING:
    from hdmil_lib.encoders.loading import Encoder

BLOCK = 32
"""Default number of tiles per block."""


class RunningDMIN:
    """Prediction of DMIN on the tiles of one slide read so far.

    For each branch it holds the highest logit of a kept tile, the sums of exp(A - highest) and of
    exp(A - highest) F over kept tiles, and the tile of highest attention, which is used if the branch keeps
    no tile. Its memory does not grow with the number of tiles.

    Args:
        dmin: The classifier, in evaluation mode.
    """

    def __init__(self, dmin: DMIN):
        c, e, device = dmin.n_classes, dmin.settings.embed_dim, dmin.feature_mean.device
        self.dmin, self.n_tiles = dmin, 0
        self._highest = torch.full((c,), -torch.inf, device=device)
        self._weight, self._sum = torch.zeros(c, device=device), torch.zeros(c, e, device=device)
        self._best, self._best_tile = self._highest.clone(), self._sum.clone()

    @torch.inference_mode()
    def update(self, features: Tensor) -> Tensor:
        """Add the features of further tiles, (n, D) with n >= 1; return the class probabilities (C,)."""
        output = self.dmin(features)
        attention, embeddings = output.attention, output.embeddings
        self.n_tiles += len(features)

        best, row = attention.max(0)
        better = best > self._best
        self._best_tile = torch.where(better[:, None], embeddings[row], self._best_tile)
        self._best = torch.maximum(best, self._best)

        kept = torch.ones_like(attention) if output.mask is None else output.mask
        logits = attention.masked_fill(kept == 0, -torch.inf)
        highest = torch.maximum(self._highest, logits.amax(0))
        shift = highest.nan_to_num(neginf=0.0)  # for a branch that has kept no tile yet
        share, weights = (self._highest - shift).exp(), (logits - shift).exp()
        self._weight = self._weight * share + weights.sum(0)
        self._sum = self._sum * share[:, None] + weights.T @ embeddings
        self._highest = highest
        return self.probabilities

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities given the tiles read so far, (C,)."""
        empty = (self._weight == 0)[:, None]
        pooled = torch.where(empty, self._best_tile, self._sum / self._weight.clamp(min=1e-30)[:, None])
        with torch.inference_mode():
            return self.dmin.score(pooled[None])[0].softmax(0)


@dataclass(frozen=True, eq=False)
class AnytimeStep:
    """Prediction of a slide after a block of tiles.

    Attributes:
        rows: Tiles read so far, in the order in which they were read, int64 (n,).
        n_tiles: Number of tiles of the slide.
        probabilities: Class probabilities, float32 (C,).
        seconds: Seconds since the slide was opened, by stage as in `Prediction`; "crop" is the sum over all
            reading threads, which run in parallel to the encoder.
        end: Why this is the last step: "margin", "all tiles", "max_tiles" or "max_seconds"; else `None`.
        broken: Those of the tiles that could not be read and were ignored, int64.
    """

    rows: np.ndarray
    n_tiles: int
    probabilities: np.ndarray
    seconds: dict[str, float]
    end: str | None
    broken: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def stream(
    model: HDMIL,
    slide_path: str | Path,
    *,
    margin: float | None = None,
    max_tiles: int | None = None,
    max_seconds: float | None = None,
    mpp: float | tuple[float, float] | None = None,
    device: str | torch.device = "auto",
    block: int = BLOCK,
    n_readers: int = 1,
    allow_upsampling: bool = False,
) -> Generator[AnytimeStep, None, None]:
    """Classify a slide block by block in the order of LIPN's scores, with a prediction after each block.

    It ends when the lead of the first class over the second, in log odds, reaches the margin times the
    share of unread tiles, when a budget is spent, or with the last tile. To stop earlier, close the generator
    or leave its loop. Damaged tiles are ignored.

    Args:
        model: The model; it is set to evaluation mode.
        slide_path: The slide file.
        margin: Margin, more than 0, infinite to read everything; by default that of the model, see
            `rules.learn_margin`.
        max_tiles: Largest number of tiles to read.
        max_seconds: Number of seconds after which no further block is read.
        mpp: Micrometers per level-0 pixel, if the file does not say or is wrong.
        device: Device on which networks and encoder run; see `HDMIL.predict`.
        block: Number of tiles per block; a margin is valid for the block size that it was learned with.
        n_readers: Number of threads that read ahead while the encoder runs, at most `n_readers` + 1 blocks.
        allow_upsampling: Whether the slide may be much coarser than the model's tiles.

    Raises:
        ValueError: A budget is not positive, or the margin is out of range; raised at the call.
        SlideError: The slide cannot be read, has no scale, is smaller than a tile or has no tissue.
        CheckpointError: The model does not know its encoder, or the encoder has changed.
        HDMILError: There is no such device.
    """
    for name, budget in (("max_tiles", max_tiles), ("max_seconds", max_seconds)):
        if budget is not None and not budget > 0:
            raise ValueError(f"{name} is {budget}, expected more than 0")
    margin = float(model.margin) if margin is None else margin
    if not margin > 0:
        raise ValueError(f"margin is {margin}, expected more than 0")
    device = devices.prefer(device, model.device)
    with running_on(model, device):
        encoder, info = model.encoder, model.known_info

    def steps() -> Generator[AnytimeStep, None, None]:
        start, seconds = time.perf_counter(), dict[str, float]()
        with running_on(model, device), Slide(slide_path, mpp) as slide:
            with stage(seconds, "thumbnail"):
                grid = grid_of(slide, info, allow_upsampling)
            with stage(seconds, "lipn"):
                scores = lipn_scores(model, grid.patches)
            if model.looks_again:
                with stage(seconds, "look"):
                    scores = looked_scores(model, slide, grid, encoder, n_readers)
            order = np.argsort(-scores, kind="stable")[:max_tiles]
            # Within a block tiles are read in the order of the file, since neighbors share stored tiles.
            rows = np.concatenate([np.sort(order[i : i + block]) for i in range(0, len(order), block)])
            running, n_read, broken = RunningDMIN(model.dmin), 0, np.empty(0, np.int64)
            blocks = encode_blocks(
                slide,
                grid,
                rows,
                encoder,
                batch_size=block,
                n_readers=n_readers,
                strict=False,
                seconds=seconds,
            )
            with closing(blocks):
                for features in blocks:
                    lost = np.isnan(features).all(axis=1)
                    broken = np.concatenate((broken, rows[n_read : n_read + len(features)][lost]))
                    n_read += len(features)
                    features = features[~lost]
                    with stage(seconds, "dmin"):
                        if len(features):
                            running.update(torch.from_numpy(features).to(model.device))
                        if running.n_tiles == 0:
                            continue
                        answer = running.probabilities.cpu().numpy()
                        probabilities, spread = model.expected(answer, n_read / len(grid))
                    spent = time.perf_counter() - start
                    ends = {
                        "all tiles": n_read == len(grid),
                        "margin": bool(may_stop(probabilities, spread, margin)),
                        "max_tiles": n_read == len(rows),
                        "max_seconds": max_seconds is not None and spent >= max_seconds,
                    }
                    end = next((name for name, reached in ends.items() if reached), None)
                    all_seconds = seconds | {"total": spent}
                    yield AnytimeStep(rows[:n_read], len(grid), probabilities, all_seconds, end, broken)
                    if end:
                        return
            raise SlideError(f"{slide.path}: none of the {len(rows)} tiles to read can be read")

    return steps()


@torch.inference_mode()
def lipn_scores(model: HDMIL, patches: np.ndarray) -> np.ndarray:
    """Score by which tiles are ranked: the highest sigmoid of LIPN over branches, float32 (N,).

    With `screening="random"` it is a random number.
    """
    if model.screening == "random":
        drawn = bits_at(0, torch.arange(len(patches)), 1)[:, 0]
        return (drawn.double() / 2**32 + 0.5).float().numpy()
    logits = model.lipn_logits(torch.from_numpy(patches).to(model.device))
    return logits.sigmoid().amax(1).cpu().numpy()


@torch.inference_mode()
def looked_scores(
    model: HDMIL, slide: Slide, grid: TileGrid, encoder: "Encoder", n_readers: int
) -> np.ndarray:
    """Score by which tiles are ranked after a second look, float32 (N,); see `ranked`."""
    patches = torch.from_numpy(grid.patches).to(model.device)
    logits = model.lipn_logits(patches)
    mask = model.screen(patches, Segments([len(grid)], model.device), logits)
    return ranked(look_scores(model, slide, grid, mask, logits, encoder, n_readers=n_readers), logits)


def ranked(scores: Tensor, lipn_logits: Tensor) -> np.ndarray:
    """Scores that rank tiles that were looked at by this score, and the others behind them by LIPN's, (N,).

    Args:
        scores: Scores of the second look, (N,), -inf for tiles that it did not see.
        lipn_logits: LIPN's logits, (N, C).
    """
    behind = lipn_logits.amax(1) - lipn_logits.max() + scores[scores.isfinite()].amin() - 1
    return torch.where(scores == -torch.inf, behind, scores).float().cpu().numpy()


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Predictions of one slide after each block of tiles.

    Attributes:
        n_read: Number of tiles read after each block, int64 (T,).
        probabilities: Class probabilities after each block, float32 (T, C).
        spread: What the margin is multiplied by after each block, (T,), 0 after the last; by default the
            share of tiles that are not read yet.
    """

    n_read: np.ndarray
    probabilities: np.ndarray
    spread: np.ndarray | None = None

    def stop(self, margin: float) -> int:
        """Index of the first block after which reading may stop, at latest the last one."""
        spread = 1 - self.n_read / self.n_read[-1] if self.spread is None else self.spread
        return int(np.flatnonzero(may_stop(self.probabilities, spread, margin))[0])


def may_stop(probabilities: np.ndarray, spread: np.ndarray | float, margin: float) -> np.ndarray:
    """Whether the lead reaches the margin times the spread.

    Args:
        probabilities: Class probabilities, (..., C).
        spread: Share of the tiles that are not read, or with a second look the standard deviation that the
            lead still has, (...); at 0 reading may always stop.
        margin: Margin, more than 0; infinite to read everything.
    """
    spread = np.asarray(spread)
    return (spread <= 0) | (lead(probabilities) >= margin * np.maximum(spread, 1e-12))


def lead(probabilities: np.ndarray) -> np.ndarray:
    """Log odds of the most probable class against the second: (..., C) to (...), at least 0."""
    first_two = np.sort(np.asarray(probabilities, np.float64), axis=-1)[..., -2:]
    return np.diff(np.log(first_two.clip(min=1e-37)))[..., 0]


def trajectory(model: HDMIL, bag: Bag, block: int = BLOCK) -> Trajectory:
    """Predictions that `stream` would make on the slide of a bag, as `rules.learn_margin` takes them.

    Args:
        model: The model; it is set to evaluation mode.
        bag: Bag of the slide.
        block: Number of tiles per block.

    Raises:
        BagError: The bag was made by another encoder, or has no patches.
        CheckpointError: The model does not know its encoder.
    """
    model.eval()
    check_bag(model, bag)
    order = torch.from_numpy(np.argsort(-_bag_scores(model, bag), kind="stable"))
    features = torch.from_numpy(np.asarray(bag.features, np.float32))
    running = RunningDMIN(model.dmin)
    blocks = [features[rows].to(model.device) for rows in order.split(block)]
    answers = [running.update(rows).cpu().numpy() for rows in blocks]
    n_read = np.minimum(np.arange(1, len(answers) + 1) * block, len(features))
    pairs = zip(answers, n_read / len(features), strict=True)
    expected = [model.expected(answer, float(share)) for answer, share in pairs]
    return Trajectory(
        n_read, np.stack([p for p, _ in expected]), np.array([spread for _, spread in expected])
    )


@torch.inference_mode()
def _bag_scores(model: HDMIL, bag: Bag) -> np.ndarray:
    """Score by which the tiles of a bag are ranked, float32 (N,)."""
    if not model.looks_again:
        return lipn_scores(model, bag.known_patches)
    assert model.look is not None
    if (looks := bag.looks.get(model.look.side)) is None:
        raise BagError(
            f"bag {bag.slide_id} has no look of {model.look.side} pixels; extract its slide with "
            f"`--look {model.look.side}`"
        )
    patches = torch.from_numpy(bag.known_patches).to(model.device)
    logits = model.lipn_logits(patches)
    shown = model.screen(patches, Segments([len(bag)], model.device), logits).any(1)
    given = torch.from_numpy(np.asarray(looks, np.float32)).to(model.device)
    scores = model.look(given, logits.amax(1)).masked_fill(~shown, -torch.inf)
    return ranked(scores, logits)
