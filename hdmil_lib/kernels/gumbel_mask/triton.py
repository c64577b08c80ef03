"""Selection of tiles on a GPU: one read of the logits, one write of the mask.

A program owns a block of tiles and goes through their branches. The noise of a place is computed from the
seed where it is needed, in the forward and again in the backward pass, so it is never stored. Blocks count
the tiles that they keep and a last `sum` adds the counts.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.elementary import random_bits
from hdmil_lib.kernels.variants import Variant

TILES = 256  # of a block


@triton.jit
def select(logits, place, inside, key, inverse_temperature, NOISY: tl.constexpr):
    """A^ = sigmoid((A + noise) / tau) at these places."""
    noisy = tl.load(logits + place, inside, 0.0).to(tl.float32)
    if NOISY:
        uniform = ((random_bits(place, key) >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)
        noisy += tl.log(uniform / (1 - uniform))
    return tl.sigmoid(noisy * inverse_temperature)


@triton.jit
def forward_kernel(
    logits, mask, kept, n_tiles, n_branches, key, inverse_temperature, threshold,
    TILES: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """mask[j, c] = A^ > threshold; kept[block] = tiles that some branch keeps."""
    j = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = j < n_tiles
    union = tl.zeros((TILES,), tl.float32)
    for c in range(n_branches):
        place = j * n_branches + c
        keep = (select(logits, place, inside, key, inverse_temperature, NOISY) > threshold).to(tl.float32)
        tl.store(mask + place, keep, inside)
        union = tl.maximum(union, tl.where(inside, keep, 0.0))
    tl.store(kept + tl.program_id(0), tl.sum(union))


@triton.jit
def backward_kernel(
    grad_mask, grad_keep_ratio, logits, grad_logits, n_tiles, n_branches, key, inverse_temperature, threshold,
    TILES: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """dA = (dM + dr~ [no other branch keeps the tile] / N) A^ (1 - A^) / tau."""
    j = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = j < n_tiles
    share = tl.load(grad_keep_ratio).to(tl.float32) / n_tiles
    count = tl.zeros((TILES,), tl.int32)
    for c in range(n_branches):
        soft = select(logits, j * n_branches + c, inside, key, inverse_temperature, NOISY)
        count += (soft > threshold).to(tl.int32)
    for c in range(n_branches):
        place = j * n_branches + c
        soft = select(logits, place, inside, key, inverse_temperature, NOISY)
        others = count - (soft > threshold).to(tl.int32)
        grad = tl.load(grad_mask + place, inside, 0.0).to(tl.float32) + tl.where(others == 0, share, 0.0)
        tl.store(grad_logits + place, grad * soft * (1 - soft) * inverse_temperature, inside)


def forward(
    logits: Tensor, key: int, noisy: bool, temperature: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Mask (N, C) and keep ratio, in the type of the logits."""
    logits = logits.contiguous()
    blocks = triton.cdiv(len(logits), TILES)
    mask = torch.empty_like(logits)
    kept = torch.empty(blocks, dtype=torch.float32, device=logits.device)
    forward_kernel[(blocks,)](
        logits, mask, kept, *logits.shape, key, 1 / temperature, threshold, TILES, noisy
    )
    return mask, (kept.sum() / len(logits)).to(logits.dtype)


def backward(
    grad_mask: Tensor,
    grad_keep_ratio: Tensor,
    logits: Tensor,
    key: int,
    noisy: bool,
    temperature: float,
    threshold: float,
) -> Tensor:
    """Gradient of the logits (N, C)."""
    logits = logits.contiguous()
    grad_logits = torch.empty_like(logits)
    backward_kernel[(triton.cdiv(len(logits), TILES),)](
        grad_mask.contiguous(), grad_keep_ratio.contiguous(), logits, grad_logits, *logits.shape,
        key, 1 / temperature, threshold, TILES, noisy,
    )  # fmt: skip
    return grad_logits


def variants() -> Iterator[Variant]:
    """All that `forward` and `backward` can launch, in three types of numbers."""
    for number in ("*fp32", "*fp16", "*bf16"):
        sizes = {"n_tiles": "i32", "n_branches": "i32", "key": "i32"}
        types = {"logits": number} | sizes | {"inverse_temperature": "fp32", "threshold": "fp32"}
        for noisy in (False, True):
            constants = {"TILES": TILES, "NOISY": noisy}
            yield Variant(forward_kernel, types | {"mask": number, "kept": "*fp32"}, constants)
            grads = {"grad_mask": number, "grad_keep_ratio": number, "grad_logits": number}
            yield Variant(backward_kernel, types | grads, constants)
