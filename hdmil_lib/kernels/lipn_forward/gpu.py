"""The whole pre-screening network in one kernel: bytes in, one logit per branch out.

A program takes a block of patches through all layers. Every layer is a matrix product of activations in
registers with a matrix that all programs share; the matrices, 0.3 MB in 16 bits, stay in the L2 cache. The
first maps are computed row by row: a row of the second map needs three rows of the first, and the last of
them is kept for the next row. Layers of 192 numbers are computed in three parts to fit into the registers.
Activations are (numbers, patches), so that warps share the numbers of a layer: for the transpose, the
compiler for AMD lets every warp compute all of them.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.blocks import target_of
from hdmil_lib.kernels.variants import Variant

PATCHES = 16  # patches per program; larger blocks spill registers on gfx942
BRANCHES = 16  # branches per product: the smallest width of a matrix product


@triton.jit
def product(x, weight, total, ROWS, COLUMNS, STRIDE, PART: tl.constexpr):
    """Return total + weight.T @ x for a weight (ROWS, COLUMNS) that is padded with zeros to its block.

    More than `PART` rows are cut into halves, whose products are added.
    """
    if x.shape[0] > PART:
        HALF: tl.constexpr = x.shape[0] // 2
        upper, lower = tl.split(tl.permute(tl.reshape(x, (2, HALF, x.shape[1])), (1, 2, 0)))
        total = product(upper, weight, total, ROWS, COLUMNS, STRIDE, PART)
        return product(lower, weight + HALF * STRIDE, total, ROWS - HALF, COLUMNS, STRIDE, PART)
    i, j = tl.arange(0, x.shape[0]), tl.arange(0, total.shape[0])
    inside = (i[None, :] < ROWS) & (j[:, None] < COLUMNS)
    w = tl.load(weight + i[None, :] * STRIDE + j[:, None], inside, 0.0)
    return tl.dot(w, x.to(w.dtype), total, input_precision="ieee")


@triton.jit
def activate(total, bias, COLUMNS: tl.constexpr):
    """Return ReLU(total + bias)."""
    j = tl.arange(0, total.shape[0])
    return tl.maximum(total + tl.load(bias + j, j < COLUMNS, 0.0).to(tl.float32)[:, None], 0.0)


@triton.jit
def dense(
    x, weight, bias, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Return ReLU(weight.T @ x + bias)."""
    total = tl.zeros((WIDE, x.shape[1]), tl.float32)
    return activate(product(x, weight, total, ROWS, COLUMNS, STRIDE, PART), bias, COLUMNS)


@triton.jit
def first_row(patches, weight, bias, patch, n_patches, y, PART: tl.constexpr):
    """Return row y of the first map, (128, PATCHES), from rows 2y - 1 to 2y + 1 of the patches."""
    column = tl.arange(0, 64)
    total = tl.zeros((128, patch.shape[0]), tl.float32)
    for above in range(3):
        row = 2 * y - 1 + above
        place = patch.to(tl.int64)[None, :] * 768 + row * 48 + column[:, None]
        inside = (patch[None, :] < n_patches) & (column[:, None] < 48) & (row + 0 * column[:, None] >= 0)
        x = tl.where(inside, tl.load(patches + place, inside, 0).to(tl.float32) / 255 - 0.5, 0.0)
        total = product(x, weight + above * 48 * 128, total, 48, 128, 128, PART)
    return activate(total, bias, 128)


