"""LIPN: a small network that selects on the thumbnail which tiles to read (paper: LIPN)."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, pad

from hdmil_lib.devices import widest
from hdmil_lib.errors import BagError
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.ragged import bag_argmax

PATCH_SIZE = 16


class PatchBatchNorm(nn.BatchNorm2d):
    """Batch normalization that uses the running statistics for a batch of one patch.

    The last feature maps of LIPN are 1x1, so a single patch has no variance to normalize by.
    """

    running_mean: Tensor
    running_var: Tensor

    def forward(self, maps: Tensor) -> Tensor:
        if self.training and len(maps) == 1:
            return batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(maps)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution that is computed as a matrix product per channel on maps of at most 2x2.

    A kernel of 5x5 on a map of 2x2 covers mostly padding. On a CPU the matrix product is ten times faster
    there than a convolution, forward and backward.
    """

    padding: tuple[int, ...]

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        if height * width > 4:
            return super().forward(maps)
        rows, columns = self._taps(height), self._taps(width)
        matrices = self.weight[:, 0, rows[:, None, :, None], columns[None, :, None, :]]
        return (maps[:, :, None, None] * matrices).sum(
            (-2, -1)
        )  # (N, C, out, out, in, in), summed over inputs

    def _taps(self, size: int) -> Tensor:
        """Index along an axis of the weight between each output and each input, (outputs, inputs)."""
        ends = torch.arange(size, device=self.weight.device)
        return ends - ends[:: self.stride[0], None] + self.padding[0]


class ConvBlock(nn.Sequential):
    """Convolution, batch normalization and, if `act`, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, act: bool = True
    ):
        kind = DepthwiseConv if groups > 1 else nn.Conv2d
        conv = kind(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
        norm = PatchBatchNorm(outputs)
        super().__init__(conv, norm, *([nn.ReLU()] if act else []))

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution."""
        return cast(nn.Conv2d, self[0])

    @property
    def norm(self) -> PatchBatchNorm:
        """The batch normalization."""
        return cast(PatchBatchNorm, self[1])


