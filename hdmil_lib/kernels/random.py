"""Random numbers as a function of a seed and a position: the same in PyTorch and in every kernel.

The numbers of a generator with a state depend on how the work is split, and must be kept for the backward
pass. A hash of (seed, position) avoids both: the number of a position can be computed anywhere, at any time.
The mixing function is a 32-bit xor-shift-multiply hash with full avalanche, on int32 words whose products
wrap around. `elementary.py` has the same function for kernels.

Seeds are drawn as tensors and never read: a GPU is not waited for, and `torch.compile` sees no number that
changes with every step.
"""

import math

import numpy as np
import torch
from torch import Tensor

FIRST, SECOND = 0x21F0AAAD, 0x735A2D97  # multipliers of the hash
WORD = 0xFFFFFFFF

Seed = int | Tensor
"""A number of up to 64 bits, or such a number as int64 ()."""


def shift(words: Tensor, by: int) -> Tensor:
    """Shift words to the right and fill with zeros, unlike `>>`, which repeats the sign."""
    return (words >> by).bitwise_and_(WORD >> by)


def mix(words: Tensor) -> Tensor:
    """Hash int32 words; each step works in place on the result of its shift."""
    words = shift(words, 16).bitwise_xor_(words).mul_(FIRST)
    words = shift(words, 15).bitwise_xor_(words).mul_(SECOND)
    return shift(words, 15).bitwise_xor_(words)


def key(seed: Seed, device: torch.device | str = "cpu") -> Tensor:
    """Return the word that represents a seed, int32 (): its two halves, hashed one after the other."""
    if on_host(seed):
        word = word_of(seed)
        return torch.tensor(word - (word >> 31 << 32), dtype=torch.int32).to(device, non_blocking=True)
    assert isinstance(seed, Tensor)
    low, high = ((half & WORD).to(torch.int32) for half in (seed, seed >> 32))
    return mix(mix(low) ^ high).to(device, non_blocking=True)


def on_host(seed: Seed) -> bool:
    """Whether a seed can be read as a number: much faster than operators on tensors with one number."""
    if isinstance(seed, int):
        return True
    return type(seed) is Tensor and seed.device.type == "cpu" and not torch.compiler.is_compiling()


def word_of(seed: Seed) -> int:
    """The word of `key` as a number from 0."""
    seed = int(seed)
    return mix_number(mix_number(seed & WORD) ^ (seed >> 32 & WORD))


def mix_number(word: int) -> int:
    """Hash one number of 32 bits, as `mix` does."""
    word = (word ^ (word >> 16)) * FIRST & WORD
    word = (word ^ (word >> 15)) * SECOND & WORD
    return word ^ (word >> 15)


def bits(seed: Seed, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Return 32 random bits for each element of a contiguous tensor of this shape, int32."""
    if _counts_on_cpu(seed, device):
        return torch.from_numpy(_words(seed, shape).view(np.int32))
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device)
    return mix(places ^ key(seed, device)).view(shape)


def _counts_on_cpu(seed: Seed, device: torch.device | str) -> bool:
    """Whether NumPy computes the bits: it has unsigned words, and one operation takes it less time."""
    return torch.device(device).type == "cpu" and on_host(seed) and not torch.compiler.is_compiling()


def _words(seed: Seed, shape: tuple[int, ...]) -> np.ndarray:
    """`bits` as uint32 on the host."""
    words = np.arange(math.prod(shape), dtype=np.uint32)
    words ^= np.uint32(word_of(seed))
    shifted = words >> 16
    words ^= shifted
    for factor in (FIRST, SECOND):
        words *= np.uint32(factor)
        words ^= np.right_shift(words, 15, out=shifted)
    return words.reshape(shape)


def bits_at(seed: Seed, rows: Tensor, width: int) -> Tensor:
    """Return the rows of `bits(seed, (..., width))` with these numbers, int32 (n, width)."""
    places = (rows[:, None] * width + torch.arange(width, device=rows.device)).int()
    return mix(places ^ key(seed, rows.device))


def logistic(seed: Seed, like: Tensor) -> Tensor:
    """Return samples of G1 - G2 for two standard Gumbel variables, which has a logistic distribution.

    They are drawn by inversion. The uniform numbers are the midpoints of 2^23 equal parts of (0, 1), which
    float32 represents exactly, so |G1 - G2| < 17.

    Args:
        seed: Seed of the samples.
        like: Tensor whose shape and device the samples have; their type is its type, but at least float32.
    """
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    if _counts_on_cpu(seed, like.device):
        words = _words(seed, like.shape) >> 9
        uniform = words.astype(np.float64) if wide == torch.float64 else words.astype(np.float32)
        return torch.from_numpy((uniform + 0.5) * 2**-23).logit_()
    parts = shift(bits(seed, like.shape, like.device), 9)
    return parts.to(wide).add_(0.5).mul_(2**-23).logit_()


def draw_seed(generator: torch.Generator | None = None) -> Tensor:
    """Draw a seed, int64 () on the CPU, from a CPU generator, by default from PyTorch's global one."""
    return torch.randint(2**62, (), generator=generator, device="cpu")
