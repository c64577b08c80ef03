"""Random numbers that are a function of a seed and a place: the same in PyTorch and in every kernel.

A generator with a state gives other numbers when work is split otherwise, and its numbers must be kept for
the backward pass. A hash of (seed, index) needs neither: whoever wants the number of a place computes it. The
mixing function is a 32-bit xor-shift-multiply hash with full avalanche. Words are int32, whose products wrap;
`elementary.py` has the same function for kernels.
"""

import torch
from torch import Tensor

FIRST, SECOND = 0x21F0AAAD, 0x735A2D97  # multipliers
WORD = 0xFFFFFFFF


def shift(words: Tensor, by: int) -> Tensor:
    """Shift right, with zeros coming in."""
    return (words >> by).bitwise_and_(WORD >> by)


def mix(words: Tensor) -> Tensor:
    """Hash of 32-bit words, int32; each step works in the tensor that the shift has made."""
    words = shift(words, 16).bitwise_xor_(words).mul_(FIRST)
    words = shift(words, 15).bitwise_xor_(words).mul_(SECOND)
    return shift(words, 15).bitwise_xor_(words)


def key(seed: int) -> int:
    """The 32-bit word that stands for a seed: its two halves, hashed one after the other."""
    word = 0
    for half in (seed & WORD, seed >> 32 & WORD):
        word = word ^ half
        word = (word ^ (word >> 16)) * FIRST & WORD
        word = (word ^ (word >> 15)) * SECOND & WORD
        word ^= word >> 15
    return word - (word >> 31 << 32)  # as a signed number


def bits(seed: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for each element of a contiguous tensor of this shape, int32."""
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device)
    return mix(places ^ key(seed)).view(shape)


def logistic(seed: int, like: Tensor) -> Tensor:
    """G1 - G2 of two standard Gumbel variables: the logistic variable that it is, by inversion.

    The uniform numbers are the 2^23 midpoints of (0, 1), exact in float32, so |G1 - G2| < 17.

    Returns:
        In the shape and on the device of `like`, in its type but at least float32.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    middle = shift(bits(seed, like.shape, like.device), 9).to(wide).add_(0.5)
    return middle.mul_(2**-23).logit_()


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A fresh seed from a generator of the CPU; torch's global one by default."""
    return int(torch.randint(2**62, (), generator=generator))
