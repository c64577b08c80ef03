"""The first layer on a GPU: features are read in 16 bits, standardized in registers, and never written back.

In the forward pass a program computes a block of embeddings: for one block of features after another it
multiplies the standardized features by the weights. Bias, ReLU and dropout are applied before the block is
written, with one more bit per embedding that says whether it is above 0. The programs of the same tiles
follow each other, so that all but the first find the features in the L2 cache.

In the backward pass that bit tells that a unit was active and kept, so that neither the embeddings nor random
numbers are needed. A program multiplies the gradients of a share of the tiles by their standardized features,
for a block of the weight, and writes a partial sum; a last `sum` adds the shares.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.blocks import target_of
from hdmil_lib.kernels.elementary import random_bits
from hdmil_lib.kernels.gated_attention.gpu import drop_options
from hdmil_lib.kernels.gated_attention.reference import drop_level
from hdmil_lib.kernels.variants import Variant

PROGRAMS = 256  # number of programs that keeps a large GPU busy; the tiles are split into shares to reach it
SIZES = ("n_tiles", "share")  # differ from call to call and must not cause a recompilation


@triton.jit
def rows_of(rows, tile, n_tiles, GATHERED: tl.constexpr):
    """Return the rows of the features that belong to tiles, int64."""
    if GATHERED:
        return tl.load(rows + tile, tile < n_tiles, 0)
    return tile.to(tl.int64)


@triton.jit
def load_features(
    features, mean, std, row, tile, d, n_tiles, n_features, SCALED: tl.constexpr
):  # fmt: skip
    """Load standardized features (tiles, d) as float32, with zeros beyond the last tile and feature."""
    inside = (tile[:, None] < n_tiles) & (d[None, :] < n_features)
    x = tl.load(features + row[:, None] * n_features + d[None, :], inside, 0.0).to(tl.float32)
    if SCALED:
        center = tl.load(mean + d, d < n_features, 0.0).to(tl.float32)
        spread = tl.load(std + d, d < n_features, 1.0).to(tl.float32)
        x = tl.where(inside, (x - center[None, :]) / spread[None, :], 0.0)
    return x


@triton.jit(do_not_specialize=("n_tiles",))
def forward_kernel(
    features, rows, weight, bias, mean, std, embeddings, active, n_tiles, n_features, embed_dim,
    key, positions, level, scale,
    TILES: tl.constexpr, EMBED: tl.constexpr, FEATURES: tl.constexpr, GATHERED: tl.constexpr,
    BIASED: tl.constexpr, SCALED: tl.constexpr, DROPOUT: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Write a block of embeddings, and a bit for each: bit e % 32 of word e // 32."""
    e = tl.program_id(0) * EMBED + tl.arange(0, EMBED)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    row = rows_of(rows, tile, n_tiles, GATHERED)
    total = tl.zeros((TILES, EMBED), tl.float32)
    for start in range(0, n_features, FEATURES):
        d = start + tl.arange(0, FEATURES)
        x = load_features(features, mean, std, row, tile, d, n_tiles, n_features, SCALED)
        there = (e[None, :] < embed_dim) & (d[:, None] < n_features)
        w = tl.load(weight + e[None, :] * n_features + d[:, None], there, 0.0)
        total = tl.dot(x.to(w.dtype), w, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + e, e < embed_dim, 0.0).to(tl.float32)[None, :]
    total = tl.maximum(total, 0.0)
    if DROPOUT:
        position = rows_of(positions, tile, n_tiles, PLACED).to(tl.int32)
        words = random_bits(position[:, None] * embed_dim + e[None, :], key)
        total = tl.where((words & 0xFFFF) >= level, total * scale, 0.0)
    place = embeddings + tile.to(tl.int64)[:, None] * embed_dim + e[None, :]
    tl.store(place, total, (tile[:, None] < n_tiles) & (e[None, :] < embed_dim))
    flags = (total > 0).to(tl.int32) << (e % 32)[None, :]
    words = tl.sum(tl.reshape(flags, (TILES, EMBED // 32, 32)), 2)
    n_words = tl.cdiv(embed_dim, 32)
    word = tl.program_id(0) * (EMBED // 32) + tl.arange(0, EMBED // 32)
    place = active + tile.to(tl.int64)[:, None] * n_words + word[None, :]
    tl.store(place, words, (tile[:, None] < n_tiles) & (word[None, :] < n_words))


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad, active, features, rows, mean, std, weights, biases,
    n_tiles, n_features, embed_dim, share, scale,
    TILES: tl.constexpr, EMBED: tl.constexpr, FEATURES: tl.constexpr,
    GATHERED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Write partial sums over a share of the tiles: weights (shares, E, D) and biases (shares, E)."""
    e = tl.program_id(0) * EMBED + tl.arange(0, EMBED)
    d = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    split = tl.program_id(2)
    total = tl.zeros((EMBED, FEATURES), tl.float32)
    sums = tl.zeros((EMBED,), tl.float32)
    number = grad.dtype.element_ty
    n_words = tl.cdiv(embed_dim, 32)
    word = tl.program_id(0) * (EMBED // 32) + tl.arange(0, EMBED // 32)  # one read for 32 embeddings
    flagged = word[None, :] < n_words
    for start in range(split * share, tl.minimum((split + 1) * share, n_tiles), TILES):
        tile = start + tl.arange(0, TILES)
        row = rows_of(rows, tile, n_tiles, GATHERED)
        first, inside = tile.to(tl.int64)[:, None], (tile[:, None] < n_tiles) & (e[None, :] < embed_dim)
        flags = tl.load(active + first * n_words + word[None, :], flagged & (tile[:, None] < n_tiles), 0)
        flags = tl.reshape(flags[:, :, None] >> tl.arange(0, 32)[None, None, :], (TILES, EMBED)) & 1
        slope = tl.load(grad + first * embed_dim + e[None, :], inside, 0.0).to(tl.float32) * scale
        slope = tl.where(flags != 0, slope, 0.0)
        sums += tl.sum(slope, 0)
        x = load_features(features, mean, std, row, tile, d, n_tiles, n_features, SCALED)
        total = tl.dot(tl.trans(slope.to(number)), x.to(number), total, input_precision="ieee")
    row = split.to(tl.int64) * embed_dim + e
    there = (e[:, None] < embed_dim) & (d[None, :] < n_features)
    tl.store(weights + row[:, None] * n_features + d[None, :], total, there)
    if tl.program_id(1) == 0:
        tl.store(biases + row, sums, e < embed_dim)


def forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    rows: Tensor | None,
    dropout: float,
    key: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch `forward_kernel`.

    Returns:
        Embeddings (N, E) in the type of the weight, and their bits, int32 (N, ceil(E / 32)).
    """
    (n_features, embed_dim), n_tiles = (features.shape[1], len(weight)), count(features, rows)
    embeddings = weight.new_empty(n_tiles, embed_dim)
    active = weight.new_empty(n_tiles, n_words(embed_dim), dtype=torch.int32)
    tiles, embed, block, warps = blocks(weight.dtype, features.dtype, target_of(weight.device))
    if n_tiles:
        forward_kernel[(triton.cdiv(embed_dim, embed), triton.cdiv(n_tiles, tiles))](
            *contiguous(features, rows, weight, bias, mean, std), embeddings, active,
            n_tiles, n_features, embed_dim, key, *contiguous(positions), drop_level(dropout),
            1 / (1 - dropout), tiles, embed, block, rows is not None,
            bias is not None, mean is not None, dropout > 0, positions is not None, num_warps=warps,
        )  # fmt: skip
    return embeddings, active


def backward(
    grad: Tensor,
    active: Tensor,
    features: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    rows: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Launch `backward_kernel` and return the gradients of the weight (E, D) and the bias (E,)."""
    (n_features, embed_dim), n_tiles = (features.shape[1], len(weight)), len(grad)
    tiles, embed, block, warps = backward_blocks(weight.dtype, target_of(weight.device))
    grid = triton.cdiv(embed_dim, embed), triton.cdiv(n_features, block)
    n_shares = max(1, min(PROGRAMS // (grid[0] * grid[1]), triton.cdiv(n_tiles, tiles)))
    share = tiles * triton.cdiv(triton.cdiv(n_tiles, n_shares), tiles)
    weights = torch.empty(n_shares, embed_dim, n_features, device=weight.device)
    biases = torch.empty(n_shares, embed_dim, device=weight.device)
    backward_kernel[(*grid, n_shares)](
        grad.contiguous(), active, *contiguous(features, rows, mean, std), weights, biases,
        n_tiles, n_features, embed_dim, share, 1 / (1 - dropout), tiles, embed, block,
        rows is not None, mean is not None, num_warps=warps,
    )  # fmt: skip
    return weights.sum(0).to(weight.dtype), biases.sum(0).to(weight.dtype)


def count(features: Tensor, rows: Tensor | None) -> int:
    """Return the number of tiles, N."""
    return len(features) if rows is None else len(rows)


def n_words(embed_dim: int) -> int:
    """Return how many words of 32 bits have one for each embedding of a tile."""
    return -(-embed_dim // 32)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors as the kernels read them; `None` stays `None`."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def blocks(dtype: torch.dtype, stored: torch.dtype, target: str) -> tuple[int, int, int, int]:
    """Return tiles, embedding dimensions and features per block, and warps, of the forward pass."""
    if dtype == torch.float32 or target == "sm_75":
        return 64, 64, 16, 8
    if target == "sm_90":
        return 64, 128, 32, 4
    return (64 if stored == torch.float32 else 128), 128, 32, 8


def backward_blocks(dtype: torch.dtype, target: str) -> tuple[int, int, int, int]:
    """Return tiles, embedding dimensions and features per block, and warps, of the backward pass.

    With larger blocks, gfx1100 spills registers. On sm_90 these are the fastest of those that spill none.
    """
    if dtype == torch.float32 or target == "sm_75":
        return 16, 64, 64, 8
    if target == "sm_90":
        return 64, 128, 128, 8
    return 32, 128, 64 if target == "gfx1100" else 128, 8


STORED = (torch.float16, torch.float32)
"""Types of features: as bags store them, and float32."""

NUMBER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` and `backward` launch in models, in three types of numbers.

    Features have 16 or 32 bits, and are all read or by rows. Models have a mean and a standard deviation; all
    but DTFD-MIL have a bias. Positions of the dropout come with rows.
    """
    shared = dict.fromkeys(("mean", "std"), "*fp32") | {"scale": "fp32", "n_tiles": "i32", "active": "*i32"}
    shared |= dict.fromkeys(("n_features", "embed_dim"), "i32:16")
    names = ("TILES", "EMBED", "FEATURES")
    for dtype, number in NUMBER.items():
        matrix = {"uses_tensor_cores": number != "*fp32"}
        for stored, gathered in product(STORED, (False, True)):
            types = {"features": NUMBER[stored]} | shared | ({"rows": "*i64"} if gathered else {})
            common = {"SCALED": True, "GATHERED": gathered} | ({} if gathered else {"rows": None})
            *sides, warps = blocks(dtype, stored, target)
            for biased, dropout, placed in (
                (False, False, False), (True, False, False), (True, True, False), (True, True, True)
            ):  # fmt: skip
                if placed and not gathered:
                    continue
                key, options = drop_options(dropout)
                constants = dict(zip(names, sides, strict=True)) | options | common
                constants |= {"BIASED": biased, "PLACED": placed}
                constants |= {} if biased else {"bias": None}
                constants |= {} if placed else {"positions": None}
                own = types | key | {"embeddings": number, "weight": number, "level": "i32"}
                own |= {"bias": number} if biased else {}
                own |= {"positions": "*i64"} if placed else {}
                yield Variant(forward_kernel, own, constants, warps, **matrix)
            *sides, warps = backward_blocks(dtype, target)
            own = types | {"grad": number, "weights": "*fp32", "biases": "*fp32", "share": "i32"}
            constants = dict(zip(names, sides, strict=True)) | common
            yield Variant(backward_kernel, own, constants, warps, **matrix)