class UniversalInvertedBottleneck(nn.Sequential):
    """MobileNetV4's block: depthwise, expand, depthwise with the stride, project."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expansion: int):
        hidden = inputs * expansion
        super().__init__(
            ConvBlock(inputs, inputs, size, groups=inputs, act=False),
            ConvBlock(inputs, hidden, 1),
            ConvBlock(hidden, hidden, size, stride, groups=hidden),
            ConvBlock(hidden, outputs, 1, act=False),
        )


class LIPN(nn.Module):
    """Lightweight instance pre-screening network: 16x16 patches at 8 um/px to one logit per branch.

    With two classes it has 33,898 parameters and takes 127,648 multiply-adds per patch. Branch c keeps a
    patch where sigmoid(logit_c) > gamma.
    """

    def __init__(self, n_classes: int = 2):
        super().__init__()
        self.n_classes = n_classes
        self.stem = nn.Sequential(
            ConvBlock(3, 16, 3, stride=2),
            ConvBlock(16, 16, 3, stride=2),
            ConvBlock(16, 16, 1),
            ConvBlock(16, 48, 3, stride=2),
            ConvBlock(48, 24, 1),
        )
        self.blocks = nn.Sequential(
            UniversalInvertedBottleneck(24, 48, size=5, stride=2, expansion=2),
            UniversalInvertedBottleneck(48, 64, size=3, stride=2, expansion=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = ConvBlock(64, 64, 1)
        self.classifier = nn.Linear(64, n_classes)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits P of the branches, (N, C), of uint8 RGB patches (N, 16, 16, 3).

        Raises:
            BagError: The patches have another shape or type.
        """
        self._check(patches)
        pixels = patches.permute(0, 3, 1, 2).float() / 255 - 0.5
        return self.classifier(self.head(self.pool(self.blocks(self.stem(pixels)))).flatten(1))

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: one, with all weights."""
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
        """Convert the frozen network to the matrices and biases that `kernels.lipn_forward` takes.

        Layers without an activation between them, batch normalization included, make one matrix: their
        outputs for every unit vector. Maps are laid out by row, column and channel.
        """
        layers = [module for module in self.modules() if isinstance(module, ConvBlock)]
        stem, block, last = layers[:5], layers[5:9], layers[9:13]
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

    The tiles to read are the union over branches. If no branch keeps a tile of a bag, the tile of highest
    score is kept, so that every slide is classified.

    Args:
        logits: P, (N, C).
        thresholds: One number per branch (C,), or one for all.
        segments: The B bags.

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
def thresholds_for_keep_ratio(scores: Iterable[Tensor], keep_ratio: float) -> Tensor:
    """Thresholds on LIPN's sigmoid, one per branch, that keep a given share of tiles, averaged over slides.

    The rate loss does not determine the share that is kept at gamma, and often one branch keeps nearly all of
    it. Here every branch keeps its highest tiles, the same share of all tiles for each branch, as large as
    the union over branches allows. Labels are not needed.

    All slides have the same weight, shared equally by their tiles. In each branch the rank of a tile is the
    weight of the tiles that score at least as high, as a share of all. If all branches keep the tiles of rank
    below q, the union consists of the tiles whose best rank over branches is below q. So the tiles enter the
    union in the order of their best rank, and q is the best rank of the first tile that exceeds the share.

    Args:
        scores: Sigmoid of LIPN's logits for each slide, (N, C).
        keep_ratio: r, the share of tiles to keep.

    Returns:
        Thresholds (C,), where the scores are.
    """
    slides = list(scores)
    number: dict[str, Any] = {"dtype": widest(slides[0].device), "device": slides[0].device}
    weight = torch.cat([torch.full((len(s),), 1 / (len(s) * len(slides)), **number) for s in slides])
    ordered, order = torch.cat(slides).sort(dim=0, descending=True)
    rank = torch.empty(ordered.shape, **number).scatter_(0, order, weight[order].cumsum(0))
    best_rank, entering = rank.amin(1).sort()
    n_kept = (weight[entering].cumsum(0) <= keep_ratio + 1e-9).sum(0, keepdim=True)
    q = pad(best_rank, (0, 1), value=torch.inf)[n_kept]
    kept = (rank < q).sum(0, keepdim=True)
    ends = torch.ones(1, ordered.shape[1], **number)
    bounds = torch.cat((ends, ordered.to(ends.dtype), 0 * ends))
    # Halfway between the last kept and the next score.
    return ((bounds.gather(0, kept) + bounds.gather(0, kept + 1)) / 2)[0]


def one_per_branch(thresholds: float | Sequence[float] | Tensor, n_classes: int) -> Tensor:
    """Thresholds as float32 (C,)."""
    given: Any = thresholds.tolist() if hasattr(thresholds, "tolist") else thresholds
    values = [float(given)] * n_classes if isinstance(given, float | int) else list(given)
    if len(values) != n_classes or not all(isinstance(value, float | int) for value in values):
        shape = tuple(torch.as_tensor(thresholds).shape)
        raise ValueError(
            f"thresholds have shape {shape}, expected one number, or one for each of {n_classes} branches"
        )
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f"thresholds are {given}, expected numbers from 0 to 1")
    return torch.tensor(values, dtype=torch.float32)


def _matrix(layers: Sequence[ConvBlock], side: int, channels: int) -> tuple[Tensor, Tensor]:
    """Weight (inputs, outputs) and bias of convolutions with their normalizations, without activations."""
    device = layers[0].conv.weight.device
    units = torch.eye(side * side * channels, device=device, dtype=torch.float64)
    maps = torch.cat((torch.zeros_like(units[:1]), units)).view(-1, side, side, channels).permute(0, 3, 1, 2)
    for layer in layers:
        conv, norm = layer.conv, layer.norm
        maps = conv2d(maps, conv.weight.double(), None, conv.stride, conv.padding, 1, conv.groups)
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        maps = (maps - norm.running_mean.double()[:, None, None]) * scale[:, None, None]
        maps = maps + norm.bias.double()[:, None, None]
    flat = maps.permute(0, 2, 3, 1).flatten(1)
    return flat[1:] - flat[0], flat[0]
