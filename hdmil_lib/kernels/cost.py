"""Bounds of what each operator costs, calculated rather than measured.

A fused operator reads every input once and writes every output once. The textbook form in PyTorch also
writes and reads each intermediate tensor, in one pass per operation; each docstring gives its formula. On a
GPU most of these operators are limited by memory bandwidth, so the ratio of the bytes is the largest speedup
that fusion can give: a `Cost` says both. What our kernels really move is counted in `work.py`.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A processor in the roofline model.

    Attributes:
        name: Name of the processor.
        bytes: Attainable memory bandwidth in bytes per second.
        matrix_flops: Attainable rate of its matrix units in operations per second.
        vector_flops: Attainable rate of its other units in operations per second.
    """

    name: str
    bytes: float
    matrix_flops: float
    vector_flops: float


H100 = Device("H100 SXM", bytes=3.0e12, matrix_flops=800e12, vector_flops=60e12)


@dataclass(frozen=True)
class Cost:
    """Cost of one call of an operator.

    Attributes:
        fused_bytes: Bytes of inputs and outputs, each moved once.
        eager_bytes: Bytes of inputs, outputs, and every intermediate tensor, written and read.
        flops: Number of multiplications and additions.
        matrix: Whether most of the operations are matrix products, which run on matrix units.
    """

    fused_bytes: float
    eager_bytes: float
    flops: float
    matrix: bool = False

    def seconds(self, device: Device, *, fused: bool = True) -> float:
        """Return the time by the roofline model: that of memory or arithmetic, whichever is longer."""
        rate = device.matrix_flops if self.matrix else device.vector_flops
        return max((self.fused_bytes if fused else self.eager_bytes) / device.bytes, self.flops / rate)

    @property
    def intensity(self) -> float:
        """Operations per byte of the fused form."""
        return self.flops / self.fused_bytes


def chebyshev_kan(rows: int, inputs: int, outputs: int, degree: int, width: int = 2) -> Cost:
    """Count einsum(cos(k * acos(tanh(x))), coefficients); `width` is the number of bytes per number."""
    x, terms = rows * inputs, degree + 1
    ends = x + inputs * outputs * terms + rows * outputs
    between = 2 * x + x + x * terms + 2 * x * terms + x * terms  # tanh and acos, times k, cos, product
    return Cost(width * ends, width * (ends + x + between), x * terms * (2 * outputs + 3))


def gated_attention(tiles: int, embed_dim: int, hidden: int, branches: int, width: int = 2) -> Cost:
    """Count [tanh(F V) * sigmoid(F U)] W."""
    f, h, a = tiles * embed_dim, tiles * hidden, tiles * branches
    ends = f + 2 * hidden * embed_dim + branches * hidden + a
    between = f + 2 * h + 2 * h + 2 * h + 3 * h + h  # F a second time, tanh, sigmoid, product, scores
    return Cost(width * ends, width * (ends + between), 4 * f * hidden + 2 * h * branches, matrix=True)


def gated_attention_pool(tiles: int, embed_dim: int, hidden: int, branches: int, width: int = 2) -> Cost:
    """Count softmax([tanh(F V) * sigmoid(F U)] W, over tiles)^T F."""
    f, h, a = tiles * embed_dim, tiles * hidden, tiles * branches
    weights = 2 * hidden * embed_dim + branches * hidden
    ends = f + weights + a + branches * embed_dim
    # F a second time, tanh, sigmoid, product, scores, pooling
    between = f + 2 * h + 2 * h + 2 * h + 3 * h + h + 3 * a + f
    flops = 4 * f * hidden + 2 * h * branches + 2 * f * branches
    return Cost(width * ends, width * (ends + between), flops, matrix=True)


def segment_softmax_pool(tiles: int, embed_dim: int, branches: int, width: int = 2) -> Cost:
    """Count (softmax over the kept tiles)^T F; F is read once in both forms, so fusion saves little."""
    f, a = tiles * embed_dim, tiles * branches
    ends = f + 2 * a + branches * embed_dim
    return Cost(width * ends, width * (ends + 12 * a), 2 * f * branches, matrix=True)


