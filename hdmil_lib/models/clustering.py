"""Instance clustering: instance classifiers learn from the tiles of highest and of lowest attention."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hdmil_lib.kernels.segments import Segments, may_wait, to_device
from hdmil_lib.models.ragged import pad


def smooth_top1_svm(logits: Tensor, labels: Tensor) -> Tensor:
    """Smooth top-1 SVM loss of two classes, temperature 1, margin 1.

    With z = other - true logit: log(1 + e^(1 + z)), and the hinge max(0, 1 + z) where |z| > ln 1000.

    Args:
        logits: (n, 2).
        labels: 0 or 1, (n,).

    Returns:
        One loss per row, (n,).
    """
    difference = logits[:, 1] - logits[:, 0]
    z = torch.where(labels == 0, difference, -difference)
    return torch.where(z.abs() > math.log(1000), (1 + z).relu(), softplus(1 + z))


def instance_clustering_loss(
    heads: Sequence[nn.Module] | nn.ModuleList,
    pick: Callable[[Tensor], Tensor],
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
    bag and at least 1; in a bag with one tile that tile is both the highest and the lowest.

    Args:
        heads: One instance classifier per branch, (n, E) to (n, 2).
        pick: Returns the embeddings (n, E) of tiles, given their numbers, int64 (n,); `Projection.pick` for
            instance.
        attention: A, (N, C).
        labels: Class of each bag, (B,), on the host or with the attention. Without `subtyping`, the head of
            an absent class gets no gradient if they are on the host, else zeros.
        segments: The B bags.
        k: Largest number of tiles at each end.
        subtyping: Whether every class has tiles of its own.

    Returns:
        Mean over the branches that take part, then over bags: a scalar.
    """
    # The first n_ends[b] of the k columns of `ends` are used in bag b.
    n_ends = (segments.sizes // 2).clamp(1, k)
    k = min(max(segments.longest // 2, 1), k)
    ends = torch.arange(k, device=n_ends.device) < n_ends.unsqueeze(1)
    readable = may_wait(labels.device) and not subtyping
    present = set(labels.tolist()) if readable else range(len(heads))
    labels = to_device(labels, attention.device)
    bags = torch.arange(len(labels), device=n_ends.device)[None, :, None].expand(2, -1, k).flatten()
    rows, marks = [], []
    taking_part = [branch for branch in range(len(heads)) if branch in present]
    for branch in taking_part:
        # The lowest tiles are used in bags of this class only, with `subtyping` the highest in all bags.
        of_class = labels == branch
        low = ends & of_class.unsqueeze(1)
        high = ends if subtyping else low
        scores = attention[:, branch].detach()
        tiles = torch.stack((_top_k(scores, segments, k), _top_k(-scores, segments, k))).flatten()
        used = torch.stack((high, low)).flatten()
        # Label 1 is for the tiles of highest attention in bags of this class.
        targets = torch.stack((of_class, torch.zeros_like(of_class))).unsqueeze(2).expand(-1, -1, k).flatten()
        # Each bag counts the mean over its tiles: both ends in bags of this class, one end in others.
        counts = torch.where(of_class, 2 * n_ends, n_ends)
        if may_wait(used.device):  # the unused ones are left out
            chosen = used.nonzero()[:, 0]
        else:
            chosen = torch.arange(len(used), device=used.device)
        rows.append(tiles[chosen])
        marks.append((used[chosen], targets[chosen].long(), bags[chosen], counts))
    number = torch.promote_types(attention.dtype, torch.float32)
    total = attention.new_zeros(len(labels), dtype=number)
    # All branches pick their tiles at once: the gradient of an index is as large as all embeddings.
    picked = pick(torch.cat(rows)).split([len(tiles) for tiles in rows])
    for branch, tiles, (used, targets, bag, counts) in zip(taking_part, picked, marks, strict=True):
        losses = smooth_top1_svm(heads[branch](tiles), targets).to(number) / counts[bag]
        total = total.index_add(0, bag, losses.masked_fill(~used, 0))
    return total.mean() / (len(heads) if subtyping else 1)


def _top_k(scores: Tensor, segments: Segments, k: int) -> Tensor:
    """Rows, among all tiles, of the k highest scores of each bag, (B, k); padding behind shorter bags."""
    rows = pad(scores, segments, -torch.inf).topk(k, dim=1).indices + segments.offsets[:-1].unsqueeze(1)
    return rows.clamp(max=segments.n_tiles - 1)
