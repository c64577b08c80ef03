"""Gated attention on a GPU: hidden units stay in registers, and only the logits are written.

In the forward pass a program processes a block of tiles. For one block of hidden units after another, it
multiplies the embeddings by both weight matrices, applies tanh, gate and dropout, and adds the product with
the score weights to its logits, so the (N, 2H) tensor of hidden units never exists in memory. The backward
pass recomputes the two pre-activations with PyTorch's matrix product; one kernel turns them into their
gradients and into sums over blocks of tiles, and matrix products do the rest.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from hdmil_lib.kernels.blocks import target_of
from hdmil_lib.kernels.elementary import random_bits, tanh
from hdmil_lib.kernels.gated_attention.reference import drop_level
from hdmil_lib.kernels.variants import Variant

TILES, HIDDEN, EMBED = 64, 64, 32  # tiles, hidden units and embedding dimensions per block
BACKWARD_TILES = 32  # tiles per block in the backward pass, which needs more registers per tile
BRANCHES = 16  # branches per program: the smallest width of a matrix product
WARPS = 8  # warps per program in the forward pass
VARYING = ("n_tiles",)  # differs from bag to bag and must not cause a recompilation


@triton.jit
def keep_scale(tile, hidden, n_hidden, key, level, scale):
    """Return the factors that apply dropout to the hidden units: 0 or 1 / (1 - dropout)^2."""
    words = random_bits(tile[:, None] * n_hidden + hidden[None, :], key)
    return tl.where(((words & 0xFFFF) >= level) & ((words >> 16) >= level), scale, 0.0)


@triton.jit
def attention_logits(
    embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias,
    tile, inside, branch, embed_dim, n_hidden, n_branches, key, level, scale,
    TILES: tl.constexpr, HIDDEN: tl.constexpr, EMBED: tl.constexpr, BRANCHES: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Return the logits (TILES, BRANCHES) of these tiles and branches."""
    bias = tl.load(score_bias + branch, branch < n_branches, 0.0).to(tl.float32)
    logits = tl.zeros((TILES, BRANCHES), tl.float32) + bias[None, :]
    row = embeddings + tile.to(tl.int64)[:, None] * embed_dim
    for first in range(0, n_hidden, HIDDEN):
        h = first + tl.arange(0, HIDDEN)
        hidden = tl.zeros((TILES, HIDDEN), tl.float32)
        gate = tl.zeros((TILES, HIDDEN), tl.float32)
        for start in range(0, embed_dim, EMBED):
            e = start + tl.arange(0, EMBED)
            x = tl.load(row + e[None, :], inside[:, None] & (e[None, :] < embed_dim), 0.0)
            place = h[None, :] * embed_dim + e[:, None]
            there = (h[None, :] < n_hidden) & (e[:, None] < embed_dim)
            hidden = tl.dot(x, tl.load(tanh_weight + place, there, 0.0), hidden, input_precision="ieee")
            gate = tl.dot(x, tl.load(gate_weight + place, there, 0.0), gate, input_precision="ieee")
        hidden += tl.load(tanh_bias + h, h < n_hidden, 0.0).to(tl.float32)[None, :]
        gate += tl.load(gate_bias + h, h < n_hidden, 0.0).to(tl.float32)[None, :]
        hidden = tanh(hidden) * tl.sigmoid(gate)
        if DROPOUT:
            hidden *= keep_scale(tile, h, n_hidden, key, level, scale)
        there = (branch[None, :] < n_branches) & (h[:, None] < n_hidden)
        weight = tl.load(score_weight + branch[None, :] * n_hidden + h[:, None], there, 0.0)
        logits = tl.dot(hidden.to(weight.dtype), weight, logits, input_precision="ieee")
    return logits


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias, logits,
    n_tiles, embed_dim, n_hidden, n_branches, key, level, scale,
    TILES: tl.constexpr, HIDDEN: tl.constexpr, EMBED: tl.constexpr, BRANCHES: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Write the logits of a block of tiles and branches."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    branch = tl.program_id(1) * BRANCHES + tl.arange(0, BRANCHES)
    values = attention_logits(
        embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias,
        tile, tile < n_tiles, branch, embed_dim, n_hidden, n_branches, key, level, scale,
        TILES, HIDDEN, EMBED, BRANCHES, DROPOUT,
    )  # fmt: skip
    inside = (tile[:, None] < n_tiles) & (branch[None, :] < n_branches)
    tl.store(logits + tile[:, None] * n_branches + branch[None, :], values, inside)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    grad_logits, hidden_sums, gate_sums, score_weight, partials, n_tiles, n_hidden, n_branches,
    key, level, scale, TILES: tl.constexpr, HIDDEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Replace pre-activations p and q by their gradients, in place, and write sums over this block of tiles.

    With a = tanh p, g = sigmoid q and d = sum_c dA_c W_c, dp = d g (1 - a^2) and dq = d a g (1 - g). The sums
    are those of dA_c a g for every branch (the gradient of W), of dp and of dq (the gradients of the biases).
    """
    block = tl.program_id(0)
    tile = block * TILES + tl.arange(0, TILES)
    h = tl.program_id(1) * HIDDEN + tl.arange(0, HIDDEN)
    inside = (tile[:, None] < n_tiles) & (h[None, :] < n_hidden)
    place = tile.to(tl.int64)[:, None] * n_hidden + h[None, :]
    a = tanh(tl.load(hidden_sums + place, inside, 0.0).to(tl.float32))
    g = tl.sigmoid(tl.load(gate_sums + place, inside, 0.0).to(tl.float32))
    kept = tl.where(inside, 1.0, 0.0)
    if DROPOUT:
        kept *= keep_scale(tile, h, n_hidden, key, level, scale)
    sums = partials + block * (n_branches + 2) * n_hidden + h
    slope = tl.zeros((TILES, HIDDEN), tl.float32)
    for c in range(n_branches):
        grad = tl.load(grad_logits + tile * n_branches + c, tile < n_tiles, 0.0).to(tl.float32)[:, None]
        weight = tl.load(score_weight + c * n_hidden + h, h < n_hidden, 0.0).to(tl.float32)
        slope += grad * weight[None, :]
        tl.store(sums + c * n_hidden, tl.sum(grad * a * g * kept, 0), h < n_hidden)
    slope *= kept * g
    gate_grad = slope * a * (1 - g)
    hidden_grad = slope * (1 - a * a)
    tl.store(sums + n_branches * n_hidden, tl.sum(hidden_grad, 0), h < n_hidden)
    tl.store(sums + (n_branches + 1) * n_hidden, tl.sum(gate_grad, 0), h < n_hidden)
    tl.store(hidden_sums + place, hidden_grad, inside)
    tl.store(gate_sums + place, gate_grad, inside)


def drop_arguments(dropout: float, key: Tensor | None) -> tuple[Tensor | None, int, float]:
    """Return the key, the drop level and the scale that the kernels take."""
    return key, drop_level(dropout), 1 / (1 - dropout) ** 2


def forward(
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    dropout: float,
    key: Tensor | None,
) -> Tensor:
    """Launch `forward_kernel` and return the logits (N, C) in the type of the embeddings."""
    (n_tiles, embed_dim), (n_branches, n_hidden) = embeddings.shape, score_weight.shape
    logits = embeddings.new_empty(n_tiles, n_branches)
    weights = (tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias)
    dtype, target = embeddings.dtype, target_of(embeddings.device)
    tiles, hidden = tile_block(dtype, target), hidden_block(dtype, target)
    if n_tiles:
        forward_kernel[(triton.cdiv(n_tiles, tiles), triton.cdiv(n_branches, BRANCHES))](
            embeddings.contiguous(), *(w.contiguous() for w in weights), logits,
            n_tiles, embed_dim, n_hidden, n_branches, *drop_arguments(dropout, key),
            tiles, hidden, embed_block(dtype, target), BRANCHES, dropout > 0, num_warps=WARPS,
        )  # fmt: skip
    return logits


def tile_block(dtype: torch.dtype, target: str) -> int:
    """Return the block size in tiles: twice as many in 16 bits on sm_90 (25 instead of 35 us per slide)."""
    return 2 * TILES if target == "sm_90" and dtype != torch.float32 else TILES


def hidden_block(dtype: torch.dtype, target: str) -> int:
    """Return the block size in hidden units: half for float32, whose products need more registers."""
    if dtype == torch.float32:
        return HIDDEN // 2
    return 2 * HIDDEN if target == "sm_90" else HIDDEN


def embed_block(dtype: torch.dtype, target: str) -> int:
    """Return the block size in embedding dimensions: half where the whole one spills registers."""
    spilling = {"sm_75": torch.float16, "sm_89": torch.float32, "gfx1100": torch.float32}
    return EMBED // 2 if spilling.get(target) == dtype else EMBED


def backward(
    grad_logits: Tensor,
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    dropout: float,
    key: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the embeddings and the six weights, in the order of `gated_attention`."""
    n_branches, n_hidden = score_weight.shape
    hidden, gate = linear(embeddings, tanh_weight, tanh_bias), linear(embeddings, gate_weight, gate_bias)
    n_tiles, blocks = len(embeddings), triton.cdiv(len(embeddings), BACKWARD_TILES)
    partials = torch.empty(blocks, n_branches + 2, n_hidden, dtype=torch.float32, device=embeddings.device)
    if n_tiles:
        backward_kernel[(blocks, triton.cdiv(n_hidden, HIDDEN))](
            grad_logits.contiguous(), hidden, gate, score_weight.contiguous(), partials,
            n_tiles, n_hidden, n_branches, *drop_arguments(dropout, key), BACKWARD_TILES, HIDDEN, dropout > 0,
        )  # fmt: skip
    sums = partials.sum(0).to(embeddings.dtype)
    grad_embeddings = torch.addmm(hidden @ tanh_weight, gate, gate_weight)
    return (
        grad_embeddings,
        hidden.T @ embeddings,
        sums[n_branches].clone(),
        gate.T @ embeddings,
        sums[n_branches + 1].clone(),
        sums[:n_branches].clone(),
        grad_logits.float().sum(0).to(embeddings.dtype),
    )


