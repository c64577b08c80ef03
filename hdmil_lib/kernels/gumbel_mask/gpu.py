"""Selection of tiles on a GPU: one read of the logits and one write of the mask.

The noise at a position is computed from the seed where it is needed, once in the forward and once in the
backward pass, so it is never stored.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.elementary import random_bits
from hdmil_lib.kernels.variants import Variant

VALUES = 512  # values per program
VARYING = ("n_values",)  # differs from call to call and must not cause a recompilation


@triton.jit
def soften(values, place, key, inverse_temperature, NOISY: tl.constexpr):
    """Return A^ = sigmoid((A + noise) / tau) of logits with these positions."""
    if NOISY:
        uniform = ((random_bits(place, key) >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)
        values += tl.log(uniform / (1 - uniform))
    return tl.sigmoid(values * inverse_temperature)


@triton.jit
def select(logits, place, inside, key, inverse_temperature, NOISY: tl.constexpr):
    """Return `soften` of the logits at these positions."""
    values = tl.load(logits + place, inside, 0.0).to(tl.float32)
    return soften(values, place, key, inverse_temperature, NOISY)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    logits, mask, n_values, key, inverse_temperature, threshold, VALUES: tl.constexpr, NOISY: tl.constexpr
):
    """Write 1 where A^ > threshold and 0 elsewhere, for a block of values."""
    place = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    inside = place < n_values
    soft = select(logits, place, inside, key, inverse_temperature, NOISY)
    tl.store(mask + place, (soft > threshold).to(tl.float32), inside)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    grad_mask, logits, grad_logits, n_values, key, inverse_temperature,
    VALUES: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """Write dA = dM A^ (1 - A^) / tau for a block of values."""
    place = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    inside = place < n_values
    soft = select(logits, place, inside, key, inverse_temperature, NOISY)
    grad = tl.load(grad_mask + place, inside, 0.0).to(tl.float32)
    tl.store(grad_logits + place, grad * soft * (1 - soft) * inverse_temperature, inside)


def forward(logits: Tensor, key: Tensor | None, temperature: float, threshold: float) -> Tensor:
    """Launch `forward_kernel` and return the mask (N, C) in the type of the logits."""
    logits = logits.contiguous()
    mask, n_values = torch.empty_like(logits), logits.numel()
    if n_values:
        forward_kernel[(triton.cdiv(n_values, VALUES),)](
            logits, mask, n_values, key, 1 / temperature, threshold, VALUES, key is not None
        )
    return mask


def backward(grad_mask: Tensor, logits: Tensor, key: Tensor | None, temperature: float) -> Tensor:
    """Launch `backward_kernel` and return the gradient of the logits (N, C)."""
    logits = logits.contiguous()
    grad_logits, n_values = torch.empty_like(logits), logits.numel()
    if n_values:
        backward_kernel[(triton.cdiv(n_values, VALUES),)](
            grad_mask.contiguous(),
            logits,
            grad_logits,
            n_values,
            key,
            1 / temperature,
            VALUES,
            key is not None,
        )
    return grad_logits


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` and `backward` can launch, in three types of numbers."""
    for number in ("*fp32", "*fp16", "*bf16"):
        types = {"logits": number, "n_values": "i32", "inverse_temperature": "fp32"}
        for noisy in (False, True):
            constants = {"VALUES": VALUES, "NOISY": noisy} | ({} if noisy else {"key": None})
            numbers = types | ({"key": "*i32"} if noisy else {})
            yield Variant(forward_kernel, numbers | {"mask": number, "threshold": "fp32"}, constants)
            yield Variant(backward_kernel, numbers | {"grad_mask": number, "grad_logits": number}, constants)
