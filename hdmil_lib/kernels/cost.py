"""What each operator costs at least: arithmetic, not measurement.

A fused operator reads every input once and writes every output once. The textbook form in PyTorch also
writes and reads each intermediate tensor, one pass an operation; its formula stands in each docstring. On a
GPU most operators here are bound by those bytes, so their ratio is what fusion can win at most.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A processor as the roofline sees it: attainable rates, a second."""

    name: str
    bytes: float
    matrix_flops: float
    vector_flops: float


H100 = Device("H100 SXM", bytes=3.0e12, matrix_flops=800e12, vector_flops=60e12)


@dataclass(frozen=True)
class Cost:
    """One call of an operator.

    Attributes:
        fused_bytes: Inputs and outputs, once each.
        eager_bytes: The same, and every intermediate tensor written and read.
        flops: Multiplications and additions.
        matrix: Most of them are matrix products, which tensor cores do.
    """

    fused_bytes: float
    eager_bytes: float
    flops: float
    matrix: bool = False

    def seconds(self, device: Device, *, fused: bool = True) -> float:
        """The roofline: whichever takes longer, memory or arithmetic."""
        rate = device.matrix_flops if self.matrix else device.vector_flops
        return max((self.fused_bytes if fused else self.eager_bytes) / device.bytes, self.flops / rate)

    @property
    def intensity(self) -> float:
        """Operations a byte of the fused form."""
        return self.flops / self.fused_bytes


def chebyshev_kan(rows: int, inputs: int, outputs: int, degree: int, width: int = 2) -> Cost:
    """einsum(cos(k * acos(tanh(x))), coefficients); `width` is bytes a number."""
    x, terms = rows * inputs, degree + 1
    ends = x + inputs * outputs * terms + rows * outputs
    between = 2 * x + x + x * terms + 2 * x * terms + x * terms  # tanh and acos, times k, cos, product
    return Cost(width * ends, width * (ends + x + between), x * terms * (2 * outputs + 3))


def gated_attention(tiles: int, embed_dim: int, hidden: int, branches: int, width: int = 2) -> Cost:
    """[tanh(F V) * sigmoid(F U)] W."""
    f, h, a = tiles * embed_dim, tiles * hidden, tiles * branches
    ends = f + 2 * hidden * embed_dim + branches * hidden + a
    between = f + 2 * h + 2 * h + 2 * h + 3 * h + h  # F again, tanh, sigmoid, product, scores
    return Cost(width * ends, width * (ends + between), 4 * f * hidden + 2 * h * branches, matrix=True)


def gated_attention_pool(tiles: int, embed_dim: int, hidden: int, branches: int, width: int = 2) -> Cost:
    """softmax([tanh(F V) * sigmoid(F U)] W, over tiles)^T F."""
    f, h, a = tiles * embed_dim, tiles * hidden, tiles * branches
    weights = 2 * hidden * embed_dim + branches * hidden
    ends = f + weights + a + branches * embed_dim
    between = (
        f + 2 * h + 2 * h + 2 * h + 3 * h + h + 3 * a + f
    )  # F again, tanh, sigmoid, product, scores, pool
    flops = 4 * f * hidden + 2 * h * branches + 2 * f * branches
    return Cost(width * ends, width * (ends + between), flops, matrix=True)


def segment_softmax_pool(tiles: int, embed_dim: int, branches: int, width: int = 2) -> Cost:
    """(softmax over tiles of the kept logits)^T F: F is read once either way, and nothing is to be won."""
    f, a = tiles * embed_dim, tiles * branches
    ends = f + 2 * a + branches * embed_dim
    return Cost(width * ends, width * (ends + 12 * a), 2 * f * branches, matrix=True)


def gumbel_mask(tiles: int, branches: int, width: int = 4) -> Cost:
    """Noise, sum, division, sigmoid, comparison, straight-through, union: some twenty passes over (N, C)."""
    a = tiles * branches
    return Cost(width * 2 * a, width * 22 * a, 30 * a)


def tile_preprocess(tiles: int, side: int = 256, width: int = 2, *, stain: bool = False) -> Cost:
    """((x.float() / 255 - mean) / std).permute(...).to(type): four passes in float32.

    Stain normalization before it: + 1, / 256, log, matrix, exp, * 256, - 1, clip.
    """
    values = 3 * tiles * side * side
    passes = 3 + 8 * stain
    flops = (2 + 50 * stain) * values  # three 3x3 products, logarithm and exponential of some 15 each
    return Cost(values * (1 + width), values * (1 + 4 + 8 * passes + 4 + width), flops)


def tissue_statistics(pixels: int) -> Cost:
    """Histograms of hue, saturation and value of RGB bytes; textbook: planes of 4 bytes, some 25 passes.

    Copies of the channels, three maxima and minima, chroma, saturation (2), hue in three cases (9), bins of
    three planes (6), their places among all histograms and the count of these.
    """
    return Cost(3 * pixels, pixels * (3 + 12 + 25 * 8), 80 * pixels)


LIPN_MULTIPLY_ADDS = 377_472  # a patch, as matrix products; its convolutions have 127,648
LIPN_ACTIVATIONS = 2_576  # numbers that its layers write for a patch


def lipn_forward(patches: int, branches: int = 2, width: int = 2) -> Cost:
    """Fourteen convolutions, their batch norms and activations: three passes over each map."""
    ends = 768 * patches + width * branches * patches + width * 162_304
    flops = 2 * LIPN_MULTIPLY_ADDS * patches
    return Cost(ends, ends + width * 6 * LIPN_ACTIVATIONS * patches, flops, matrix=True)


def selective_scan(batch: int, length: int, channels: int, states: int = 16, width: int = 2) -> Cost:
    """Textbook: the (B, L, D, N) tensors exp(delta A), delta B x and h, in float32."""
    tokens = batch * length
    ends = width * (3 * tokens * channels + 2 * tokens * states)
    return Cost(ends, ends + 4 * 6 * tokens * channels * states, 8 * tokens * channels * states)


def s4d_convolution(batch: int, length: int, channels: int, states: int = 16, width: int = 4) -> Cost:
    """Textbook: the complex (D, S, L) tensors l dt A, their exponential and its product with C."""
    tokens, response = batch * length * channels, length * channels
    transforms = 2 * response + 8 * tokens  # K written and read; spectra of twice the length, both ways
    ends = width * (2 * tokens + transforms + channels * (4 * states + 2))
    flops = 4 * response * states + 5 * 6 * tokens * math.log2(max(2 * length, 2))
    return Cost(ends, ends + 8 * 6 * response * states, flops)
