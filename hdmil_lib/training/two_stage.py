"""LIPN before DMIN: which tiles it keeps, what DMIN says of them, and where to cut its scores."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hdmil_lib.models import DMIN, LIPN, DMINOutput

Threshold = float | Sequence[float]


@torch.inference_mode()
def two_stage(
    dmin: DMIN,
    lipn: LIPN,
    features: Tensor,
    patches: Tensor,
    threshold: Threshold,
    *,
    lipn_pools: bool = False,
) -> tuple[DMINOutput, Tensor]:
    """What the two-stage inference says of a bag whose features are all at hand.

    LIPN decides which tiles are read: the union over branches. Of these DMIN selects by itself, as it does
    without LIPN. The paper's branches pool the tiles that LIPN kept for them instead (`lipn_pools`), though
    DMIN has then seen each at full resolution; on synthetic slides that costs accuracy (notebook 06).

    Args:
        dmin: Classifier, in evaluation mode.
        lipn: Pre-screening network, in evaluation mode.
        features: (N, D).
        patches: uint8 (N, 16, 16, 3).
        threshold: A tile is kept for a branch where LIPN's sigmoid exceeds it; one number, or one a branch.
        lipn_pools: Branch c pools the tiles that LIPN keeps for branch c.

    Returns:
        DMIN's output on the kept tiles alone, and the share of tiles kept, a scalar.
    """
    mask = lipn_mask(lipn(patches), threshold)
    kept = mask.any(1)
    return dmin(features[kept], mask=mask[kept] if lipn_pools else None), kept.float().mean()


def lipn_mask(logits: Tensor, threshold: Threshold) -> Tensor:
    """Tiles kept for each branch, bool (N, C): sigmoid above the threshold, or else the single highest."""
    scores = logits.sigmoid()
    mask = scores > torch.as_tensor(threshold)
    if not mask.any():
        mask.view(-1)[scores.argmax()] = True
    return mask


@torch.inference_mode()
def calibrate_thresholds(lipn: LIPN, patches: Iterable[Tensor], keep_ratio: float) -> list[float]:
    """Thresholds on LIPN's sigmoid, one a branch, that keep a given share of tiles, averaged over slides.

    The rate loss leaves the share at gamma to chance, and often gives one branch all of it; this sets it on
    slides whose labels are not needed. Every branch keeps its highest tiles, the same share of all tiles for
    each, as large as the union over branches allows. A tile weighs one over its slide's number of tiles.

    Args:
        lipn: Trained network; put into evaluation mode.
        patches: Of each slide, uint8 (N, 16, 16, 3).
        keep_ratio: r.
    """
    lipn.eval()
    scores = [lipn(slide).sigmoid() for slide in patches]
    weight = torch.cat(
        [torch.full((len(s),), 1 / (len(s) * len(scores)), dtype=torch.float64) for s in scores]
    )
    ordered, order = torch.cat(scores).sort(dim=0, descending=True)
    share = torch.empty_like(
        ordered, dtype=torch.float64
    )  # of tiles that score at least as high in the branch
    share.scatter_(0, order, weight[order].cumsum(0))
    needed, first = share.amin(1).sort()
    n_kept = int((weight[first].cumsum(0) <= keep_ratio + 1e-9).sum())
    too_much = needed[n_kept] if n_kept < len(needed) else torch.inf
    ends = torch.ones(1, ordered.shape[1], dtype=torch.float64)
    bounds = torch.cat((ends, ordered.double(), 0 * ends))
    kept = (share < too_much).sum(0).tolist()
    return [float(bounds[n : n + 2, c].mean()) for c, n in enumerate(kept)]
