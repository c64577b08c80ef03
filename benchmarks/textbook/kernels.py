"""The formulas that the operators replace, in their textbook form; `bench_kernels.py` times both."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
MIX = ((0.9, 0.2, -0.1), (0.05, 1.1, 0.02), (-0.2, 0.1, 0.8))


def chebyshev(inputs: Tensor, coefficients: Tensor) -> Tensor:
    # The limit is 1 - 1e-6 because float32 rounds tanh of large inputs to 1, where arccos has no derivative.
    angle = inputs.tanh().clamp(-1 + 1e-6, 1 - 1e-6).arccos()
    degrees = torch.arange(coefficients.shape[2], device=inputs.device)
    return torch.einsum("bqk,qok->bo", (angle[..., None] * degrees).cos(), coefficients)


def chebyshev_as_published(inputs: Tensor, coefficients: Tensor) -> Tensor:
    """The form of the first Chebyshev-KAN layers: the arccosine of every input for each degree."""
    degrees = torch.arange(coefficients.shape[2], device=inputs.device)
    x = inputs.tanh().clamp(-1 + 1e-6, 1 - 1e-6)[..., None].expand(-1, -1, len(degrees))
    return torch.einsum("bqk,qok->bo", (x.arccos() * degrees).cos(), coefficients)


def normalize(tiles: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=tiles.device) for v in (MEAN, STD))
    return ((tiles.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def macenko(tiles: Tensor) -> Tensor:
    densities = -torch.log((tiles.float() + 1) / 256) @ torch.tensor(MIX, device=tiles.device).T
    return normalize((256 * torch.exp(-densities) - 1).clip(0, 255))


def histogram(tiles: Tensor, bins: int = 16) -> Tensor:
    """Count in the fixed-point arithmetic of OpenCV; in floats, ties would fall into other bins."""
    red, green, blue = tiles.flatten(1, 2).int().unbind(2)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    saturation = (chroma * (255 * 4096 / value.clamp(min=1)).round().int() + 2048) >> 12
    turn = torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    turn = torch.where(value == red, green - blue, turn)
    hue = ((turn * (30 * 4096 / chroma.clamp(min=1)).round().int() + 2048) >> 12) % 180
    planes = torch.stack([hue * bins // 180, saturation * bins // 256, value * bins // 256], 1)
    first = torch.arange(0, 3 * len(tiles) * bins, bins, device=tiles.device).view(-1, 3, 1)
    places = planes + first
    return torch.bincount(places.flatten(), minlength=3 * len(tiles) * bins).view(-1, 3, bins)


def scan(
    inputs: Tensor, steps: Tensor, decay: Tensor, input_matrix: Tensor, output_matrix: Tensor, skip: Tensor
) -> Tensor:
    kept = (steps[..., None] * decay).exp()
    added = (steps * inputs)[..., None] * input_matrix[:, :, None]
    state, states = torch.zeros_like(kept[:, 0]), []
    for factor, term in zip(kept.unbind(1), added.unbind(1), strict=True):
        state = factor * state + term
        states.append(state)
    return torch.einsum("blds,bls->bld", torch.stack(states, 1), output_matrix) + skip * inputs


def attention(
    embeddings: Tensor, v: Tensor, v0: Tensor, u: Tensor, u0: Tensor, w: Tensor, w0: Tensor, p: float = 0.0
) -> Tensor:
    hidden, gate = (
        dropout(linear(embeddings, v, v0).tanh(), p),
        dropout(linear(embeddings, u, u0).sigmoid(), p),
    )
    return linear(hidden * gate, w, w0)


def attention_pool(embeddings: Tensor, *weights: Tensor) -> Tensor:
    return pool(embeddings, attention(embeddings, *weights))


def projection(features: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Standardize, project, rectify; the deviation is any number, of which 1 + the square is taken."""
    return linear((features - mean) / (1 + deviation.square()), weight, bias).relu()


def distilled(embeddings: Tensor, *weights: Tensor) -> Tensor:
    """Student and teacher, one after the other."""
    logits = attention(embeddings, *weights)
    kept = (logits - logits.amax(0)).exp() * mask(logits)
    return torch.cat(((kept / kept.sum(0)).T @ embeddings, pool(embeddings, logits)))


def pool(embeddings: Tensor, logits: Tensor) -> Tensor:
    return torch.softmax(logits, 0).T @ embeddings


def pool_bags(embeddings: Tensor, logits: Tensor, mask: Tensor, lengths: Sequence[int]) -> Tensor:
    """Pool the kept tiles of one bag after another."""
    bags, pooled = [x.split(list(lengths)) for x in (embeddings, logits, mask)], []
    for f, a, m in zip(*bags, strict=True):
        weights = (a - a.amax(0)).exp() * m
        pooled.append((weights / weights.sum(0)).T @ f)
    return torch.stack(pooled)


def mask(logits: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    soft = torch.sigmoid((logits + noise) / 0.7)
    return (soft > 0.5).float() - soft.detach() + soft


def mask_with_noise(logits: Tensor) -> Tensor:
    """Draw two Gumbel variables; 1e-10 avoids the logarithm of zero."""
    first, second = (-(-(torch.rand_like(logits) + 1e-10).log() + 1e-10).log() for _ in range(2))
    return mask(logits, first - second)


def s4d(
    inputs: Tensor, log_step: Tensor, decay_log: Tensor, frequency: Tensor, output: Tensor, skip: Tensor
) -> Tensor:
    length, rates = inputs.shape[1], torch.complex(-decay_log.exp(), frequency)
    exponents = log_step.exp()[:, None] * rates
    powers = (exponents[..., None] * torch.arange(length, device=inputs.device)).exp()
    weights = torch.view_as_complex(output) * (exponents.exp() - 1) / rates
    response = 2 * torch.einsum("ds,dsl->ld", weights, powers).real
    spectrum = torch.fft.rfft(inputs, 2 * length, dim=1) * torch.fft.rfft(response, 2 * length, dim=0)
    return torch.fft.irfft(spectrum, 2 * length, dim=1)[:, :length] + skip * inputs