@triton.jit(do_not_specialize=("n_patches",))
def forward_kernel(
    patches, logits, first, b1, second, b2, point, b3, third, b4, reduce, b5, expand, b6,
    shrink, b7, widen, b8, scale, b9, head, b10, classifier, b11,
    n_patches, n_branches, zero,
    PATCHES: tl.constexpr, BRANCHES: tl.constexpr, PART: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """Write the logits of a block of patches; `reference.lipn_forward` is the same network.

    `zero` is 0, which the compiler does not know. With `RELOAD` it is added to what would otherwise be read
    once, before a loop, and be held in registers that some GPUs do not have.
    """
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    above = tl.zeros((128, PATCHES), tl.float32)
    left = tl.zeros((64, PATCHES), tl.float32)  # the 192 numbers of the third map in three parts
    middle = tl.zeros((64, PATCHES), tl.float32)
    right = tl.zeros((64, PATCHES), tl.float32)
    for y in range(4):
        if RELOAD:
            first, b1, second, b2 = first + zero, b1 + zero, second + zero, b2 + zero
            point, b3 = point + zero, b3 + zero
        x = first_row(patches, first, b1, patch, n_patches, 2 * y, PART)
        below = first_row(patches, first, b1, patch, n_patches, 2 * y + 1, PART)
        row = product(above, second, tl.zeros((64, PATCHES), tl.float32), 128, 64, 64, PART)
        row = product(x, second + 128 * 64, row, 128, 64, 64, PART)
        row = activate(product(below, second + 2 * 128 * 64, row, 128, 64, 64, PART), b2, 64)
        above = below
        row = dense(row, point, b3, 64, 64, 64, 64, PART)
        left = product(row, third + y * 64 * 192, left, 64, 64, 192, PART)
        middle = product(row, third + y * 64 * 192 + 64, middle, 64, 64, 192, PART)
        right = product(row, third + y * 64 * 192 + 128, right, 64, 64, 192, PART)
    total = tl.zeros((128, PATCHES), tl.float32)
    total = product(activate(left, b4, 64), reduce, total, 64, 96, 96, PART)
    total = product(activate(middle, b4 + 64, 64), reduce + 64 * 96, total, 64, 96, 96, PART)
    total = product(activate(right, b4 + 128, 64), reduce + 128 * 96, total, 64, 96, 96, PART)
    small = activate(total, b5, 96)
    total = tl.zeros((64, PATCHES), tl.float32)
    for part in range(3):
        if RELOAD:
            small += zero
        wide = dense(small, expand + part * 64, b6 + part * 64, 64, 96, 64, 192, PART)
        total = product(wide, shrink + part * 64 * 48, total, 64, 48, 48, PART)
    x = activate(total, b7, 48)
    x = dense(x, widen, b8, 128, 48, 96, 96, PART)
    x = dense(x, scale, b9, 128, 96, 96, 96, PART)
    x = dense(x, head, b10, 64, 96, 64, 64, PART)
    for start in range(0, n_branches, BRANCHES):
        c = start + tl.arange(0, BRANCHES)
        result = tl.zeros((BRANCHES, PATCHES), tl.float32)
        result = product(x, classifier + start, result, 64, n_branches - start, n_branches, PART)
        result += tl.load(b11 + c, c < n_branches, 0.0).to(tl.float32)[:, None]
        wanted = (patch[None, :] < n_patches) & (c[:, None] < n_branches)
        tl.store(logits + patch[None, :] * n_branches + c[:, None], result, wanted)


def blocks(target: str) -> tuple[dict[str, int | bool], int]:
    """Return the constants and the warps per program for a target.

    Targets with few registers, or without matrix instructions, multiply in parts and read weights again.
    """
    part = {"sm_75": 32, "gfx1100": 16}.get(target, 128)
    constants = {"PATCHES": PATCHES, "BRANCHES": BRANCHES, "PART": part, "RELOAD": part < 128}
    return constants, 8 if target == "sm_75" else 4


def forward(patches: Tensor, weights: list[Tensor]) -> Tensor:
    """Launch `forward_kernel` and return the logits (N, C) in the type of the weights."""
    n_patches, n_branches = len(patches), len(weights[-1])
    logits = weights[0].new_empty(n_patches, n_branches)
    constants, warps = blocks(target_of(patches.device))
    if n_patches:
        forward_kernel[(triton.cdiv(n_patches, PATCHES),)](
            patches.contiguous(), logits, *(w.contiguous() for w in weights),
            n_patches, n_branches, 0, **constants, num_warps=warps,
        )  # fmt: skip
    return logits


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` can launch on a GPU, in both types of 16 bits."""
    constants, warps = blocks(target)
    for number in ("*fp16", "*bf16"):
        sizes = {"n_patches": "i32", "n_branches": "i32", "zero": "i32:16", "patches": "*u8"}
        types = dict.fromkeys(forward_kernel.arg_names[1:24], number) | sizes
        yield Variant(forward_kernel, types, constants, warps, uses_tensor_cores=True)