WEIGHTS = ("tanh_weight", "tanh_bias", "gate_weight", "gate_bias", "score_weight", "score_bias")
NUMBER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SIZES = {"embed_dim": "i32:16", "n_hidden": "i32:16", "n_branches": "i32"}
DROP = {"level": "i32", "scale": "fp32"}


def drop_options(dropout: bool) -> tuple[dict[str, str], dict[str, bool | None]]:
    """Return the type of the key, and the constants, of a kernel with or without dropout."""
    return ({"key": "*i32"}, {"DROPOUT": True}) if dropout else ({}, {"key": None, "DROPOUT": False})


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` and `backward` can launch, in three types of numbers."""
    for dtype, number in NUMBER.items():
        for dropout in (False, True):
            types = dict.fromkeys(("embeddings", *WEIGHTS, "logits"), number)
            key, options = drop_options(dropout)
            types |= {"n_tiles": "i32"} | SIZES | DROP | key
            blocks = {"TILES": BACKWARD_TILES, "HIDDEN": HIDDEN} | options
            wide = options | {"TILES": tile_block(dtype, target), "HIDDEN": hidden_block(dtype, target)}
            wide |= {"EMBED": embed_block(dtype, target), "BRANCHES": BRANCHES}
            yield Variant(forward_kernel, types, wide, WARPS, uses_tensor_cores=number != "*fp32")
            types = dict.fromkeys(("grad_logits", "hidden_sums", "gate_sums", "score_weight"), number)
            types |= {"partials": "*fp32", "n_tiles": "i32"} | SIZES | DROP | key
            yield Variant(backward_kernel, types, blocks)
