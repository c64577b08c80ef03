"""The frozen LIPN in plain PyTorch, with batch norms folded into its layers and adjacent layers merged."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

# Weight shapes of the layers before the classifier, whose weight is (64, C). Each has a bias too.
LAYERS = {
    "first": (3, 48, 128),  # three input rows of 16 RGB pixels -> one row of 8 pixels with 16 channels
    "second": (3, 128, 64),  # three of those rows -> one row of 4 pixels with 16 channels
    "point": (64, 64),  # pointwise convolution of that row
    "third": (4, 64, 192),  # all four rows -> 2 x 2 pixels with 48 channels
    "reduce": (192, 96),  # pointwise convolution to 24 channels
    "expand": (96, 192),  # first block: depthwise 5x5 convolution and expansion
    "shrink": (192, 48),  # first block: second depthwise convolution, to one pixel
    "widen": (48, 96),  # first block: projection; second block: depthwise convolution and expansion
    "scale": (96, 96),  # second block: second depthwise convolution, for one pixel a diagonal matrix
    "head": (96, 64),  # second block: projection; head
}

CHUNK = 1024  # patches per chunk, whose activations fit into the cache of a CPU core


def lipn_forward(patches: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return the logits (N, C) that `kernels.lipn_forward` describes.

    The first two layers, on maps 16 and 8 pixels wide, run as convolutions; the others, on maps at most four
    pixels wide, run as matrix products.
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
    """Return the 3x3 filters (16, channels, 3, 3) that a matrix of rows applies to pixels 1 to 3."""
    return rows.reshape(3, -1, channels, rows.shape[2] // 16, 16)[:, 1:4, :, 1].permute(3, 2, 0, 1)
