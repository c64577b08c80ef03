"""AUC and tumor recall when fewer tiles are read, by what chooses the tiles."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from hdmil_lib.bags import Bag, read_tile_labels
from hdmil_lib.batches import BagDataset
from hdmil_lib.cohort import Cohort
from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import DMIN, HDMIL
from hdmil_lib.training.trained import CrossValidation

KEEP_RATIOS = (1.0, 0.6, 0.3, 0.1, 0.05)
TUMOR_SHARE = 0.5
"""Smallest share of tumor of a tumor tile, as in `metrics.tumor_recall`."""


def score_by_keep_ratio(
    cv: CrossValidation,
    cohort: Cohort,
    bags: Mapping[str, Bag],
    *,
    method: str = "hdmil",
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    n_draws: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Score DMIN on the tiles of each test slide that different sources rank highest.

    Every slide keeps the same share of its tiles, at least one tile, and DMIN reads only these. Sources are
    "DMIN attention" (the highest over branches, for which all tiles must be read), "LIPN" (the highest logit
    over branches), "random", and, if all slides have tile labels, "ground truth" (the share of tumor). Tiles
    with equal scores are in random order; "random" and "ground truth" are means over several such orders.

    Do not choose between LIPNs by the scores on the validation slides of all folds, since these together are
    all the test slides. Choose on slides that `Cohort.set_aside` took out before.

    Args:
        cv: Cross-validation with `method`.
        cohort: Cohort of the cross-validation, whose bag files hold the tile labels.
        bags: Bags by slide_id.
        method: Method whose DMIN and LIPN are used.
        keep_ratios: Shares of tiles to keep, more than 0 and at most 1.
        n_draws: Number of random orders.
        seed: Seed of the random orders.

    Returns:
        One row per source, fold and keep ratio: `source`, `fold`, `keep_ratio`, `auc`, and `tumor_recall`,
        the mean over slides with tumor tiles, nan without tile labels.

    Raises:
        ValueError: A keep ratio is out of range.
        CheckpointError: A fold was not run.
        CohortError: A class is missing among the test slides of a fold.
    """
    if wrong := [ratio for ratio in keep_ratios if not 0 < ratio <= 1]:
        raise ValueError(f"keep_ratios has {wrong[0]}, expected numbers above 0 and at most 1")
    data = BagDataset(bags, cohort.label_of)
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for fold, split in enumerate(cv.splits):
        model = cv.hdmil(fold, method)
        scores = {
            "DMIN attention": attention_scores(model.dmin, data, split.test),
            "LIPN": lipn_scores(model, data, split.test),
        }
        table = score_rankings(
            model.dmin,
            data,
            split.test,
            scores,
            tile_tumor_shares(cohort, split.test),
            keep_ratios=keep_ratios,
            n_draws=n_draws,
            generator=generator,
        )
        table.insert(1, "fold", fold)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def score_rankings(
    dmin: DMIN,
    data: BagDataset,
    slide_ids: Sequence[str],
    scores: Mapping[str, Tensor],
    tumor: Tensor | None,
    *,
    keep_ratios: Sequence[float],
    n_draws: int,
    generator: torch.Generator,
) -> pd.DataFrame:
    """Score one DMIN on the tiles that different sources rank highest, for slides with N tiles together.

    Args:
        dmin: Classifier, in evaluation mode.
        data: Bags and labels of the slides.
        slide_ids: The slides to score.
        scores: Scores of the tiles by source, (N,) each; tiles with high scores are kept. "random" and, with
            `tumor`, "ground truth" are added.
        tumor: Share of tumor in each tile (N,), if known.
        keep_ratios: Shares of tiles to keep.
        n_draws: Number of random orders.
        generator: Generator of the random orders.

    Returns:
        One row per source and keep ratio: `source`, `keep_ratio`, `auc`, `tumor_recall`.
    """
    truth = [data.labels[s] for s in slide_ids]
    segments = Segments([data.length(s) for s in slide_ids])
    rankings = [(source, score, 1) for source, score in scores.items()]
    rankings.append(("random", torch.zeros(segments.n_tiles), n_draws))
    if tumor is not None:
        rankings.append(("ground truth", tumor, n_draws))
    rows = []
    for source, score, draws in rankings:
        places = [place_in_bag(score, segments, generator) for _ in range(draws)]
        for ratio in keep_ratios:
            kept = [place < n_kept(segments, ratio)[segments.bag] for place in places]
            aucs = [auc(truth, probabilities(dmin, data, slide_ids, mask)) for mask in kept]
            recalls = [_recall(mask, tumor, segments) for mask in kept]
            row = {"source": source, "keep_ratio": ratio, "auc": np.mean(aucs)}
            rows.append(row | {"tumor_recall": np.mean(recalls)})
    return pd.DataFrame(rows)


