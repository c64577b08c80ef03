"""Random numbers as a function of a seed and a position: the same in PyTorch and in every kernel.

The numbers of a generator with a state depend on how the work is split, and must be kept for the backward
pass. A hash of (seed, position) avoids both: the number of a position can be computed anywhere, at any time.
The mixing function is a 32-bit xor-shift-multiply hash with full avalanche, on int32 words whose products
wrap around. `elementary.py` has the same function for kernels.
"""

import torch
from torch import Tensor

FIRST, SECOND = 0x21F0AAAD, 0x735A2D97  # multipliers of the hash
WORD = 0xFFFFFFFF


def shift(words: Tensor, by: int) -> Tensor:
    """Shift words to the right and fill with zeros, unlike `>>`, which repeats the sign."""
    return (words >> by).bitwise_and_(WORD >> by)


def mix(words: Tensor) -> Tensor:
    """Hash int32 words; each step works in place on the result of its shift."""
    words = shift(words, 16).bitwise_xor_(words).mul_(FIRST)
    words = shift(words, 15).bitwise_xor_(words).mul_(SECOND)
    return shift(words, 15).bitwise_xor_(words)


def key(seed: int) -> int:
    """Return the 32-bit word that represents a seed: its two halves, hashed one after the other."""
    word = 0
    for half in (seed & WORD, seed >> 32 & WORD):
        word = word ^ half
        word = (word ^ (word >> 16)) * FIRST & WORD
        word = (word ^ (word >> 15)) * SECOND & WORD
        word ^= word >> 15
    return word - (word >> 31 << 32)  # as a signed number, the range of int32


def bits(seed: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Return 32 random bits for each element of a contiguous tensor of this shape, int32."""
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device)
    return mix(places ^ key(seed)).view(shape)


def logistic(seed: int, like: Tensor) -> Tensor:
    """Return samples of G1 - G2 for two standard Gumbel variables, which has a logistic distribution.

    They are drawn by inversion. The uniform numbers are the midpoints of 2^23 equal parts of (0, 1), which
    float32 represents exactly, so |G1 - G2| < 17.

    Args:
        seed: Seed of the samples.
        like: Tensor whose shape and device the samples have; their type is its type, but at least float32.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    middle = shift(bits(seed, like.shape, like.device), 9).to(wide).add_(0.5)
    return middle.mul_(2**-23).logit_()


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Draw a seed from a CPU generator, by default from PyTorch's global one."""
    return int(torch.randint(2**62, (), generator=generator))
