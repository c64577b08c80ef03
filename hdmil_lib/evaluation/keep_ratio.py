"""What is lost when fewer tiles are read, and how much of it depends on who chooses them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hdmil_lib.data import Cohort, read_splits
from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.features.bagstore import Bag, read_tile_labels
from hdmil_lib.models import DMIN, LIPN
from hdmil_lib.models.ragged import bag_of_tile
from hdmil_lib.training.crossval import load_fold
from hdmil_lib.training.ragged import RaggedBags

KEEP_RATIOS = (1.0, 0.6, 0.3, 0.1, 0.05)
TUMOR_SHARE = 0.5
"""A tile with at least this share of tumor is a tumor tile, as for `metrics.tumor_recall`."""


def score_by_keep_ratio(
    cohort: Cohort,
    bags: Mapping[str, Bag],
    run_dir: str | Path,
    *,
    method: str = "hdmil",
    part: Literal["test", "val"] = "test",
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    n_draws: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """AUC and tumor recall of DMIN on the tiles of each slide that different sources rank highest.

    Every slide keeps the same share of its tiles, at least one, and DMIN sees these alone. Sources are
    "DMIN attention" (the highest over branches, which needs all tiles to be read), "LIPN" (the highest over
    branches), "random", and where all slides have tile labels "ground truth" (the share of tumor). Equal
    tiles come in random order; "random" and "ground truth" are means over draws of it.

    Args:
        cohort: Labels, and the files of the bags, which hold the tile labels.
        bags: Bags by slide_id.
        run_dir: Of a `run_crossval` with `method`.
        method: Whose DMIN and LIPN are used; see `load_fold`.
        part: Slides of each fold to score: the test or the validation part.
        keep_ratios: Shares of tiles to keep, more than 0 and at most 1.
        n_draws: Of random orders.
        seed: Of these.

    Returns:
        One row a source, fold and ratio: `source`, `fold`, `keep_ratio`, `auc`, and `tumor_recall`, the mean
        over slides with tumor tiles, nan without tile labels.

    Raises:
        ValueError: A keep ratio is out of range.
        CheckpointError: A fold was not run.
        CohortError: A fold's slides miss a class.
    """
    if wrong := [ratio for ratio in keep_ratios if not 0 < ratio <= 1]:
        raise ValueError(f"keep_ratios has {wrong[0]}, expected numbers above 0 and at most 1")
    labels = dict(zip(cohort.slide_ids, cohort.labels.tolist(), strict=True))
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for fold, split in enumerate(read_splits(Path(run_dir) / "splits")):
        slide_ids = getattr(split, part)
        dmin, lipn, _ = load_fold(run_dir, fold, method)
        data = RaggedBags(bags, slide_ids, ("features", "patches"))
        scores = {
            "DMIN attention": attention_scores(dmin, data, slide_ids),
            "LIPN": lipn_scores(lipn, data, slide_ids),
        }
        table = score_rankings(
            dmin,
            data,
            slide_ids,
            labels,
            scores,
            tumor_share(cohort, slide_ids),
            keep_ratios=keep_ratios,
            n_draws=n_draws,
            generator=generator,
        )
        table.insert(1, "fold", fold)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def score_rankings(
    dmin: DMIN,
    data: RaggedBags,
    slide_ids: Sequence[str],
    labels: Mapping[str, int],
    scores: Mapping[str, Tensor],
    tumor: Tensor | None,
    *,
    keep_ratios: Sequence[float],
    n_draws: int,
    generator: torch.Generator,
) -> pd.DataFrame:
    """The same for one DMIN, S slides with N tiles together, and any rankings of these.

    Args:
        dmin: Classifier, in evaluation mode.
        data: Holds the features of the slides.
        slide_ids: Those to score.
        labels: Class index by slide_id.
        scores: By source, high for tiles to keep, (N,) each; "random" and "ground truth" join them.
        tumor: Share of tumor in each tile (N,), if known.
        keep_ratios: Shares of tiles to keep.
        n_draws: Of random orders.
        generator: Of these.

    Returns:
        Columns `source`, `keep_ratio`, `auc`, `tumor_recall`.
    """
    truth, cu_seqlens = [labels[s] for s in slide_ids], data.cu_seqlens(slide_ids)
    rankings = [(source, score, 1) for source, score in scores.items()]
    rankings.append(("random", torch.zeros(int(cu_seqlens[-1])), n_draws))
    if tumor is not None:
        rankings.append(("ground truth", tumor, n_draws))
    rows = []
    for source, score, draws in rankings:
        places = [place_in_bag(score, cu_seqlens, generator) for _ in range(draws)]
        for ratio in keep_ratios:
            kept = [place < n_kept(cu_seqlens, ratio)[bag_of_tile(cu_seqlens)] for place in places]
            aucs = [auc(truth, probabilities(dmin, data, slide_ids, mask)) for mask in kept]
            recalls = [_recall(mask, tumor, cu_seqlens) for mask in kept]
            row = {"source": source, "keep_ratio": ratio, "auc": np.mean(aucs)}
            rows.append(row | {"tumor_recall": np.mean(recalls)})
    return pd.DataFrame(rows)


def place_in_bag(scores: Tensor, cu_seqlens: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Place of each tile in its bag by falling score (N,): 0 for the highest, equals in random order."""
    order = torch.randperm(len(scores), generator=generator)
    order = order[scores[order].argsort(descending=True, stable=True)]
    bag = bag_of_tile(cu_seqlens)
    order = order[bag[order].argsort(stable=True)]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order)) - cu_seqlens[bag]
    return places


