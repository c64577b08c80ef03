"""Elementary functions shared by several Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent, which Triton's interpreter lacks."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def random_bits(place, key):
    """Return the 32 bits of `kernels.random.bits` at a position, for the key of a seed in memory."""
    words = (place ^ tl.load(key)).to(tl.uint32, bitcast=True)
    words = (words ^ (words >> 16)) * 0x21F0AAAD
    words = (words ^ (words >> 15)) * 0x735A2D97
    return words ^ (words >> 15)
