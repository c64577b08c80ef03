"""LIPN: a tiny network that sees the thumbnail and says which tiles are worth reading (paper: LIPN)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d

from hdmil_lib.errors import BagError
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.ragged import bag_argmax

PATCH_SIZE = 16


class PatchBatchNorm(nn.BatchNorm2d):
    """Batch normalization that uses the running statistics for a batch of one patch.

    The last maps of LIPN are 1x1, so a single patch has no variance to normalize by.
    """

    def forward(self, maps: Tensor) -> Tensor:
        if self.training and len(maps) == 1:
            return batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(maps)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution that treats maps of at most 2x2 as one small matrix per channel.

    A kernel of 5x5 on a map of 2x2 is mostly padding, and convolution libraries are slow at it: on a CPU the
    matrix is ten times faster, forward and backward.
    """

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        if height * width > 4:
            return super().forward(maps)
        rows, columns = self._taps(height), self._taps(width)
        matrices = self.weight[:, 0, rows[:, None, :, None], columns[None, :, None, :]]
        return (maps[:, :, None, None] * matrices).sum((-2, -1))  # (N, C, out, out, in, in), inputs added

    def _taps(self, size: int) -> Tensor:
        """Which weight along an axis links an output to an input: (outputs, inputs)."""
        ends = torch.arange(size, device=self.weight.device)
        return ends - ends[:: self.stride[0], None] + self.padding[0]


