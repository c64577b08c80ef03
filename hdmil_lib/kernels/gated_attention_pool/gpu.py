"""Attention and pooling on a GPU in one kernel: embeddings are read from memory once, and once from a cache.

A program processes a chunk of one bag. It computes the logits of the chunk as `gated_attention` does, writes
them (they are an output), and pools the chunk as `segment_softmax_pool` does while the logits are in
registers and the embeddings of the chunk, at most 64 kB in 16 bits, are still in a cache. The chunks are
combined, and gradients computed, by the kernels of the two operators.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.blocks import target_of
from hdmil_lib.kernels.gated_attention import gpu as attention
from hdmil_lib.kernels.gated_attention.gpu import attention_logits
from hdmil_lib.kernels.segment_softmax_pool import gpu as pooling
from hdmil_lib.kernels.segment_softmax_pool.gpu import pool_chunk
from hdmil_lib.kernels.variants import Variant

TILES, BRANCHES = pooling.TILES, pooling.BRANCHES


@triton.jit
def forward_kernel(
    embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias,
    mask, table, logits, largest, total, best, best_tile, sums,
    embed_dim, n_hidden, n_branches, key, level, scale,
    TILES: tl.constexpr, HIDDEN: tl.constexpr, EMBED: tl.constexpr, BRANCHES: tl.constexpr,
    DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write the logits of a chunk and its contribution to its bag, for a block of branches."""
    chunk = tl.program_id(0)
    tile = tl.load(table + chunk * 3 + 1) + tl.arange(0, TILES)
    inside = tile < tl.load(table + chunk * 3 + 2)
    branch = tl.program_id(1) * BRANCHES + tl.arange(0, BRANCHES)
    values = attention_logits(
        embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias,
        tile, inside, branch, embed_dim, n_hidden, n_branches, key, level, scale,
        TILES, HIDDEN, EMBED, BRANCHES, DROPOUT,
    )  # fmt: skip
    there = inside[:, None] & (branch[None, :] < n_branches)
    place = tile[:, None] * n_branches + branch[None, :]
    tl.store(logits + place, values, there)
    values = values.to(logits.dtype.element_ty).to(tl.float32)  # rounded as the backward pass reads them
    kept = there
    if MASKED:
        kept = tl.load(mask + place, there, 0.0) > 0.5
    pool_chunk(
        values, kept, embeddings, tile, inside, branch, chunk, largest, total, best, best_tile, sums,
        0, embed_dim, embed_dim, n_branches, EMBED, MASKED,
    )  # fmt: skip


def forward(
    embeddings: Tensor,
    weights: Sequence[Tensor],
    mask: Tensor | None,
    table: Tensor,
    first_chunk: Tensor,
    dropout: float,
    key: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch `forward_kernel` and combine the chunks.

    Returns:
        Pooled embeddings (B, C, E), logits (N, C), and `largest`, `total` and `fallback` of
        `segment_softmax_pool`, (B, C), for the backward pass.
    """
    (n_tiles, embed_dim), (n_branches, n_hidden) = embeddings.shape, weights[4].shape
    embeddings, masked = embeddings.contiguous(), mask is not None
    partials = pooling.Partials(table, first_chunk, n_branches, embed_dim)
    logits = embeddings.new_empty(n_tiles, n_branches)
    hidden, embed, warps = blocks(embeddings.dtype, target_of(embeddings.device))
    forward_kernel[(len(partials.table), triton.cdiv(n_branches, BRANCHES))](
        embeddings, *(w.contiguous() for w in weights), mask.contiguous() if masked else logits,
        partials.table, logits, *partials.tensors, embed_dim, n_hidden, n_branches,
        *attention.drop_arguments(dropout, key), TILES, hidden, embed,
        BRANCHES, dropout > 0, masked, num_warps=warps,
    )  # fmt: skip
    pooled, *statistics = partials.combine(embeddings, masked)
    return pooled, logits, *statistics


def blocks(dtype: torch.dtype, target: str) -> tuple[int, int, int]:
    """Return hidden units and embedding dimensions per block, and warps: as on sm_90 by measurement."""
    if target == "sm_90" and dtype != torch.float32:
        return 64, 64, 4
    return attention.HIDDEN // (2 if dtype == torch.float32 else 1), attention.embed_block(dtype, target), 8


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` can launch, in three types of numbers."""
    for dtype, number in attention.NUMBER.items():
        types = dict.fromkeys(("embeddings", *attention.WEIGHTS, "mask", "logits"), number)
        types |= {"table": "*i32"} | attention.SIZES | attention.DROP | pooling.PARTIALS
        hidden, embed, warps = blocks(dtype, target)
        sides = {"TILES": TILES, "HIDDEN": hidden, "EMBED": embed, "BRANCHES": BRANCHES}
        for dropout in (False, True):
            for masked in (False, True):
                key, options = attention.drop_options(dropout)
                matrix = {"uses_tensor_cores": number != "*fp32"}
                options = sides | options | {"MASKED": masked}
                yield Variant(forward_kernel, types | key, options, warps, **matrix)
