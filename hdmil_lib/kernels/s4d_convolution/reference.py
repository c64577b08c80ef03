"""The diagonal state space layer in plain PyTorch (Gu et al. 2022, S4D)."""

import torch
from torch import Tensor

FINE = 32  # positions l = FINE q + r: exp(x l) is a product of two short tables


def coefficients(
    log_step: Tensor, decay_log: Tensor, frequency: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    """C (exp(dt A) - 1) / A and dt A, both (D, S, 2): real and imaginary.

    exp(x + iy) - 1 = (exp(x) - 1) cos y - 2 sin^2(y / 2) + i exp(x) sin y keeps its digits at short steps.
    """
    step, decay = log_step.exp()[:, None], -decay_log.exp()
    x, y = step * decay, step * frequency
    change = torch.complex(x.expm1() * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin())
    amplitudes = torch.view_as_complex(output.contiguous()) * change / torch.complex(decay, frequency)
    return torch.view_as_real(amplitudes), torch.stack([x, y], 2)


def impulse_response(amplitudes: Tensor, exponents: Tensor, length: int) -> Tensor:
    """K[d, l] = 2 Re sum_n a[d, n] exp(l x[d, n]) for 0 <= l < L, as a matrix product of two tables.

    Args:
        amplitudes: a, (D, S, 2): real and imaginary.
        exponents: x, (D, S, 2), with a negative real part.
        length: L.

    Returns:
        (D, L).
    """
    places = torch.arange(max(FINE, length), dtype=exponents.dtype, device=exponents.device)
    x, y = exponents[..., None, :].unbind(-1)

    def powers(positions: Tensor) -> tuple[Tensor, Tensor]:
        size, angle = (x * positions).exp(), y * positions
        return size * angle.cos(), size * angle.sin()

    (real, imaginary), (a, b) = powers(places[: max(length, 1) : FINE]), amplitudes[..., None, :].unbind(-1)
    coarse = torch.cat([a * real - b * imaginary, -a * imaginary - b * real], 1)
    fine = torch.cat(powers(places[:FINE]), 1)
    return 2 * (coarse.mT @ fine).flatten(1)[:, :length]


def convolve(inputs: Tensor, response: Tensor, skip: Tensor) -> Tensor:
    """y_t = sum_{l <= t} K_l u_{t - l} + D u_t, by the Fourier transform of twice the length.

    Args:
        inputs: u, (B, L, D).
        response: K, (D, L).
        skip: D, (D,).

    Returns:
        y, (B, L, D).
    """
    if not inputs.numel():  # which has no transform
        return inputs * (response.sum(1) + skip)
    length, size = inputs.shape[1], 2 * inputs.shape[1]
    spectrum = torch.fft.rfft(inputs.mT, size) * torch.fft.rfft(response, size)
    return torch.fft.irfft(spectrum, size)[..., :length].mT + skip * inputs