def n_kept(cu_seqlens: Tensor, keep_ratio: float) -> Tensor:
    """Tiles that each bag keeps (B,): the nearest number to its share, and at least one."""
    return (keep_ratio * cu_seqlens.diff().double()).round().clamp(min=1)


@torch.inference_mode()
def attention_scores(dmin: DMIN, data: RaggedBags, slide_ids: Sequence[str]) -> Tensor:
    """DMIN's highest attention logit over branches for the tiles of these slides (N,)."""
    return torch.cat([data.forward(dmin, chunk).attention.amax(1) for chunk in data.chunks(slide_ids)])


@torch.inference_mode()
def lipn_scores(lipn: LIPN, data: RaggedBags, slide_ids: Sequence[str]) -> Tensor:
    """LIPN's highest logit over branches for the tiles of these slides (N,)."""
    return torch.cat([lipn(data.take("patches", chunk)).amax(1) for chunk in data.chunks(slide_ids)])


@torch.inference_mode()
def probabilities(dmin: DMIN, data: RaggedBags, slide_ids: Sequence[str], kept: Tensor) -> np.ndarray:
    """Class probabilities (S, C) of the slides when DMIN sees the kept tiles, bool (N,), alone."""
    logits, first = [], 0
    for chunk in data.chunks(slide_ids):
        cu_seqlens = data.cu_seqlens(chunk)
        end = first + int(cu_seqlens[-1])
        rows = kept[first:end].nonzero()[:, 0]
        logits.append(dmin(data.take("features", chunk)[rows], torch.searchsorted(rows, cu_seqlens)).logits)
        first = end
    return torch.cat(logits).double().softmax(1).numpy()


def tumor_share(cohort: Cohort, slide_ids: Sequence[str]) -> Tensor | None:
    """Share of tumor in the tiles of these slides (N,); `None` where a bag has no tile labels."""
    shares = [read_tile_labels(cohort.bag_path(slide_id)) for slide_id in slide_ids]
    return None if any(share is None for share in shares) else torch.from_numpy(np.concatenate(shares))


def _recall(kept: Tensor, share: Tensor | None, cu_seqlens: Tensor) -> float:
    """Share of its tumor tiles that a slide keeps, averaged over slides that have any."""
    if share is None:
        return float("nan")
    bag, tumor = bag_of_tile(cu_seqlens), share >= TUMOR_SHARE
    n_bags = len(cu_seqlens) - 1
    total, found = (torch.bincount(bag[tiles], minlength=n_bags) for tiles in (tumor, tumor & kept))
    return float((found[total > 0] / total[total > 0]).mean())