def _conv(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    kind = DepthwiseConv if groups > 1 else nn.Conv2d
    conv = kind(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, PatchBatchNorm(outputs), *([nn.ReLU()] if act else []))


class UniversalInvertedBottleneck(nn.Sequential):
    """MobileNetV4's block: depthwise, expand, depthwise with the stride, project."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expansion: int):
        hidden = inputs * expansion
        super().__init__(
            _conv(inputs, inputs, size, groups=inputs, act=False),
            _conv(inputs, hidden, 1),
            _conv(hidden, hidden, size, stride, groups=hidden),
            _conv(hidden, outputs, 1, act=False),
        )


class LIPN(nn.Module):
    """Lightweight instance pre-screening network: 16x16 patches at 8 um/px to one logit for each branch.

    With two classes it has 33,898 parameters and takes 127,648 multiply-adds per patch. A patch is kept
    for branch c where sigmoid(logit_c) > gamma. In training, a bag of one patch is normalized by the
    running statistics.
    """

    def __init__(self, n_classes: int = 2):
        super().__init__()
        self.n_classes = n_classes
        self.stem = nn.Sequential(
            _conv(3, 16, 3, stride=2),
            _conv(16, 16, 3, stride=2),
            _conv(16, 16, 1),
            _conv(16, 48, 3, stride=2),
            _conv(48, 24, 1),
        )
        self.blocks = nn.Sequential(
            UniversalInvertedBottleneck(24, 48, size=5, stride=2, expansion=2),
            UniversalInvertedBottleneck(48, 64, size=3, stride=2, expansion=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = _conv(64, 64, 1)
        self.classifier = nn.Linear(64, n_classes)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits P of the branches, (N, C), of uint8 RGB patches (N, 16, 16, 3).

        Raises:
            BagError: If the patches have another shape or type.
        """
        self._check(patches)
        pixels = patches.permute(0, 3, 1, 2).float() / 255 - 0.5
        return self.classifier(self.head(self.pool(self.blocks(self.stem(pixels)))).flatten(1))

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: all weights together."""
        return [{"params": list(self.parameters())}]

    @staticmethod
    def _check(patches: Tensor) -> None:
        if patches.dtype != torch.uint8 or patches.shape[1:] != (PATCH_SIZE, PATCH_SIZE, 3):
            raise BagError(
                f"patches are {patches.dtype} of shape {tuple(patches.shape)}, expected torch.uint8 of shape "
                f"(n_tiles, {PATCH_SIZE}, {PATCH_SIZE}, 3): RGB at 8 um/px, as TileGrid.patches has them"
            )

    @torch.no_grad()
    def packed(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The frozen network as the matrices and biases that `kernels.lipn_forward` multiplies with.

        Each linear layer, batch normalization included and layers without an activation between them
        together, is applied to every unit vector; maps are laid out by row, column and channel.
        """
        stem, (block, last) = self.stem, self.blocks
        first, b1 = _matrix([stem[0]], 16, 3)
        second, b2 = _matrix([stem[1]], 8, 16)
        point, b3 = _matrix([stem[2]], 4, 16)
        third, b4 = _matrix([stem[3]], 4, 16)
        rows = [
            (first.view(16, 48, 8, 128)[1:4, :, 1], b1[:128]),  # rows 1 to 3 make row 1, and so on
            (second.view(8, 128, 4, 64)[1:4, :, 1], b2[:64]),
            (point[:64, :64], b3[:64]),
            (third.view(4, 64, 192), b4),
        ]
        dense = [
            _matrix([stem[4]], 2, 48),
            _matrix([block[0], block[1]], 2, 24),
            _matrix([block[2]], 2, 48),
            _matrix([block[3], last[0], last[1]], 1, 48),
            _matrix([last[2]], 1, 96),
            _matrix([last[3], self.head], 1, 96),
            (self.classifier.weight.T, self.classifier.bias),
        ]
        return [t.detach().to(dtype).contiguous() for layer in rows + dense for t in layer]


def keep_mask(logits: Tensor, thresholds: Tensor | float, segments: Segments) -> Tensor:
    """Tiles that LIPN keeps for each branch: M_LR,c = [sigmoid(P_c) > threshold_c] (paper: inference).

    The tiles to read are the union over branches. A bag of which no branch keeps anything keeps its single
    tile of highest score, so that every slide gets an answer.

    Args:
        logits: P, (N, C).
        thresholds: One number per branch (C,), or one for all.
        segments: Where each of the B bags lies.

    Returns:
        bool (N, C).
    """
    scores = logits.sigmoid()
    mask = scores > torch.as_tensor(thresholds, dtype=scores.dtype, device=scores.device)
    n_kept = scores.new_zeros(segments.n_bags).index_add(0, segments.bag, mask.any(1).to(scores.dtype))
    highest, branch = scores.max(1)
    best = bag_argmax(highest, segments)
    place = (best, branch[best])
    return mask.index_put(place, mask[place] | (n_kept == 0))


@torch.inference_mode()
def thresholds_for_keep_ratio(scores: Iterable[Tensor], keep_ratio: float) -> list[float]:
    """Thresholds on LIPN's sigmoid, one per branch, that keep a given share of tiles, averaged over slides.

    The rate loss leaves the share at gamma to chance, and often gives one branch all of it; this sets it on
    slides whose labels are not needed. Every branch keeps its highest tiles, the same share of all tiles for
    each, as large as the union over branches allows.

    Every slide has weight 1, shared equally by its tiles. In each branch a tile has a rank: the weight of the
    tiles that score at least as high, as a share of all. When all branches keep the tiles of rank below q, a
    tile is in the union exactly if its best rank over branches is below q. So the tiles sorted by best rank
    enter the union one after the other, and q is the best rank of the first one that is too many.

    Args:
        scores: Sigmoid of LIPN's logits for each slide, (N, C).
        keep_ratio: r, the share of tiles to keep.
    """
    slides = list(scores)
    weight = torch.cat(
        [torch.full((len(s),), 1 / (len(s) * len(slides)), dtype=torch.float64) for s in slides]
    )
    ordered, order = torch.cat(slides).cpu().sort(dim=0, descending=True)
    rank = torch.empty_like(ordered, dtype=torch.float64)
    rank.scatter_(0, order, weight[order].cumsum(0))
    best_rank, entering = rank.amin(1).sort()
    n_kept = int((weight[entering].cumsum(0) <= keep_ratio + 1e-9).sum())
    q = best_rank[n_kept] if n_kept < len(best_rank) else torch.inf
    kept = (rank < q).sum(0).tolist()
    ends = torch.ones(1, ordered.shape[1], dtype=torch.float64)
    bounds = torch.cat((ends, ordered.double(), 0 * ends))  # halfway between the last kept and the next score
    return [float(bounds[n : n + 2, branch].mean()) for branch, n in enumerate(kept)]


def _matrix(layers: list[nn.Sequential], side: int, channels: int) -> tuple[Tensor, Tensor]:
    """Convolutions with normalization, without activations: a weight (inputs, outputs) and a bias."""
    weight = layers[0][0].weight
    units = torch.eye(side * side * channels, device=weight.device, dtype=torch.float64)
    maps = torch.cat((torch.zeros_like(units[:1]), units)).view(-1, side, side, channels).permute(0, 3, 1, 2)
    for conv, norm, *_ in layers:
        maps = conv2d(maps, conv.weight.double(), None, conv.stride, conv.padding, 1, conv.groups)
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        maps = (maps - norm.running_mean.double()[:, None, None]) * scale[:, None, None]
        maps = maps + norm.bias.double()[:, None, None]
    flat = maps.permute(0, 2, 3, 1).flatten(1)
    return flat[1:] - flat[0], flat[0]
