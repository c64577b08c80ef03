"""What LIPN may learn from a trained DMIN instead of its masks: how much each tile says about the diagnosis.

The paper's targets are DMIN's masks. These keep tissue of every kind, as DMIN is free to select most tiles
and each branch its own, so that 16x16 pixels tell little about them. `evidence` scores a tile by what DMIN
would conclude from it alone.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from hdmil_lib.models import DMIN
from hdmil_lib.models.ragged import bag_mean
from hdmil_lib.training.losses import Terms
from hdmil_lib.training.ragged import RaggedBags

LIPNTarget = Literal["mask", "evidence"]


def lipn_targets(
    target: LIPNTarget, dmin: DMIN, data: RaggedBags, slide_ids: Sequence[str], labels: Mapping[str, int]
) -> dict[str, Tensor]:
    """What LIPN should say of the tiles of each slide, by slide_id.

    Args:
        target: "mask" is M_HR, what DMIN selects for each branch, (N, C); "evidence" is (N,), see
            `evidence_targets`.
        dmin: Trained classifier, in evaluation mode.
        data: Holds the features of the slides.
        slide_ids: Those to give targets for.
        labels: Class index by slide_id.

    Raises:
        ValueError: The target is unknown, or a DMIN without self-distillation has no masks.
    """
    if target == "evidence":
        return evidence_targets(dmin, data, slide_ids, labels)
    if target != "mask":
        raise ValueError(f"target is {target!r}, expected {' or '.join(map(repr, get_args(LIPNTarget)))}")
    if not dmin.settings.self_distillation:
        raise ValueError("a DMIN without self-distillation selects no tiles that LIPN could learn from")
    with torch.no_grad():
        return {slide_id: data.forward(dmin, [slide_id]).mask for slide_id in slide_ids}


@torch.no_grad()
def evidence_targets(
    dmin: DMIN, data: RaggedBags, slide_ids: Sequence[str], labels: Mapping[str, int]
) -> dict[str, Tensor]:
    """How much each tile alone tells a DMIN in evaluation mode about its slide's class, between 0 and 1.

    e = [p_y > q_y] sigmoid(max_c A_c) KL(p || q) / max_c(-ln q_c). Here p is what DMIN says of the tile
    as a bag of one, q the mean of p over the tiles of a slide and then over slides, and y the slide's class.
    Tissue that all slides have is close to q: which classes have tiles of their own need not be known. The
    attention counts because the heads learn from what it lets through. A tile that speaks for another class
    than that of its slide is an error of DMIN, and 0.

    Args:
        dmin: Trained classifier, in evaluation mode.
        data: Holds the features of the slides.
        slide_ids: Those to give targets for; they define q.
        labels: Class index by slide_id.

    Returns:
        (N,) by slide_id.
    """
    attention, alone = {}, {}
    for slide_id in slide_ids:
        features = data.take("features", [slide_id])
        output = dmin(features, torch.arange(len(features) + 1))
        attention[slide_id] = output.attention.amax(1).sigmoid()
        alone[slide_id] = output.logits.log_softmax(1)
    usual = torch.stack([tiles.exp().mean(0) for tiles in alone.values()]).mean(0).log()
    targets = {}
    for slide_id, tiles in alone.items():
        y = labels[slide_id]
        divergence = (tiles.exp() * (tiles - usual)).sum(1) / -usual.min()
        targets[slide_id] = attention[slide_id] * divergence * (tiles[:, y] > usual[y])
    return targets


def evidence_loss(logits: Tensor, target: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Terms]:
    """Binary cross entropy between the sigmoid of every branch and the evidence of the tile.

    All branches learn the same, so that none spends the budget of tiles on an order of its own.

    Args:
        logits: P, LIPN's output, (N, C).
        target: Between 0 and 1, (N,).
        cu_seqlens: Where each bag starts and the last one ends, (B + 1,).

    Returns:
        The mean over branches, tiles of a bag, and bags; and as a term without gradient, `evidence`.
    """
    errors = binary_cross_entropy_with_logits(logits, target[:, None].expand_as(logits), reduction="none")
    loss = bag_mean(errors.mean(1), cu_seqlens).mean()
    return loss, {"evidence": loss.detach()}


def turn_patches(patches: Tensor) -> Tensor:
    """Each patch (N, 16, 16, 3) in one of the eight positions of a square, drawn for itself."""
    flip_rows, flip_columns, transpose = torch.randint(0, 2, (3, len(patches), 1, 1, 1)).bool()
    patches = torch.where(flip_rows, patches.flip(1), patches)
    patches = torch.where(flip_columns, patches.flip(2), patches)
    return torch.where(transpose, patches.transpose(1, 2), patches)
