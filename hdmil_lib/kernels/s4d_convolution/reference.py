"""The diagonal state space model S4D in plain PyTorch."""

import torch
from torch import Tensor

FINE = 32  # with l = FINE q + r, exp(x l) is a product of entries of two short tables


def coefficients(
    log_step: Tensor, decay_log: Tensor, frequency: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    """Return C (exp(dt A) - 1) / A and dt A, real and imaginary parts, (D, S, 2) each.

    exp(x + iy) - 1 = (exp(x) - 1) cos y - 2 sin^2(y / 2) + i exp(x) sin y, which is accurate at short steps.
    """
    step, decay = log_step.exp()[:, None], -decay_log.exp()
    x, y = step * decay, step * frequency
    change = torch.complex(x.expm1() * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin())
    amplitudes = torch.view_as_complex(output.contiguous()) * change / torch.complex(decay, frequency)
    return torch.view_as_real(amplitudes), torch.stack([x, y], 2)


def impulse_response(amplitudes: Tensor, exponents: Tensor, length: int) -> Tensor:
    """Compute K[d, l] = 2 Re sum_n a[d, n] exp(l x[d, n]) for 0 <= l < L as a matrix product of two tables.

    Args:
        amplitudes: Amplitudes a, real and imaginary parts, (D, S, 2).
        exponents: Exponents x, real and imaginary parts, (D, S, 2); the real part is negative.
        length: Length L.

    Returns:
        Impulse response K, (D, L).
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
    """Compute y_t = sum_{l <= t} K_l u_{t - l} + D u_t with a Fourier transform of twice the length.

    Args:
        inputs: Inputs u, (B, L, D).
        response: Impulse response K, (D, L).
        skip: Weight D of the direct path, (D,).

    Returns:
        Outputs y, (B, L, D).
    """
    if not inputs.numel():  # empty inputs have no Fourier transform
        return inputs * (response.sum(1) + skip)
    length, size = inputs.shape[1], 2 * inputs.shape[1]
    spectrum = torch.fft.rfft(inputs.mT, size) * torch.fft.rfft(response, size)
    return torch.fft.irfft(spectrum, size)[..., :length].mT + skip * inputs
