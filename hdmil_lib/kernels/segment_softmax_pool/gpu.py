"""Softmax pooling of bags of different lengths on a GPU: every bag is cut into chunks, pooled independently.

A program pools one chunk for all branches, so that the embeddings are read once. It writes the largest kept
logit, and the sum of weights and the weighted sum of embeddings relative to that logit. A second kernel
combines the chunks of a bag after rescaling them to the largest logit of the bag. In the backward pass a
program processes one chunk and recomputes its weights from the logits and from two statistics of the bag.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.blocks import target_of
from hdmil_lib.kernels.segments import CHUNK
from hdmil_lib.kernels.variants import Variant

TILES, EMBED = CHUNK, 64  # tiles per chunk and embedding dimensions per block
WARPS = 8  # warps per program in the forward pass; 4 spill registers on sm_75 and gfx1100
BACKWARD_EMBED = 32  # in the backward pass, which needs more registers per dimension
CHUNKS, COMBINE_EMBED = 64, 32  # chunks that are combined at a time, and embedding dimensions per block
BRANCHES = 16  # branches per program: the smallest width of a matrix product
LOWEST = tl.constexpr(-3.0e38)  # stands for "no logit"; unlike with -inf, differences are not nan


@triton.jit
def pool_chunk(
    logits, kept, embeddings, tile, inside, branch, chunk, largest, total, best, best_tile, sums,
    embed_start, embed_end, embed_dim, n_branches,
    EMBED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write the contribution of a chunk with these logits (TILES, BRANCHES) to its bag.

    The shape of `largest`, `total`, `best` and `best_tile` is (chunks, C), that of `sums` is (chunks, C, E).
    """
    there = inside[:, None] & (branch[None, :] < n_branches)
    highest = tl.max(tl.where(there & kept, logits, LOWEST), 0)
    weights = tl.where(there & kept, tl.exp(logits - highest[None, :]), 0.0)
    place = chunk * n_branches + branch
    if embed_start == 0:
        tl.store(largest + place, highest, branch < n_branches)
        tl.store(total + place, tl.sum(weights, 0), branch < n_branches)
        if MASKED:
            top = tl.max(tl.where(there, logits, LOWEST), 0)
            holders = tl.where(there & (logits == top[None, :]), tile[:, None], 2147483647)
            tl.store(best + place, top, branch < n_branches)
            tl.store(best_tile + place, tl.min(holders, 0), branch < n_branches)
    row = embeddings + tile.to(tl.int64)[:, None] * embed_dim
    for start in range(embed_start, embed_end, EMBED):
        e = start + tl.arange(0, EMBED)
        x = tl.load(row + e[None, :], inside[:, None] & (e[None, :] < embed_dim), 0.0)
        part = tl.dot(tl.trans(weights).to(x.dtype), x, input_precision="ieee")
        wanted = (branch[:, None] < n_branches) & (e[None, :] < embed_dim)
        tl.store(sums + place[:, None] * embed_dim + e[None, :], part, wanted)


