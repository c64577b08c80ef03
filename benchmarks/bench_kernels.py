"""Is every operator at least as fast as the formula that it replaces? Forward and backward, in one run.

    python benchmarks/bench_kernels.py [--repeats N]

Each operator is timed against its textbook form, both also through `torch.compile`, in turns, after a check
that results and gradients agree. On a GPU the operator is the Triton kernel, and the floor is the time of
its bytes and arithmetic at the rates that this device reaches on a copy and a matrix product. Medians, in
milliseconds, go to `benchmarks/results/kernels.json` with the device's name.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from hdmil_lib.config import setup
from hdmil_lib.evaluation.tables import to_markdown
from hdmil_lib.kernels import (
    chebyshev_kan,
    cost,
    gated_attention_pool,
    gumbel_mask,
    lipn_forward,
    s4d_convolution,
    segment_softmax_pool,
    selective_scan,
    tile_preprocess,
    tissue_statistics,
)
from hdmil_lib.kernels.tile_preprocess import StainTransform
from hdmil_lib.models import LIPN

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.json"
TOLERANCE = 1e-3  # of the largest number: float32 sums of thousands of terms in another order


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        name: For the table.
        arguments: Makes the tensors on a device; floating ones get gradients.
        textbook: The formula as one would write it.
        operator: Ours.
        cost: Of the forward pass.
    """

    name: str
    arguments: Callable[[str], Sequence[Tensor]]
    textbook: Callable[..., Tensor]
    operator: Callable[..., Tensor]
    cost: cost.Cost


def chebyshev_textbook(inputs: Tensor, coefficients: Tensor) -> Tensor:
    # 1 - 1e-6: the derivative of arccos is infinite at 1, where float32 rounds tanh of large inputs to.
    angle = inputs.tanh().clamp(-1 + 1e-6, 1 - 1e-6).arccos()
    degrees = torch.arange(coefficients.shape[2], device=inputs.device)
    return torch.einsum("bqk,qok->bo", (angle[..., None] * degrees).cos(), coefficients)


def chebyshev_published(inputs: Tensor, coefficients: Tensor) -> Tensor:
    """As the first Chebyshev-KAN layers have it: the arccosine of every input once for each degree."""
    degrees = torch.arange(coefficients.shape[2], device=inputs.device)
    x = inputs.tanh().clamp(-1 + 1e-6, 1 - 1e-6)[..., None].expand(-1, -1, len(degrees))
    return torch.einsum("bqk,qok->bo", (x.arccos() * degrees).cos(), coefficients)


def normal(*shapes: Sequence[int]) -> Callable[[str], list[Tensor]]:
    """Standard normal tensors divided by the square root of their first axis after the rows."""
    return lambda device: [torch.randn(*s, device=device) / max(s[0], 1) ** 0.25 for s in shapes]


def random_tiles(n: int, side: int = 256) -> Callable[[str], list[Tensor]]:
    """RGB bytes, (n, side, side, 3)."""
    return lambda device: [torch.randint(256, (n, side, side, 3), dtype=torch.uint8, device=device)]


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
MIX = ((0.9, 0.2, -0.1), (0.05, 1.1, 0.02), (-0.2, 0.1, 0.8))
STAIN = StainTransform(IDENTITY, MIX, (0.0, 0.0, 0.0), IDENTITY)  # a Macenko transform