def place_in_bag(scores: Tensor, segments: Segments, generator: torch.Generator | None = None) -> Tensor:
    """Rank of each tile in its bag by score (N,), 0 for the highest; equal scores are in random order."""
    order = torch.randperm(len(scores), generator=generator)
    order = order[scores[order].argsort(descending=True, stable=True)]
    order = order[segments.bag[order].argsort(stable=True)]
    places = torch.empty_like(order)
    places[order] = segments.place
    return places


def n_kept(segments: Segments, keep_ratio: float) -> Tensor:
    """Number of tiles that each bag keeps (B,): the nearest to the keep ratio, and at least one."""
    return (keep_ratio * segments.sizes.double()).round().clamp(min=1)


@torch.inference_mode()
def attention_scores(dmin: DMIN, data: BagDataset, slide_ids: Sequence[str]) -> Tensor:
    """DMIN's attention logit of each tile of these slides (N,), the highest over branches."""
    batches = data.batches(slide_ids)
    return torch.cat([dmin(batch.features, batch.segments).attention.amax(1) for batch in batches])


@torch.inference_mode()
def tile_evidence(dmin: DMIN, data: BagDataset, slide_ids: Sequence[str], class_index: int = 1) -> Tensor:
    """How strongly each tile of these slides speaks for a class (N,), as a bag of its own.

    It is the log odds of the class for that bag, without what the tile's attention is beside others.
    """
    scores = []
    for batch in data.batches(slide_ids):
        logits = dmin(batch.features, Segments([1] * batch.segments.n_tiles, batch.features.device)).logits
        others = torch.cat((logits[:, :class_index], logits[:, class_index + 1 :]), 1)
        scores.append(logits[:, class_index] - others.logsumexp(1))
    return torch.cat(scores)


def within_slide_auc(scores: Tensor, share: Tensor, segments: Segments) -> np.ndarray:
    """AUC by which scores tell tumor tiles from the other tiles of their slide, of slides that have both.

    Args:
        scores: (N,).
        share: Share of tumor in each tile, (N,); a tile is tumor from `TUMOR_SHARE` upwards. Tiles with less
            tumor, but some, are left out.
        segments: The slides.
    """
    aucs = []
    for slide_scores, slide_share in zip(
        scores.split(segments.lengths), share.split(segments.lengths), strict=True
    ):
        clear = (slide_share == 0) | (slide_share >= TUMOR_SHARE)
        tumor = (slide_share[clear] > 0).numpy()
        if 0 < tumor.sum() < len(tumor):
            aucs.append(roc_auc_score(tumor, slide_scores[clear].numpy()))
    return np.array(aucs)


@torch.inference_mode()
def lipn_scores(model: HDMIL, data: BagDataset, slide_ids: Sequence[str]) -> Tensor:
    """LIPN's logit of each tile of these slides (N,), the highest over branches."""
    batches = data.batches(slide_ids)
    patches = (batch.inputs_for(model)["patches"] for batch in batches)
    return torch.cat([model.lipn_logits(chunk).amax(1) for chunk in patches])


@torch.inference_mode()
def probabilities(dmin: DMIN, data: BagDataset, slide_ids: Sequence[str], kept: Tensor) -> np.ndarray:
    """Class probabilities (S, C) of the slides if DMIN reads only the kept tiles, bool (N,)."""
    logits, first = [], 0
    for batch in data.batches(slide_ids):
        end = first + batch.segments.n_tiles
        rows = kept[first:end].nonzero()[:, 0]
        segments = Segments.from_offsets(torch.searchsorted(rows, batch.segments.offsets))
        logits.append(dmin(batch.features[rows], segments).logits)
        first = end
    return torch.cat(logits).double().softmax(1).numpy()


def tile_tumor_shares(cohort: Cohort, slide_ids: Sequence[str]) -> Tensor | None:
    """Share of tumor in each tile of these slides (N,); `None` if a bag has no tile labels."""
    known = []
    for slide_id in slide_ids:
        share = read_tile_labels(cohort.bag_path(slide_id))
        if share is None:
            return None
        known.append(share)
    return torch.from_numpy(np.concatenate(known))


def _recall(kept: Tensor, share: Tensor | None, segments: Segments) -> float:
    """Share of the tumor tiles of a slide that are kept, averaged over slides that have any."""
    if share is None:
        return float("nan")
    tumor = share >= TUMOR_SHARE
    total, found = (
        torch.bincount(segments.bag[tiles], minlength=segments.n_bags) for tiles in (tumor, tumor & kept)
    )
    return float((found[total > 0] / total[total > 0]).mean())
