"""DMIN's attention, selection and both poolings on a GPU, in one pass over the embeddings.

A program processes a chunk of one bag. Student and teacher are branches side by side: of 2 C columns the
first C pool the selected tiles, the others all tiles, with the same logits. The forward kernel computes the
logits of its chunk as `gated_attention` does, selects as `gumbel_mask` does, and pools as
`segment_softmax_pool` does, while the embeddings of the chunk are still in a cache.

The backward kernel recomputes the hidden units of its chunk. From the gradient of the pooled embeddings it
gets that of the logits, through the weights and through the selection, and from that the gradients of the
hidden units, which it writes for the product that gives those of the two large weights. The same program then
multiplies them by the weights, adds what comes through the pooling, and writes the gradient of its
embeddings. So the embeddings are read from memory once in the forward pass and twice in the backward pass: by
the kernel, and by that product.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.blocks import target_of
from hdmil_lib.kernels.elementary import tanh
from hdmil_lib.kernels.gated_attention import gpu as attention
from hdmil_lib.kernels.gated_attention.gpu import attention_logits, keep_scale
from hdmil_lib.kernels.gated_attention_pool.gpu import blocks
from hdmil_lib.kernels.gumbel_mask.gpu import soften
from hdmil_lib.kernels.segment_softmax_pool import gpu as pooling
from hdmil_lib.kernels.segment_softmax_pool.gpu import pool_chunk
from hdmil_lib.kernels.variants import Variant

TILES, BRANCHES = pooling.TILES, pooling.BRANCHES


@triton.jit
def forward_kernel(
    embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias,
    table, logits, mask, largest, total, best, best_tile, sums,
    embed_dim, n_hidden, n_branches, key, level, scale, noise_key, inverse_temperature, threshold,
    TILES: tl.constexpr, HIDDEN: tl.constexpr, EMBED: tl.constexpr, BRANCHES: tl.constexpr,
    DROPOUT: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """Write the logits and the mask of a chunk, and its contribution to its bag."""
    chunk = tl.program_id(0)
    tile = tl.load(table + chunk * 3 + 1) + tl.arange(0, TILES)
    inside = tile < tl.load(table + chunk * 3 + 2)
    column = tl.arange(0, BRANCHES)
    branch = column % n_branches
    values = attention_logits(
        embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias,
        tile, inside, branch, embed_dim, n_hidden, n_branches, key, level, scale,
        TILES, HIDDEN, EMBED, BRANCHES, DROPOUT,
    )  # fmt: skip
    place = tile[:, None] * n_branches + branch[None, :]
    own = inside[:, None] & (column[None, :] < n_branches)
    tl.store(logits + place, values, own)
    values = values.to(logits.dtype.element_ty).to(tl.float32)  # rounded as the backward pass reads them
    selected = soften(values, place, noise_key, inverse_temperature, NOISY) > threshold
    tl.store(mask + place, selected.to(tl.float32), own)
    kept = inside[:, None] & (selected | (column[None, :] >= n_branches))
    pool_chunk(
        values, kept, embeddings, tile, inside, column, chunk, largest, total, best, best_tile, sums,
        0, embed_dim, embed_dim, 2 * n_branches, EMBED, True,
    )  # fmt: skip


@triton.jit
def score_gradients(
    grad_pooled, inner, grad_logits, grad_mask, embeddings, logits, mask, largest, total, fallback,
    bag, tile, inside, column, branch, embed_dim, n_branches, noise_key, inverse_temperature,
    EMBED: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """Return the gradients of the logits (TILES, BRANCHES) by column, and the weights of the pooling.

    With w = exp(A - max) / sum, g = dE . F_j and inner = dE . E, the pooling gives dA = w M (g - inner) and,
    for the student, dM = w (g - inner). The selection turns dM into dM A^ (1 - A^) / tau.
    """
    there = inside[:, None] & (column[None, :] < 2 * n_branches)
    student = inside[:, None] & (column[None, :] < n_branches)
    place = tile[:, None] * n_branches + branch[None, :]
    of_bag = bag * 2 * n_branches + column
    values = tl.load(logits + place, there, 0.0).to(tl.float32)
    highest = tl.load(largest + of_bag, column < 2 * n_branches, 0.0)[None, :]
    sum_of_weights = tl.load(total + of_bag, column < 2 * n_branches, 1.0)[None, :]
    lone = tl.load(fallback + of_bag, column < 2 * n_branches, -1)[None, :]
    weights = tl.where(there, tl.exp(tl.minimum(values - highest, 0.0)) / sum_of_weights, 0.0)
    selected = tl.load(mask + place, there, 0.0) > 0.5
    kept = there & (selected | (column[None, :] >= n_branches) | (tile[:, None] == lone))
    slope = tl.zeros((tile.shape[0], column.shape[0]), tl.float32)
    row = embeddings + tile.to(tl.int64)[:, None] * embed_dim
    for first in range(0, embed_dim, EMBED):
        e = first + tl.arange(0, EMBED)
        x = tl.load(row + e[None, :], inside[:, None] & (e[None, :] < embed_dim), 0.0)
        wanted = (column[None, :] < 2 * n_branches) & (e[:, None] < embed_dim)
        grad = tl.load(grad_pooled + of_bag[None, :] * embed_dim + e[:, None], wanted, 0.0)
        slope = tl.dot(x, grad, slope, input_precision="ieee")
    slope -= tl.load(inner + of_bag, column < 2 * n_branches, 0.0)[None, :]
    slope *= weights
    through_mask = slope + tl.load(grad_mask + place, student, 0.0).to(tl.float32)
    soft = soften(values, place, noise_key, inverse_temperature, NOISY)
    direct = tl.load(grad_logits + place, student, 0.0).to(tl.float32)
    direct += tl.where(student, through_mask * soft * (1 - soft) * inverse_temperature, 0.0)
    weights = tl.where(kept, weights, 0.0)
    return tl.where(kept, slope, 0.0) + direct, weights


@triton.jit
def backward_kernel(
    grad_pooled, inner, grad_logits, grad_mask, embeddings,
    tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight,
    logits, mask, table, largest, total, fallback, grad_embeddings, grad_hidden, partials, bias_partials,
    embed_dim, n_hidden, n_branches, key, level, scale, noise_key, inverse_temperature,
    TILES: tl.constexpr, PARTS: tl.constexpr, HIDDEN: tl.constexpr, EMBED: tl.constexpr,
    BRANCHES: tl.constexpr, DROPOUT: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the embeddings and hidden units of a chunk, and sums for those of the weights.

    A program processes one of PARTS equal parts of a chunk.

    With a = tanh p, g = sigmoid q and d = sum_c dA_c W_c, dp = d g (1 - a^2) and dq = d a g (1 - g).
    `grad_hidden` has dp and dq side by side, (N, 2 H). The sums are those of dA_c a g for each column, of dp
    and of dq.
    """
    part = tl.program_id(0)
    chunk = table + part // PARTS * 3
    bag = tl.load(chunk)
    tile = tl.load(chunk + 1) + part % PARTS * TILES + tl.arange(0, TILES)
    inside = tile < tl.load(chunk + 2)
    column = tl.arange(0, BRANCHES)
    branch = column % n_branches
    grad, weights = score_gradients(
        grad_pooled, inner, grad_logits, grad_mask, embeddings, logits, mask, largest, total, fallback,
        bag, tile, inside, column, branch, embed_dim, n_branches, noise_key, inverse_temperature,
        EMBED, NOISY,
    )  # fmt: skip
    tl.store(bias_partials + part * 2 * n_branches + column, tl.sum(grad, 0), column < 2 * n_branches)
    row = embeddings + tile.to(tl.int64)[:, None] * embed_dim
    hidden_row = grad_hidden + tile.to(tl.int64)[:, None] * 2 * n_hidden
    number = embeddings.dtype.element_ty
    sums = partials + part.to(tl.int64) * (2 * n_branches + 2) * n_hidden
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
        a = tanh(hidden + tl.load(tanh_bias + h, h < n_hidden, 0.0).to(tl.float32)[None, :])
        g = tl.sigmoid(gate + tl.load(gate_bias + h, h < n_hidden, 0.0).to(tl.float32)[None, :])
        kept = tl.where(inside[:, None] & (h[None, :] < n_hidden), 1.0, 0.0)
        if DROPOUT:
            kept *= keep_scale(tile, h, n_hidden, key, level, scale)
        there = (column[:, None] < 2 * n_branches) & (h[None, :] < n_hidden)
        score = tl.load(score_weight + branch[:, None] * n_hidden + h[None, :], there, 0.0)
        units = (a * g * kept).to(number)
        products = tl.dot(tl.trans(grad.to(number)), units, input_precision="ieee")
        tl.store(sums + column[:, None] * n_hidden + h[None, :], products, there)
        slope = tl.dot(grad.to(number), score, input_precision="ieee") * kept * g
        gate_grad = slope * a * (1 - g)
        hidden_grad = slope * (1 - a * a)
        tl.store(sums + 2 * n_branches * n_hidden + h, tl.sum(hidden_grad, 0), h < n_hidden)
        tl.store(sums + (2 * n_branches + 1) * n_hidden + h, tl.sum(gate_grad, 0), h < n_hidden)
        wanted = inside[:, None] & (h[None, :] < n_hidden)
        tl.store(hidden_row + h[None, :], hidden_grad, wanted)
        tl.store(hidden_row + n_hidden + h[None, :], gate_grad, wanted)
    tl.debug_barrier()  # what other threads of this program have written is read below
    of_bag = bag * 2 * n_branches + column
    for start in range(0, embed_dim, EMBED):
        e = start + tl.arange(0, EMBED)
        of_column = (column[:, None] < 2 * n_branches) & (e[None, :] < embed_dim)
        pool_grad = tl.load(grad_pooled + of_bag[:, None] * embed_dim + e[None, :], of_column, 0.0)
        result = tl.dot(weights.to(number), pool_grad, input_precision="ieee")
        for first in range(0, n_hidden, HIDDEN):
            k = first + tl.arange(0, HIDDEN)
            of_tile = inside[:, None] & (k[None, :] < n_hidden)
            of_weight = (k[:, None] < n_hidden) & (e[None, :] < embed_dim)
            square = k[:, None] * embed_dim + e[None, :]
            of_hidden = tl.load(hidden_row + k[None, :], of_tile, 0.0)
            weight = tl.load(tanh_weight + square, of_weight, 0.0)
            result = tl.dot(of_hidden, weight, result, input_precision="ieee")
            of_gate = tl.load(hidden_row + n_hidden + k[None, :], of_tile, 0.0)
            weight = tl.load(gate_weight + square, of_weight, 0.0)
            result = tl.dot(of_gate, weight, result, input_precision="ieee")
        out = grad_embeddings + tile.to(tl.int64)[:, None] * embed_dim + e[None, :]
        tl.store(out, result, inside[:, None] & (e[None, :] < embed_dim))


