"""The whole pre-screening network in one kernel: bytes in, one logit per branch out.

A program takes a block of patches through all layers. Every layer is a matrix product of activations in
registers with a matrix that all programs share; the matrices, 0.3 MB in 16 bits, stay in the L2 cache. The
first maps are computed row by row: a row of the second map needs three rows of the first, and the last of
them is kept for the next row. Layers of 192 numbers are computed in three parts to fit into the registers.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.variants import Variant

PATCHES, WARPS = 16, 4  # patches and warps per program; larger blocks spill registers on gfx942
BRANCHES = 16  # branches per product: the smallest width of a matrix product


@triton.jit
def product(x, weight, total, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """Return total + x @ weight for a weight (ROWS, COLUMNS) that is padded with zeros to its block."""
    i, j = tl.arange(0, x.shape[1]), tl.arange(0, total.shape[1])
    inside = (i[:, None] < ROWS) & (j[None, :] < COLUMNS)
    w = tl.load(weight + i[:, None] * STRIDE + j[None, :], inside, 0.0)
    return tl.dot(x.to(w.dtype), w, total, input_precision="ieee")


@triton.jit
def activate(total, bias, COLUMNS: tl.constexpr):
    """Return ReLU(total + bias)."""
    j = tl.arange(0, total.shape[1])
    return tl.maximum(total + tl.load(bias + j, j < COLUMNS, 0.0).to(tl.float32)[None, :], 0.0)


@triton.jit
def dense(
    x, weight, bias, PATCHES: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Return ReLU(x @ weight + bias)."""
    total = tl.zeros((PATCHES, WIDE), tl.float32)
    return activate(product(x, weight, total, ROWS, COLUMNS, STRIDE), bias, COLUMNS)


@triton.jit
def first_row(patches, weight, bias, patch, n_patches, y, PATCHES: tl.constexpr):
    """Return row y of the first map, (PATCHES, 128), from rows 2y - 1 to 2y + 1 of the patches."""
    column = tl.arange(0, 64)
    total = tl.zeros((PATCHES, 128), tl.float32)
    for above in range(3):
        row = 2 * y - 1 + above
        place = patch.to(tl.int64)[:, None] * 768 + row * 48 + column[None, :]
        inside = (patch[:, None] < n_patches) & (column[None, :] < 48) & (row + 0 * column[None, :] >= 0)
        x = tl.where(inside, tl.load(patches + place, inside, 0).to(tl.float32) / 255 - 0.5, 0.0)
        total = product(x, weight + above * 48 * 128, total, 48, 128, 128)
    return activate(total, bias, 128)


@triton.jit
def forward_kernel(
    patches, logits, first, b1, second, b2, point, b3, third, b4, reduce, b5, expand, b6,
    shrink, b7, widen, b8, scale, b9, head, b10, classifier, b11,
    n_patches, n_branches, PATCHES: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    """Write the logits of a block of patches; `reference.lipn_forward` is the same network."""
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    above = tl.zeros((PATCHES, 128), tl.float32)
    left = tl.zeros((PATCHES, 64), tl.float32)  # the 192 numbers of the third map in three parts
    middle = tl.zeros((PATCHES, 64), tl.float32)
    right = tl.zeros((PATCHES, 64), tl.float32)
    for y in range(4):
        row = product(above, second, tl.zeros((PATCHES, 64), tl.float32), 128, 64, 64)
        x = first_row(patches, first, b1, patch, n_patches, 2 * y, PATCHES)
        row = product(x, second + 128 * 64, row, 128, 64, 64)
        above = first_row(patches, first, b1, patch, n_patches, 2 * y + 1, PATCHES)
        row = activate(product(above, second + 2 * 128 * 64, row, 128, 64, 64), b2, 64)
        row = dense(row, point, b3, PATCHES, 64, 64, 64, 64)
        left = product(row, third + y * 64 * 192, left, 64, 64, 192)
        middle = product(row, third + y * 64 * 192 + 64, middle, 64, 64, 192)
        right = product(row, third + y * 64 * 192 + 128, right, 64, 64, 192)
    total = tl.zeros((PATCHES, 128), tl.float32)
    total = product(activate(left, b4, 64), reduce, total, 64, 96, 96)
    total = product(activate(middle, b4 + 64, 64), reduce + 64 * 96, total, 64, 96, 96)
    total = product(activate(right, b4 + 128, 64), reduce + 128 * 96, total, 64, 96, 96)
    small = activate(total, b5, 96)
    total = tl.zeros((PATCHES, 64), tl.float32)
    for part in range(3):
        wide = dense(small, expand + part * 64, b6 + part * 64, PATCHES, 64, 96, 64, 192)
        total = product(wide, shrink + part * 64 * 48, total, 64, 48, 48)
    x = activate(total, b7, 48)
    x = dense(x, widen, b8, PATCHES, 128, 48, 96, 96)
    x = dense(x, scale, b9, PATCHES, 128, 96, 96, 96)
    x = dense(x, head, b10, PATCHES, 64, 96, 64, 64)
    i = tl.arange(0, 64)
    for start in range(0, n_branches, BRANCHES):
        c = start + tl.arange(0, BRANCHES)
        there = (i[:, None] < 64) & (c[None, :] < n_branches)
        w = tl.load(classifier + i[:, None] * n_branches + c[None, :], there, 0.0)
        bias = tl.load(b11 + c, c < n_branches, 0.0).to(tl.float32)
        result = tl.dot(x.to(w.dtype), w, input_precision="ieee") + bias[None, :]
        wanted = (patch[:, None] < n_patches) & (c[None, :] < n_branches)
        tl.store(logits + patch[:, None] * n_branches + c[None, :], result, wanted)


def forward(patches: Tensor, weights: list[Tensor]) -> Tensor:
    """Launch `forward_kernel` and return the logits (N, C) in the type of the weights."""
    n_patches, n_branches = len(patches), len(weights[-1])
    logits = weights[0].new_empty(n_patches, n_branches)
    if n_patches:
        forward_kernel[(triton.cdiv(n_patches, PATCHES),)](
            patches.contiguous(), logits, *(w.contiguous() for w in weights),
            n_patches, n_branches, PATCHES, BRANCHES, num_warps=WARPS,
        )  # fmt: skip
    return logits


def variants() -> Iterator[Variant]:
    """Return all that `forward` can launch on a GPU, in both types of 16 bits."""
    for number in ("*fp16", "*bf16"):
        sizes = {"n_patches": "i32", "n_branches": "i32", "patches": "*u8"}
        types = dict.fromkeys(forward_kernel.arg_names[1:24], number) | sizes
        blocks = {"PATCHES": PATCHES, "BRANCHES": BRANCHES}
        yield Variant(forward_kernel, types, blocks, WARPS, uses_tensor_cores=True)
