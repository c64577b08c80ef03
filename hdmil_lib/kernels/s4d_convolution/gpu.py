"""The impulse response of S4D on a GPU, without the (D, S, L) tensor of exponentials.

With l = FINE q + r, exp(x l) = exp(x FINE q) exp(x r). A program computes two short tables, of 32 positions
each, and their product, summed over the states, is a block of 1,024 values of the response. This takes a
sixteenth of the exponentials, sines and cosines of the formula, and a small matrix product. In the backward
pass a program processes 16 states of a channel, block after block: the gradient times the fine table is a
matrix product again, and the coarse table completes the sum. No two programs write to the same result.
Everything is computed in float32, like the Fourier transform that follows.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.blocks import target_of
from hdmil_lib.kernels.variants import Variant

STATES = tl.constexpr(16)  # states that are summed at once, and states per program in the backward pass
COARSE, FINE = 32, 32  # a block of the response has COARSE x FINE positions
BACKWARD_COARSE = 16  # in the backward pass, in which 32 spill registers on sm_75
WARPS = 8  # warps per program; with 4 the tables spill registers
SIZES = ("length", "n_states")  # arguments that differ from call to call and must not cause a recompilation


@triton.jit
def load_pair(pairs, d, s, n_states):
    """Load the real and imaginary parts of states s of channel d, with zeros beyond the last state."""
    place, inside = pairs + (d * n_states + s) * 2, s < n_states
    real, imaginary = tl.load(place, inside, 0.0), tl.load(place + 1, inside, 0.0)
    return real.to(tl.float32), imaginary.to(tl.float32)


@triton.jit
def powers(x, y, positions):
    """Return the real and imaginary parts of exp((x + iy) l) at positions l."""
    size, angle = tl.exp(x * positions), y * positions
    return size * tl.cos(angle), size * tl.sin(angle)


@triton.jit(do_not_specialize=SIZES)
def response_kernel(
    amplitudes, exponents, response, length, n_states, COARSE: tl.constexpr, FINE: tl.constexpr
):
    """Write a block of K[d, l] = 2 Re sum_n a[d, n] exp(l x[d, n])."""
    d = tl.program_id(0)
    q = (tl.program_id(1) * COARSE + tl.arange(0, COARSE)) * FINE
    r = tl.arange(0, FINE)
    tile = tl.zeros((COARSE, FINE), tl.float32)
    for start in range(0, n_states, STATES):
        s = start + tl.arange(0, STATES)
        a, b = load_pair(amplitudes, d, s, n_states)
        x, y = load_pair(exponents, d, s, n_states)
        real, imaginary = powers(x[None, :], y[None, :], q[:, None].to(tl.float32))
        coarse = 2 * (a[None, :] * real - b[None, :] * imaginary)
        coarse_imaginary = -2 * (a[None, :] * imaginary + b[None, :] * real)
        real, imaginary = powers(x[:, None], y[:, None], r[None, :].to(tl.float32))
        tile = tl.dot(coarse, real, tile, input_precision="ieee")
        tile = tl.dot(coarse_imaginary, imaginary, tile, input_precision="ieee")
    places = q[:, None] + r[None, :]
    tl.store(response + d.to(tl.int64) * length + places, tile, places < length)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad_response, amplitudes, exponents, grad_amplitudes, grad_exponents, length, n_states,
    COARSE: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of 16 states of a channel.

    With G = sum_l g_l exp(x l) and H = sum_l l g_l exp(x l), the gradients with respect to the real and
    imaginary parts are (2 Re G, -2 Im G) for a and (2 Re aH, -2 Im aH) for x.
    """
    d, s = tl.program_id(0), tl.program_id(1) * STATES + tl.arange(0, STATES)
    a, b = load_pair(amplitudes, d, s, n_states)
    x, y = load_pair(exponents, d, s, n_states)
    r = tl.arange(0, FINE)
    far = r[:, None].to(tl.float32)
    fine_real, fine_imaginary = powers(x[None, :], y[None, :], far)
    g_real = tl.zeros((COARSE, STATES), tl.float32)
    g_imaginary = tl.zeros((COARSE, STATES), tl.float32)
    h_real = tl.zeros((COARSE, STATES), tl.float32)
    h_imaginary = tl.zeros((COARSE, STATES), tl.float32)
    for start in range(0, length, COARSE * FINE):
        q = start + tl.arange(0, COARSE) * FINE
        places = q[:, None] + r[None, :]
        grad = tl.load(grad_response + d.to(tl.int64) * length + places, places < length, 0.0)
        u = tl.dot(grad, fine_real, input_precision="ieee")
        v = tl.dot(grad, fine_imaginary, input_precision="ieee")
        u_far = tl.dot(grad, far * fine_real, input_precision="ieee")
        v_far = tl.dot(grad, far * fine_imaginary, input_precision="ieee")
        base = q[:, None].to(tl.float32)
        real, imaginary = powers(x[None, :], y[None, :], base)
        g_real += real * u - imaginary * v
        g_imaginary += real * v + imaginary * u
        u_far, v_far = u_far + base * u, v_far + base * v
        h_real += real * u_far - imaginary * v_far
        h_imaginary += real * v_far + imaginary * u_far
    place, inside = (d * n_states + s) * 2, s < n_states
    tl.store(grad_amplitudes + place, 2 * tl.sum(g_real, 0), inside)
    tl.store(grad_amplitudes + place + 1, -2 * tl.sum(g_imaginary, 0), inside)
    real, imaginary = tl.sum(h_real, 0), tl.sum(h_imaginary, 0)
    tl.store(grad_exponents + place, 2 * (a * real - b * imaginary), inside)
    tl.store(grad_exponents + place + 1, -2 * (a * imaginary + b * real), inside)


