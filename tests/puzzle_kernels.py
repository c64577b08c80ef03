"""Kernels that solve the puzzles of notebook 09, and kernels with the usual mistakes."""

import triton
import triton.language as tl


@triton.jit
def density(pixels, density, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(pixels + i, i < n, 255.0)
    tl.store(density + i, -tl.log(value / 255), i < n)


@triton.jit
def density_without_mask(pixels, density, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(density + i, -tl.log(tl.load(pixels + i) / 255), i < n)


@triton.jit
def density_of_first_block(pixels, density, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(density + i, -tl.log(tl.load(pixels + i, i < n, 255.0) / 255), i < n)


@triton.jit
def color(patches, means, PIXELS: tl.constexpr):
    patch, pixel = tl.program_id(0), tl.arange(0, PIXELS)
    for channel in range(3):
        values = tl.load(patches + patch * PIXELS * 3 + pixel * 3 + channel)
        tl.store(means + patch * 3 + channel, tl.sum(values.to(tl.float32), 0) / PIXELS)


@triton.jit
def gather(features, kept, compact, WIDTH, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    tile = tl.load(kept + row)
    values = tl.load(features + tile * WIDTH + column, column < WIDTH)
    tl.store(compact + row * WIDTH + column, values, column < WIDTH)


@triton.jit
def gather_masked_by_size(features, kept, compact, WIDTH, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    tile = tl.load(kept + row)
    values = tl.load(features + tile * WIDTH + column, tile * WIDTH + column < 6 * WIDTH)
    tl.store(compact + row * WIDTH + column, values, column < WIDTH)


@triton.jit
def largest(logits, offsets, largest, TILES: tl.constexpr):
    bag = tl.program_id(0)
    end = tl.load(offsets + bag + 1)
    top = -float("inf")
    for first in range(tl.load(offsets + bag), end, TILES):
        i = first + tl.arange(0, TILES)
        top = tl.maximum(top, tl.max(tl.load(logits + i, i < end, -float("inf")), 0))
    tl.store(largest + bag, top)


@triton.jit
def largest_with_zeros(logits, offsets, largest, TILES: tl.constexpr):
    bag = tl.program_id(0)
    end = tl.load(offsets + bag + 1)
    top = -float("inf")
    for first in range(tl.load(offsets + bag), end, TILES):
        i = first + tl.arange(0, TILES)
        top = tl.maximum(top, tl.max(tl.load(logits + i, i < end, 0.0), 0))
    tl.store(largest + bag, top)


@triton.jit
def pooling(embeddings, logits, kept, offsets, pooled, WIDTH: tl.constexpr, TILES: tl.constexpr):
    bag, e = tl.program_id(0), tl.arange(0, WIDTH)
    end = tl.load(offsets + bag + 1)
    top, total = -float("inf"), 0.0
    weighted = tl.zeros((WIDTH,), tl.float32)
    for first in range(tl.load(offsets + bag), end, TILES):
        i = first + tl.arange(0, TILES)
        chosen = tl.load(kept + i, i < end, 0) == 1
        a = tl.load(logits + i, chosen, -float("inf"))
        f = tl.load(embeddings + i[:, None] * WIDTH + e[None, :], chosen[:, None], 0.0)
        new = tl.maximum(top, tl.max(a, 0))
        shift = tl.where(new == -float("inf"), 0.0, new)
        w, old = tl.exp(a - shift), tl.exp(top - shift)
        total = total * old + tl.sum(w, 0)
        weighted = weighted * old + tl.sum(w[:, None] * f, 0)
        top = new
    tl.store(pooled + bag * WIDTH + e, weighted / total)


@triton.jit
def pooling_of_all_loaded(
    embeddings, logits, kept, offsets, pooled, WIDTH: tl.constexpr, TILES: tl.constexpr
):
    bag, e = tl.program_id(0), tl.arange(0, WIDTH)
    end = tl.load(offsets + bag + 1)
    top, total = -1e9, 0.0
    weighted = tl.zeros((WIDTH,), tl.float32)
    for first in range(tl.load(offsets + bag), end, TILES):
        i = first + tl.arange(0, TILES)
        chosen = tl.load(kept + i, i < end, 0) == 1
        a = tl.load(logits + i, chosen, -float("inf"))
        f = tl.load(embeddings + i[:, None] * WIDTH + e[None, :], (i < end)[:, None], 0.0)
        new = tl.maximum(top, tl.max(a, 0))
        w, old = tl.exp(a - new), tl.exp(top - new)
        total = total * old + tl.sum(w, 0)
        weighted = weighted * old + tl.sum(w[:, None] * f, 0)
        top = new
    tl.store(pooled + bag * WIDTH + e, weighted / total)