def normalize_textbook(tiles: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=tiles.device) for v in (MEAN, STD))
    return ((tiles.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def macenko_textbook(tiles: Tensor) -> Tensor:
    densities = -torch.log((tiles.float() + 1) / 256) @ torch.tensor(MIX, device=tiles.device).T
    return normalize_textbook((256 * torch.exp(-densities) - 1).clip(0, 255))


def histogram_textbook(tiles: Tensor, bins: int = 16) -> Tensor:
    """In the fixed point of OpenCV: in floats, ties would fall into other bins."""
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


def tile_cases(n: int) -> list[Case]:
    """Tiles as an encoder reads them, plain and with their stain normalized, and their colors counted."""
    plain, stained = (cost.tile_preprocess(n, width=4, stain=stain) for stain in (False, True))
    operator = partial(tile_preprocess, mean=MEAN, std=STD)
    return [
        Case(f"tile_preprocess, B = {n}", random_tiles(n), normalize_textbook, operator, plain),
        Case(
            f"tile_preprocess, Macenko, B = {n}", random_tiles(n), macenko_textbook,
            partial(operator, stain=STAIN), stained,
        ),
        Case(
            f"tissue_statistics, N = {n}", random_tiles(n), histogram_textbook,
            lambda tiles: tissue_statistics(tiles).histogram, cost.tissue_statistics(n * 256 * 256),
        ),
    ]  # fmt: skip


def scan_textbook(
    inputs: Tensor, steps: Tensor, decay: Tensor, input_matrix: Tensor, output_matrix: Tensor, skip: Tensor
) -> Tensor:
    kept = (steps[..., None] * decay).exp()
    added = (steps * inputs)[..., None] * input_matrix[:, :, None]
    state, states = torch.zeros_like(kept[:, 0]), []
    for factor, term in zip(kept.unbind(1), added.unbind(1), strict=True):
        state = factor * state + term
        states.append(state)
    return torch.einsum("blds,bls->bld", torch.stack(states, 1), output_matrix) + skip * inputs


def random_scan(length: int, channels: int, states: int) -> Callable[[str], list[Tensor]]:
    """One bag, with the step sizes and decays that Mamba starts from."""

    def arguments(device: str) -> list[Tensor]:
        shapes = ((1, length, channels), (1, length, states), (1, length, states), (channels,))
        inputs, into, out, skip = (torch.randn(s, device=device) for s in shapes)
        steps = 10 ** (-1 - 2 * torch.rand(1, length, channels, device=device))
        decay = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
        return [inputs, steps, decay, into, out, skip]

    return arguments


def scan_cases(length: int = 300, channels: int = 1024, states: int = 16) -> list[Case]:
    """A bag through MambaMIL's scan. Not compiled: unrolling 300 steps takes minutes."""
    return [
        Case(
            f"selective_scan, L = {length}",
            random_scan(length, channels, states),
            torch.compiler.disable(scan_textbook),
            torch.compiler.disable(selective_scan),
            cost.selective_scan(1, length, channels, states, width=4),
        )
    ]


def attention_textbook(
    embeddings: Tensor, v: Tensor, v0: Tensor, u: Tensor, u0: Tensor, w: Tensor, w0: Tensor
) -> Tensor:
    hidden = torch.tanh(embeddings @ v.T + v0) * torch.sigmoid(embeddings @ u.T + u0)
    return torch.softmax(hidden @ w.T + w0, 0).T @ embeddings


def pool_textbook(embeddings: Tensor, logits: Tensor) -> Tensor:
    return torch.softmax(logits, 0).T @ embeddings


def mask_textbook(logits: Tensor) -> Tensor:
    soft = torch.sigmoid(logits / 0.7)
    mask = (soft > 0.5).float() - soft.detach() + soft
    return (1 - torch.prod(1 - mask, 1)).mean()


def attention_cases(n_tiles: int, embed_dim: int = 512, hidden: int = 256, branches: int = 2) -> list[Case]:
    """DMIN's attention on one bag: in one pass, its pooling alone, and its selection (without noise)."""
    bag, logits = (n_tiles, embed_dim), (n_tiles, branches)
    weights = [
        (hidden, embed_dim),
        (hidden,),
        (hidden, embed_dim),
        (hidden,),
        (branches, hidden),
        (branches,),
    ]
    return [
        Case(
            f"gated_attention_pool, N = {n_tiles}", normal(bag, *weights), attention_textbook,
            lambda *tensors: gated_attention_pool(*tensors)[0],
            cost.gated_attention_pool(n_tiles, embed_dim, hidden, branches, width=4),
        ),
        Case(
            f"segment_softmax_pool, N = {n_tiles}", normal(bag, logits), pool_textbook, segment_softmax_pool,
            cost.segment_softmax_pool(n_tiles, embed_dim, branches, width=4),
        ),
        Case(
            f"gumbel_mask, N = {n_tiles}", normal(logits), mask_textbook,
            lambda logits: gumbel_mask(logits, temperature=0.7)[1], cost.gumbel_mask(n_tiles, branches),
        ),
    ]  # fmt: skip


def s4d_textbook(
    inputs: Tensor, log_step: Tensor, decay_log: Tensor, frequency: Tensor, output: Tensor, skip: Tensor
) -> Tensor:
    length, rates = inputs.shape[1], torch.complex(-decay_log.exp(), frequency)
    exponents = log_step.exp()[:, None] * rates
    powers = (exponents[..., None] * torch.arange(length, device=inputs.device)).exp()
    weights = torch.view_as_complex(output) * (exponents.exp() - 1) / rates
    response = 2 * torch.einsum("ds,dsl->ld", weights, powers).real
    spectrum = torch.fft.rfft(inputs, 2 * length, dim=1) * torch.fft.rfft(response, 2 * length, dim=0)
    return torch.fft.irfft(spectrum, 2 * length, dim=1)[:, :length] + skip * inputs


def random_s4d(length: int, channels: int, states: int) -> Callable[[str], list[Tensor]]:
    """One bag, with the parameters that S4D starts from."""

    def arguments(device: str) -> list[Tensor]:
        shapes = ((1, length, channels), (channels, states, 2), (channels,))
        inputs, output, skip = (torch.randn(s, device=device) for s in shapes)
        log_step = math.log(1e-3) + math.log(100) * torch.rand(channels, device=device)
        frequency = math.pi * torch.arange(states, device=device).repeat(channels, 1)
        return [inputs, log_step, torch.full_like(frequency, math.log(0.5)), frequency, output, skip]

    return arguments


def s4d_cases(length: int = 300, channels: int = 512, states: int = 16) -> list[Case]:
    """A bag through S4MIL's layer."""
    return [
        Case(
            f"s4d_convolution, L = {length}",
            random_s4d(length, channels, states),
            s4d_textbook,
            s4d_convolution,
            cost.s4d_convolution(1, length, channels, states),
        )
    ]


def lipn_case(n_patches: int) -> Case:
    """The frozen pre-screening network: layer by layer, and as matrix products."""
    network = LIPN().eval().requires_grad_(False)
    kind = torch.float16 if torch.cuda.is_available() else torch.float32
    packed = network.packed(kind)
    return Case(
        f"lipn_forward, N = {n_patches}",
        random_tiles(n_patches, 16),
        lambda patches: network.to(patches.device)(patches),
        lambda patches: lipn_forward(patches, [w.to(patches.device) for w in packed]),
        cost.lipn_forward(n_patches),
    )


def cases() -> list[Case]:
    """All operators at the sizes of the paper."""
    return (
        [
            Case(
                f"chebyshev_kan{note}, B = {rows}",
                normal((rows, 512), (512, 1, 13)),
                textbook,
                chebyshev_kan,
                cost.chebyshev_kan(rows, 512, 1, 12, width=4),
            )
            for rows in (64, 2_000)
            for note, textbook in (("", chebyshev_textbook), (" as published", chebyshev_published))
        ]
        + attention_cases(2_000)
        + [lipn_case(4_096)]
        + tile_cases(64)
        + scan_cases()
        + s4d_cases()
    )


def run(function: Callable[..., Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients, for a gradient of ones."""
    output = function(*arguments)
    leaves = [a for a in arguments if a.requires_grad]
    if not leaves:
        return [output]
    return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]


def check_agreement(case: Case, arguments: Sequence[Tensor]) -> None:
    """Raise where the two forms differ: a fast wrong answer is not timed."""
    for ours, wanted in zip(run(case.operator, arguments), run(case.textbook, arguments), strict=True):
        difference = (ours.float() - wanted.float()).abs().max()
        if difference > TOLERANCE * wanted.float().abs().max().clamp(min=1):
            raise SystemExit(f"{case.name}: operator and textbook form differ by {difference:.1e}")


def median_ms(contenders: dict[str, Callable], arguments: Sequence[Tensor], repeats: int) -> dict[str, float]:
    """Median time of each contender, in turns."""
    synchronize = torch.cuda.synchronize if arguments[0].is_cuda else lambda: None
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 2):
        for name, function in contenders.items():
            synchronize()
            start = time.perf_counter()
            run(function, arguments)
            synchronize()
            if repeat >= 2:  # the first two warm up and compile
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def this_device() -> cost.Device:
    """What a GPU reaches here, on a copy of 1 GB and a matrix product, rather than what is printed on it."""
    large, matrix = (
        torch.empty(2**28, device="cuda"),
        torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16),
    )
    wide = matrix.float()
    rates = {}
    work = {
        "copy": (lambda: large.clone(), 2 * large.numel() * 4),
        "matrix": (lambda: matrix @ matrix, 2 * 8192**3),
        "vector": (lambda: wide @ wide, 2 * 8192**3),
    }
    for name, (function, amount) in work.items():
        ms = median_ms({name: lambda _, f=function: f()}, [torch.empty(0, device="cuda")], 20)[name]
        rates[name] = amount / ms * 1000
    return cost.Device(torch.cuda.get_device_name(), rates["copy"], rates["matrix"], rates["vector"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    setup()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = this_device() if device == "cuda" else None
    rows = {}
    for case in cases():
        arguments = [a.requires_grad_(a.is_floating_point()) for a in case.arguments(device)]
        check_agreement(case, arguments)
        contenders = {
            "textbook": case.textbook,
            "library": case.operator,
            "textbook, compiled": torch.compile(case.textbook),
            "library, compiled": torch.compile(case.operator),
        }
        torch.compiler.reset()
        row = median_ms(contenders, arguments, repeats)
        row["ratio"] = row["textbook"] / row["library"]
        row["ratio, compiled"] = row["textbook"] / row["library, compiled"]
        if gpu:
            row["floor, forward"] = 1000 * case.cost.seconds(gpu)
        rows[case.name] = {key: round(value, 4) for key, value in row.items()}
        print(case.name, rows[case.name], flush=True)
    result = {
        "device": gpu.name if gpu else f"{platform.machine()} CPU, 1 thread",
        "triton": "measured" if gpu else "not measured: no GPU",
        "torch": torch.__version__,
        "repeats": repeats,
        "load_average": round(os.getloadavg()[0], 1),
        "unit": "ms, forward and backward; floor: forward",
        "operators": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(to_markdown(pd.DataFrame(rows).T))


if __name__ == "__main__":
    main()