def backward_fine(target: str) -> int:
    """Return the fine positions of a block in the backward pass: half on gfx1100, which has few registers."""
    return 32 if target == "gfx1100" else 64


def forward(amplitudes: Tensor, exponents: Tensor, length: int) -> Tensor:
    """Launch `response_kernel` and return K, float32 (D, L)."""
    channels, n_states, _ = amplitudes.shape
    response = torch.empty(channels, length, dtype=torch.float32, device=amplitudes.device)
    if response.numel():
        response_kernel[(channels, triton.cdiv(length, COARSE * FINE))](
            amplitudes.contiguous(), exponents.contiguous(), response, length, n_states, COARSE, FINE,
            num_warps=WARPS,
        )  # fmt: skip
    return response


def backward(grad: Tensor, amplitudes: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `backward_kernel` and return the gradients of amplitudes and exponents, (D, S, 2) each."""
    channels, n_states, _ = amplitudes.shape
    amplitudes, exponents = amplitudes.contiguous(), exponents.contiguous()
    grads = torch.empty_like(amplitudes), torch.empty_like(exponents)
    if amplitudes.numel():
        backward_kernel[(channels, triton.cdiv(n_states, STATES.value))](
            grad.contiguous(), amplitudes, exponents, *grads, grad.shape[1], n_states,
            BACKWARD_COARSE, backward_fine(target_of(grad.device)), num_warps=WARPS,
        )  # fmt: skip
    return grads


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` and `backward` can launch."""
    types = dict.fromkeys(("amplitudes", "exponents"), "*fp32") | dict.fromkeys(SIZES, "i32")
    blocks = {"COARSE": COARSE, "FINE": FINE}
    yield Variant(response_kernel, types | {"response": "*fp32"}, blocks, WARPS)
    grads = dict.fromkeys(("grad_response", "grad_amplitudes", "grad_exponents"), "*fp32")
    blocks = {"COARSE": BACKWARD_COARSE, "FINE": backward_fine(target)}
    yield Variant(backward_kernel, types | grads, blocks, WARPS)