def gumbel_mask(tiles: int, branches: int, width: int = 4) -> Cost:
    """Count noise, sum, division, sigmoid, comparison and straight-through: twenty passes over (N, C)."""
    a = tiles * branches
    passes = 1 + 2 + 3 + 2 + 2 + 4 + 6  # uniform numbers, their logits, and the operations above
    return Cost(width * 2 * a, width * passes * a, 30 * a)


def self_distillation_pool(tiles: int, embed_dim: int, hidden: int, branches: int, width: int = 2) -> Cost:
    """Count `gated_attention_pool`, a mask of the tiles, and a second pooling of the same embeddings."""
    once = gated_attention_pool(tiles, embed_dim, hidden, branches, width)
    f, a = tiles * embed_dim, tiles * branches
    more = width * (a + branches * embed_dim)
    flops = once.flops + gumbel_mask(tiles, branches, width).flops + 2 * f * branches
    return Cost(once.fused_bytes + more, once.eager_bytes + more, flops, matrix=True)


def tile_preprocess(tiles: int, side: int = 256, width: int = 2, *, stain: bool = False) -> Cost:
    """Count ((x.float() / 255 - mean) / std).permute(...).to(type), four passes in float32.

    Stain normalization precedes it with + 1, / 256, log, matrix product, exp, * 256, - 1 and clip.
    """
    values = 3 * tiles * side * side
    passes = 3 + 8 * stain
    flops = (2 + 50 * stain) * values  # three 3x3 products, log and exp of about 15 operations each
    return Cost(values * (1 + width), values * (1 + 4 + 8 * passes + 4 + width), flops)


def tissue_statistics(pixels: int) -> Cost:
    """Count histograms of hue, saturation and value of RGB bytes, in about 25 passes over planes of 4 bytes.

    These are copies of the channels, maxima and minima (3), chroma, saturation (2), hue in three cases (9),
    bins of three planes (6), their positions among all histograms, and the counts.
    """
    return Cost(3 * pixels, pixels * (3 + 12 + 25 * 8), 80 * pixels)


LIPN_MULTIPLY_ADDS = 377_472  # per patch as matrix products; the convolutions have 127,648


LIPN_ACTIVATIONS = 2_576  # numbers that the layers write per patch


def lipn_forward(patches: int, branches: int = 2, width: int = 2) -> Cost:
    """Count fourteen convolutions with batch norms and activations, three passes over each map."""
    ends = 768 * patches + width * branches * patches + width * 162_304
    flops = 2 * LIPN_MULTIPLY_ADDS * patches
    return Cost(ends, ends + width * 6 * LIPN_ACTIVATIONS * patches, flops, matrix=True)


def selective_scan(batch: int, length: int, channels: int, states: int = 16, width: int = 2) -> Cost:
    """Count the scan; its textbook form has (B, L, D, N) tensors exp(delta A), delta B x and h in float32."""
    tokens = batch * length
    ends = width * (3 * tokens * channels + 2 * tokens * states)
    return Cost(ends, ends + 4 * 6 * tokens * channels * states, 8 * tokens * channels * states)


def s4d_convolution(batch: int, length: int, channels: int, states: int = 16, width: int = 4) -> Cost:
    """Count S4D; its textbook form has complex (D, S, L) tensors l dt A, exp(l dt A) and C exp(l dt A)."""
    tokens, response = batch * length * channels, length * channels
    transforms = 2 * response + 8 * tokens  # K written and read; spectra of twice the length, both ways
    ends = width * (2 * tokens + transforms + channels * (4 * states + 2))
    flops = 4 * response * states + 5 * 6 * tokens * math.log2(max(2 * length, 2))
    return Cost(ends, ends + 8 * 6 * response * states, flops)


def dmin_step(tiles: int, in_dim: int, embed_dim: int, width: int = 2) -> float:
    """Bytes that a training step of DMIN must move if two operators do it all, forward and backward.

    One is the projection with its ReLU and dropout, the other attention, selection and pooling. Features
    (N, D) are read in the forward pass and again for the gradient of the projection's weight. Embeddings
    (N, E) are written once, read once in the forward and once in the backward pass. The gradient of the
    projection before its ReLU, (N, E), is written and read. The hidden units of the attention are computed
    again, noise and dropout are functions of a seed, and all else is small. This makes N (2 D + 5 E) numbers
    of `width` bytes.
    """
    return width * tiles * (2 * in_dim + 5 * embed_dim)