def forward(
    embeddings: Tensor,
    weights: Sequence[Tensor],
    table: Tensor,
    first_chunk: Tensor,
    dropout: float,
    key: Tensor | None,
    noise_key: Tensor | None,
    temperature: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch `forward_kernel` and combine the chunks.

    Returns:
        Pooled embeddings of student and teacher (B, 2 C, E), logits and mask (N, C), and `largest`, `total`
        and `fallback` of `segment_softmax_pool`, (B, 2 C), for the backward pass.
    """
    (n_tiles, embed_dim), (n_branches, n_hidden) = embeddings.shape, weights[4].shape
    embeddings = embeddings.contiguous()
    hidden, embed, warps = blocks(embeddings.dtype, target_of(embeddings.device))
    partials = pooling.Partials(table, first_chunk, 2 * n_branches, embed_dim)
    logits, mask = (embeddings.new_empty(n_tiles, n_branches) for _ in range(2))
    forward_kernel[(len(partials.table),)](
        embeddings, *(w.contiguous() for w in weights), partials.table, logits, mask, *partials.tensors,
        embed_dim, n_hidden, n_branches, *attention.drop_arguments(dropout, key),
        noise_key, 1 / temperature, threshold, TILES, hidden, embed, BRANCHES,
        dropout > 0, noise_key is not None, num_warps=warps,
    )  # fmt: skip
    pooled, *statistics = partials.combine(embeddings, True)
    return pooled, logits, mask, *statistics


def backward(
    grads: Sequence[Tensor],
    embeddings: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    dropout: float,
    key: Tensor | None,
    noise_key: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch `backward_kernel`.

    Args:
        grads: Gradients of the pooled embeddings (B, 2 C, E), the logits and the mask, (N, C).
        embeddings: F, (N, E).
        weights: The six weights of the attention but the last.
        saved: Pooled embeddings, logits, mask, table of chunks, and the statistics of the forward pass.
        dropout: Dropout rate of the attention.
        key: Key of the dropout.
        noise_key: Key of the noise.
        temperature: Temperature of the selection.

    Returns:
        Gradients of the embeddings and the six weights.
    """
    grad_pooled, grad_logits, grad_mask = grads
    pooled, logits, mask, table, *statistics = saved
    (n_tiles, embed_dim), (n_branches, n_hidden) = embeddings.shape, weights[4].shape
    embeddings, number = embeddings.contiguous(), embeddings.dtype
    tiles, hidden_block, embed_block, warps = backward_blocks(number, target_of(embeddings.device))
    programs = len(table) * (TILES // tiles)
    inner = (grad_pooled.float() * pooled.float()).sum(-1)
    grad_embeddings = torch.empty_like(embeddings)
    grad_hidden = embeddings.new_empty(n_tiles, 2 * n_hidden)
    partials = torch.empty(programs, 2 * n_branches + 2, n_hidden, device=embeddings.device)
    bias_partials = torch.empty(programs, 2 * n_branches, device=embeddings.device)
    backward_kernel[(programs,)](
        grad_pooled.to(number).contiguous(), inner, grad_logits.contiguous(), grad_mask.contiguous(),
        embeddings, *(w.contiguous() for w in weights), logits, mask, table, *statistics,
        grad_embeddings, grad_hidden, partials, bias_partials, embed_dim, n_hidden, n_branches,
        *attention.drop_arguments(dropout, key), noise_key, 1 / temperature,
        tiles, TILES // tiles, hidden_block, embed_block, BRANCHES, dropout > 0, noise_key is not None,
        num_warps=warps,
    )  # fmt: skip
    sums, biases = partials.sum(0), bias_partials.sum(0)
    tanh_grad, gate_grad = (grad_hidden.T @ embeddings).chunk(2)
    student, teacher = sums[: 2 * n_branches].chunk(2)
    return (
        grad_embeddings,
        tanh_grad.clone(),
        sums[-2].to(number, copy=True),
        gate_grad.clone(),
        sums[-1].to(number, copy=True),
        (student + teacher).to(number),
        (biases[:n_branches] + biases[n_branches:]).to(number),
    )


def backward_blocks(dtype: torch.dtype, target: str) -> tuple[int, int, int, int]:
    """Return tiles, hidden units and embedding dimensions per block, and warps.

    They are the largest that spill no registers, and on sm_90 the fastest (86 instead of 224 us per slide).
    """
    if dtype == torch.float32:
        return 32, 16 if target == "gfx1100" else 32, 32, 8
    if target == "sm_90":
        return 64, 32, 128, 4
    return 64, 32, 32 if target == "sm_75" else 64, 8


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` and `backward` can launch, in three types of numbers."""
    for dtype, number in attention.NUMBER.items():
        matrix = {"uses_tensor_cores": number != "*fp32"}
        shared = dict.fromkeys(("embeddings", *attention.WEIGHTS, "mask", "logits"), number)
        shared |= {"table": "*i32", "inverse_temperature": "fp32"} | attention.SIZES | attention.DROP
        grads = ("grad_pooled", "grad_logits", "grad_mask", "grad_embeddings", "grad_hidden")
        sums = ("inner", "largest", "total", "partials", "bias_partials")
        back = dict.fromkeys(grads, number) | dict.fromkeys(sums, "*fp32") | {"fallback": "*i32"}
        tiles, hidden, embed, back_warps = backward_blocks(dtype, target)
        *wide, warps = blocks(dtype, target)
        for dropout in (False, True):
            for noisy in (False, True):
                key, options = attention.drop_options(dropout)
                key |= {"noise_key": "*i32"} if noisy else {}
                options |= {"NOISY": noisy, "BRANCHES": BRANCHES} | ({} if noisy else {"noise_key": None})
                sides = dict(zip(("TILES", "HIDDEN", "EMBED"), (TILES, *wide), strict=True))
                types = shared | {"threshold": "fp32"} | pooling.PARTIALS | key
                yield Variant(forward_kernel, types, sides | options, warps, **matrix)
                sides = {"TILES": tiles, "PARTS": TILES // tiles, "HIDDEN": hidden, "EMBED": embed}
                yield Variant(backward_kernel, shared | back | key, sides | options, back_warps, **matrix)
