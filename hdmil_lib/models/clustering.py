"""Instance clustering: tiles of highest attention stand for the class, those of lowest do not."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.ragged import pad


def smooth_top1_svm(logits: Tensor, labels: Tensor) -> Tensor:
    """Smooth top-1 SVM loss of two classes, temperature 1, margin 1.

    With z = other - true logit: log(1 + e^(1 + z)), and the hinge max(0, 1 + z) where |z| > ln 1000.

    Args:
        logits: (B, 2).
        labels: (B,), 0 or 1.

    Returns:
        One loss per row, (B,).
    """
    difference = logits[:, 1] - logits[:, 0]
    z = torch.where(labels == 0, difference, -difference)
    return torch.where(z.abs() > math.log(1000), (1 + z).relu(), softplus(1 + z))


def instance_clustering_loss(
    heads: Sequence[nn.Module],
    embeddings: Tensor,
    attention: Tensor,
    labels: Tensor,
    segments: Segments,
    *,
    k: int,
    subtyping: bool = False,
) -> Tensor:
    """L_clu: smooth top-1 SVM loss of instance classifiers on the tiles at both ends of the attention.

    On the branch of the true class the k tiles of highest attention are labeled 1 and the k lowest 0.
    With `subtyping`, the k highest of every other branch are labeled 0 as well. k is at most half the
    bag and at least 1; in a bag of one tile that tile is both the highest and the lowest.

    Args:
        heads: One instance classifier per branch, (n, E) to (n, 2).
        embeddings: F, (N, E).
        attention: A, (N, C).
        labels: Class of each bag, (B,).
        segments: Where each of the B bags lies.
        k: Tiles at each end.
        subtyping: Every class has tiles of its own.

    Returns:
        Mean over the branches that take part, then over bags: a scalar.
    """
    ks = (segments.sizes // 2).clamp(1, k)
    place = torch.arange(min(max(segments.longest // 2, 1), k), device=ks.device)
    takes = place < ks.unsqueeze(1)
    total = embeddings.new_zeros(len(labels))
    for branch, head in enumerate(heads):
        scores = attention[:, branch].detach()
        of_class = labels == branch
        highest = _ends(scores, segments, len(place))
        lowest = _ends(-scores, segments, len(place))
        part = takes if subtyping else takes & of_class.unsqueeze(1)
        low_part = takes & of_class.unsqueeze(1)
        tiles = torch.cat((highest[part], lowest[low_part]))
        if not len(tiles):
            continue
        positive = of_class.unsqueeze(1).expand_as(takes)[part]
        targets = torch.cat((positive, positive.new_zeros(int(low_part.sum())))).long()
        bag = torch.arange(len(labels), device=ks.device).unsqueeze(1).expand_as(takes)
        bag = torch.cat((bag[part], bag[low_part]))
        n_tiles = torch.where(of_class, 2 * ks, ks)[bag]
        total = total.index_add(0, bag, smooth_top1_svm(head(embeddings[tiles]), targets) / n_tiles)
    return total.mean() / (len(heads) if subtyping else 1)


def _ends(scores: Tensor, segments: Segments, k: int) -> Tensor:
    """Rows, among all tiles, of each bag's k tiles of highest score, (B, k); shorter bags have fewer."""
    return pad(scores, segments, -torch.inf).topk(k, dim=1).indices + segments.offsets[:-1].unsqueeze(1)