@triton.jit
def chunk_kernel(
    embeddings, logits, mask, table, largest, total, best, best_tile, sums, embed_dim, n_branches,
    TILES: tl.constexpr, EMBED: tl.constexpr, BRANCHES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Run `pool_chunk` on logits in memory, for one block of the embedding."""
    chunk = tl.program_id(0)
    tile = tl.load(table + chunk * 3 + 1) + tl.arange(0, TILES)
    inside = tile < tl.load(table + chunk * 3 + 2)
    branch = tl.program_id(2) * BRANCHES + tl.arange(0, BRANCHES)
    place = tile[:, None] * n_branches + branch[None, :]
    there = inside[:, None] & (branch[None, :] < n_branches)
    values = tl.load(logits + place, there, 0.0).to(tl.float32)
    kept = there
    if MASKED:
        kept = tl.load(mask + place, there, 0.0) > 0.5
    start = tl.program_id(1) * EMBED
    pool_chunk(
        values, kept, embeddings, tile, inside, branch, chunk, largest, total, best, best_tile, sums,
        start, start + EMBED, embed_dim, n_branches, EMBED, MASKED,
    )  # fmt: skip


@triton.jit
def combine_kernel(
    embeddings, largest, total, best, best_tile, sums, first_chunk,
    pooled, bag_largest, bag_total, fallback, embed_dim, n_branches,
    CHUNKS: tl.constexpr, EMBED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Combine the chunks of one bag, for one branch and one block of the embedding, CHUNKS at a time."""
    bag, c = tl.program_id(0), tl.program_id(1)
    e = tl.program_id(2) * EMBED + tl.arange(0, EMBED)
    first, end = tl.load(first_chunk + bag), tl.load(first_chunk + bag + 1)
    highest = tl.full((), LOWEST, tl.float32)
    top = tl.full((), LOWEST, tl.float32)
    holder = tl.full((), -1, tl.int32)
    for start in range(first, end, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        place = chunk * n_branches + c
        highest = tl.maximum(highest, tl.max(tl.load(largest + place, chunk < end, LOWEST), 0))
        if MASKED:
            values = tl.load(best + place, chunk < end, LOWEST)
            value = tl.max(values, 0)
            tiles = tl.load(best_tile + place, chunk < end, 2147483647)
            tile = tl.min(tl.where(values == value, tiles, 2147483647), 0)
            holder = tl.where(value > top, tile, holder)
            top = tl.maximum(top, value)
    weight = tl.zeros((), tl.float32)
    sum_of_tiles = tl.zeros((EMBED,), tl.float32)
    for start in range(first, end, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        place = chunk * n_branches + c
        scale = tl.exp(tl.load(largest + place, chunk < end, LOWEST) - highest)
        scale = tl.where(chunk < end, scale, 0.0)
        weight += tl.sum(scale * tl.load(total + place, chunk < end, 0.0), 0)
        there = (chunk[:, None] < end) & (e[None, :] < embed_dim)
        part = tl.load(sums + place[:, None] * embed_dim + e[None, :], there, 0.0)
        sum_of_tiles += tl.sum(scale[:, None] * part, 0)
    if MASKED:
        alone = (weight == 0) & (holder >= 0)
        row = embeddings + tl.maximum(holder, 0).to(tl.int64) * embed_dim + e
        lone = tl.load(row, e < tl.where(alone, embed_dim, 0), 0.0).to(tl.float32)
        sum_of_tiles = tl.where(alone, lone, sum_of_tiles)
        weight = tl.where(alone, 1.0, weight)
        highest = tl.where(alone, top, highest)
        holder = tl.where(alone, holder, -1)
    place = bag * n_branches + c
    value = sum_of_tiles / tl.where(first == end, 1.0, weight)
    tl.store(pooled + place * embed_dim + e, value, e < embed_dim)
    if tl.program_id(2) == 0:
        tl.store(bag_largest + place, highest)
        tl.store(bag_total + place, weight)
        tl.store(fallback + place, holder)


@triton.jit
def backward_kernel(
    grad_pooled, inner, embeddings, logits, mask, table, largest, total, fallback,
    grad_embeddings, grad_logits, grad_mask, embed_dim, n_branches,
    TILES: tl.constexpr, EMBED: tl.constexpr, BRANCHES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one chunk.

    With w = exp(A - max) / sum, g = dE_c . F_j and inner = dE_c . E_c,
    dA = w M (g - inner), dM = w (g - inner) and dF_j = sum_c w_c M_c dE_c.
    """
    chunk = tl.program_id(0)
    bag = tl.load(table + chunk * 3)
    tile = tl.load(table + chunk * 3 + 1) + tl.arange(0, TILES)
    inside = tile < tl.load(table + chunk * 3 + 2)
    row = tile.to(tl.int64)[:, None] * embed_dim
    for start in range(0, n_branches, BRANCHES):
        branch = start + tl.arange(0, BRANCHES)
        weights, kept = chunk_weights(
            logits, mask, largest, total, fallback, bag, tile, inside, branch, n_branches, MASKED
        )
        slope = tl.zeros((TILES, BRANCHES), tl.float32)
        for first in range(0, embed_dim, EMBED):
            e = first + tl.arange(0, EMBED)
            x = tl.load(embeddings + row + e[None, :], inside[:, None] & (e[None, :] < embed_dim), 0.0)
            of_bag = (bag * n_branches + branch)[None, :] * embed_dim + e[:, None]
            wanted = (branch[None, :] < n_branches) & (e[:, None] < embed_dim)
            grad = tl.load(grad_pooled + of_bag, wanted, 0.0)
            slope = tl.dot(x, grad, slope, input_precision="ieee")
        slope -= tl.load(inner + bag * n_branches + branch, branch < n_branches, 0.0)[None, :]
        place = tile[:, None] * n_branches + branch[None, :]
        there = inside[:, None] & (branch[None, :] < n_branches)
        tl.store(grad_logits + place, tl.where(kept, weights * slope, 0.0), there)
        if MASKED:
            tl.store(grad_mask + place, weights * slope, there)
    for first in range(0, embed_dim, EMBED):
        e = first + tl.arange(0, EMBED)
        result = tl.zeros((TILES, EMBED), tl.float32)
        for start in range(0, n_branches, BRANCHES):
            branch = start + tl.arange(0, BRANCHES)
            weights, kept = chunk_weights(
                logits, mask, largest, total, fallback, bag, tile, inside, branch, n_branches, MASKED
            )
            of_bag = (bag * n_branches + branch)[:, None] * embed_dim + e[None, :]
            wanted = (branch[:, None] < n_branches) & (e[None, :] < embed_dim)
            grad = tl.load(grad_pooled + of_bag, wanted, 0.0)
            weights = tl.where(kept, weights, 0.0).to(grad.dtype)
            result = tl.dot(weights, grad, result, input_precision="ieee")
        tl.store(grad_embeddings + row + e[None, :], result, inside[:, None] & (e[None, :] < embed_dim))


@triton.jit
def chunk_weights(
    logits, mask, largest, total, fallback, bag, tile, inside, branch, n_branches, MASKED: tl.constexpr
):
    """Return the weights (TILES, BRANCHES) as if every tile were kept, and which tiles are kept."""
    there = inside[:, None] & (branch[None, :] < n_branches)
    place = tile[:, None] * n_branches + branch[None, :]
    of_bag = bag * n_branches + branch
    highest = tl.load(largest + of_bag, branch < n_branches, 0.0)[None, :]
    sum_of_weights = tl.load(total + of_bag, branch < n_branches, 1.0)[None, :]
    shifted = tl.load(logits + place, there, 0.0).to(tl.float32) - highest
    weights = tl.where(there, tl.exp(tl.minimum(shifted, 0.0)) / sum_of_weights, 0.0)
    kept = there
    if MASKED:
        lone = tl.load(fallback + of_bag, branch < n_branches, -1)[None, :]
        kept = there & ((tl.load(mask + place, there, 0.0) > 0.5) | (tile[:, None] == lone))
    return weights, kept


def backward_warps(target: str) -> int:
    """Return the warps per program in the backward pass: 8 on gfx1100, where 4 spill registers."""
    return 8 if target == "gfx1100" else 4


class Partials:
    """Memory for the contributions of the chunks of all bags.

    Attributes:
        table: Bag, first tile and end of each chunk, int32 (chunks, 3).
        first_chunk: Index of the first chunk of each bag, int32 (B + 1,).
        largest: Largest kept logit of each chunk, (chunks, C).
        total: Sum of the weights of each chunk, relative to `largest`, (chunks, C).
        best: Largest logit of each chunk, kept or not, (chunks, C).
        best_tile: First tile that has it, int32 (chunks, C).
        sums: Weighted sum of the embeddings of each chunk, (chunks, C, E).
    """

    def __init__(self, table: Tensor, first_chunk: Tensor, n_branches: int, embed_dim: int):
        self.table, self.first_chunk = table, first_chunk
        shape, device = (len(table), n_branches), table.device
        # Views into one tensor would start at other alignments for other shapes, and Triton compile for each.
        self.largest, self.total, self.best = (torch.empty(shape, device=device) for _ in range(3))
        self.best_tile = torch.empty(shape, dtype=torch.int32, device=device)
        self.sums = torch.empty(*shape, embed_dim, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the arguments of the kernels."""
        return self.largest, self.total, self.best, self.best_tile, self.sums

    def combine(self, embeddings: Tensor, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Launch `combine_kernel`.

        Returns:
            Pooled embeddings (B, C, E) in the type of the embeddings; largest kept logit, sum of weights, and
            the tile that is pooled where no tile is kept (else -1), each (B, C).
        """
        (_, n_branches), n_bags = self.largest.shape, len(self.first_chunk) - 1
        embed_dim, device = embeddings.shape[1], embeddings.device
        pooled = embeddings.new_empty(n_bags, n_branches, embed_dim)
        largest, total = (torch.empty(n_bags, n_branches, device=device) for _ in range(2))
        fallback = torch.empty(n_bags, n_branches, dtype=torch.int32, device=device)
        combine_kernel[(n_bags, n_branches, triton.cdiv(embed_dim, COMBINE_EMBED))](
            embeddings, *self.tensors, self.first_chunk, pooled, largest, total, fallback,
            embed_dim, n_branches, CHUNKS, COMBINE_EMBED, masked,
        )  # fmt: skip
        return pooled, largest, total, fallback


def forward(
    embeddings: Tensor, logits: Tensor, mask: Tensor | None, table: Tensor, first_chunk: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `chunk_kernel` and return what `Partials.combine` returns."""
    embed_dim, n_branches = embeddings.shape[1], logits.shape[1]
    embeddings, masked = embeddings.contiguous(), mask is not None
    partials = Partials(table, first_chunk, n_branches, embed_dim)
    grid = (len(partials.table), triton.cdiv(embed_dim, EMBED), triton.cdiv(n_branches, BRANCHES))
    chunk_kernel[grid](
        embeddings, logits.contiguous(), mask.contiguous() if masked else logits, partials.table,
        *partials.tensors, embed_dim, n_branches, TILES, EMBED, BRANCHES, masked, num_warps=WARPS,
    )  # fmt: skip
    return partials.combine(embeddings, masked)


def backward(
    grad_pooled: Tensor,
    pooled: Tensor,
    embeddings: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    table: Tensor,
    largest: Tensor,
    total: Tensor,
    fallback: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `backward_kernel`.

    Returns:
        Gradients of the embeddings, the logits and the mask; the last one is empty without a mask.
    """
    embed_dim, n_branches = embeddings.shape[1], logits.shape[1]
    embeddings, logits, masked = embeddings.contiguous(), logits.contiguous(), mask is not None
    inner = (grad_pooled.float() * pooled.float()).sum(-1)
    grad_embeddings, grad_logits = torch.empty_like(embeddings), torch.empty_like(logits)
    grad_mask = torch.empty_like(logits) if masked else logits.new_empty(0)
    backward_kernel[(len(table),)](
        grad_pooled.to(embeddings.dtype).contiguous(), inner, embeddings, logits,
        mask.contiguous() if masked else logits, table, largest, total, fallback,
        grad_embeddings, grad_logits, grad_mask if masked else grad_logits,
        embed_dim, n_branches, TILES, BACKWARD_EMBED, BRANCHES, masked,
        num_warps=backward_warps(target_of(embeddings.device)),
    )  # fmt: skip
    return grad_embeddings, grad_logits, grad_mask


NUMBER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SIZES = {"embed_dim": "i32:16", "n_branches": "i32"}
PARTIALS = dict.fromkeys(("largest", "total", "best", "sums"), "*fp32") | {"best_tile": "*i32"}


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` and `backward` can launch, in three types of numbers."""
    blocks = {"TILES": TILES, "EMBED": EMBED, "BRANCHES": BRANCHES}
    for number in NUMBER.values():
        matrix = {"uses_tensor_cores": number != "*fp32"}
        for masked in (False, True):
            tiles = dict.fromkeys(("embeddings", "logits", "mask"), number) | {"table": "*i32"} | SIZES
            yield Variant(chunk_kernel, tiles | PARTIALS, blocks | {"MASKED": masked}, WARPS, **matrix)
            bag = {"first_chunk": "*i32", "pooled": number, "bag_largest": "*fp32", "bag_total": "*fp32"}
            bag |= {"embeddings": number, "fallback": "*i32"} | PARTIALS | SIZES
            constants = {"CHUNKS": CHUNKS, "EMBED": COMBINE_EMBED, "MASKED": masked}
            yield Variant(combine_kernel, bag, constants)
            grads = ("grad_pooled", "grad_embeddings", "grad_logits", "grad_mask")
            bag = {"inner": "*fp32", "largest": "*fp32", "total": "*fp32", "fallback": "*i32"}
            types = tiles | dict.fromkeys(grads, number) | bag
            options = blocks | {"EMBED": BACKWARD_EMBED, "MASKED": masked}
            yield Variant(backward_kernel, types, options, backward_warps(target), **matrix)
