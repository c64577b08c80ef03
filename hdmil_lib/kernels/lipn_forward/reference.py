"""The frozen LIPN, its layers folded and joined (paper: LIPN)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

LAYERS = {  # name -> shape of its weight; a bias of the last size follows each
    "first": (3, 48, 128),  # three input rows of 16 RGB pixels -> one row of 8 pixels, 16 channels
    "second": (3, 128, 64),  # three of those rows -> one row of 4 pixels, 16 channels
    "point": (64, 64),  # the same row, pixel by pixel
    "third": (4, 64, 192),  # all four rows -> 2 x 2 pixels, 48 channels
    "reduce": (192, 96),  # 24 channels
    "expand": (96, 192),  # first block: depthwise 5x5 and expansion
    "shrink": (192, 48),  # its second depthwise convolution, to one pixel
    "widen": (48, 96),  # its projection; second block: depthwise and expansion
    "scale": (96, 96),  # its second depthwise convolution: of one pixel, a diagonal
    "head": (96, 64),  # its projection, and the head
}  # and the classifier, (64, C)


CHUNK = 1024  # patches at a time: their activations stay in the cache of a CPU core


def lipn_forward(patches: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Logits (N, C), as `kernels.lipn_forward` describes them.

    The first two layers, on maps of 16 and 8 pixels, as convolutions; the others, on maps of four and fewer,
    as the products with their matrices.
    """
    return torch.cat([_forward(chunk, weights) for chunk in patches.split(CHUNK)])


def _forward(patches: Tensor, weights: Sequence[Tensor]) -> Tensor:
    first, b1, second, b2, point, b3, third, b4, *dense = weights
    x = patches.permute(0, 3, 1, 2).to(first.dtype).div(255).sub(0.5)
    x = conv2d(x, _filters(first, 3), b1[:16], stride=2, padding=1).relu()
    x = conv2d(x, _filters(second, 16), b2[:16], stride=2, padding=1).relu()
    x = (x.permute(0, 2, 3, 1).flatten(2) @ point + b3).relu()
    x = (x.flatten(1) @ third.flatten(0, 1) + b4).relu()
    *hidden, classifier, bias = dense
    for weight, shift in zip(hidden[::2], hidden[1::2], strict=True):
        x = (x @ weight + shift).relu()
    return linear(x, classifier.T, bias)


def _filters(rows: Tensor, channels: int) -> Tensor:
    """The 3x3 filters (16, channels, 3, 3) in a matrix of rows: what makes pixel 1 of pixels 1 to 3."""
    return rows.reshape(3, -1, channels, rows.shape[2] // 16, 16)[:, 1:4, :, 1].permute(3, 2, 0, 1)
