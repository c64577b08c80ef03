"""Time every operator on a CPU against the formula that it replaces, forward and backward.

    python benchmarks/bench_kernels.py [--repeats N]

Each operator and its textbook form are timed in turns, both also with `torch.compile`, after a check that
their results and gradients agree. Medians in milliseconds are written to `benchmarks/results/kernels.json`
with the name of the device. `bench_gpu.py` times the kernels on a GPU.

The ratio has a 95 % interval of the median over turns. If the interval contains 1, the two forms are equal
within the noise of the run: both run the same matrix products. No operator should be `slower`.
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
import textbook.kernels as textbook
import torch
from torch import Tensor

from hdmil_lib.config import setup
from hdmil_lib.kernels import (
    chebyshev_kan,
    gated_attention,
    gated_attention_pool,
    gumbel_mask,
    lipn_forward,
    s4d_convolution,
    segment_softmax_pool,
    selective_scan,
    self_distillation_pool,
    tile_preprocess,
    tile_projection,
    tissue_statistics,
)
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.kernels.tile_preprocess import StainTransform
from hdmil_lib.models import LIPN
from hdmil_lib.reproduce.tables import to_markdown

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.json"
TOLERANCE = 1e-3  # relative to the largest number, for float32 sums of thousands of terms in different orders


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        name: Name in the table.
        arguments: Function that makes the tensors on a device; floating ones get gradients.
        textbook: Textbook form of the formula.
        operator: Operator of the library.
        checked: Both forms without random numbers, which are compared instead of the timed ones.
    """

    name: str
    arguments: Callable[[torch.device], Sequence[Tensor]]
    textbook: Callable[..., Tensor]
    operator: Callable[..., Tensor]
    checked: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None


def normal(*shapes: Sequence[int]) -> Callable[[torch.device], list[Tensor]]:
    """Return a function that draws normal tensors, scaled down by the fourth root of their first axis."""
    return lambda device: [torch.randn(*s, device=device) / max(s[0], 1) ** 0.25 for s in shapes]


def random_tiles(n: int, side: int = 256) -> Callable[[torch.device], list[Tensor]]:
    """Return a function that draws RGB bytes, (n, side, side, 3)."""
    return lambda device: [torch.randint(256, (n, side, side, 3), dtype=torch.uint8, device=device)]


# A transform of the form that `fit_macenko` returns.
STAIN = StainTransform(textbook.IDENTITY, textbook.MIX, (0.0, 0.0, 0.0), textbook.IDENTITY)


def tile_cases(n: int) -> list[Case]:
    """Tiles for an encoder, with and without stain normalization, and their color statistics."""
    operator = partial(tile_preprocess, mean=textbook.MEAN, std=textbook.STD)
    return [
        Case(f"tile_preprocess, B = {n}", random_tiles(n), textbook.normalize, operator),
        Case(
            f"tile_preprocess, channels last, B = {n}", random_tiles(n),
            lambda tiles: textbook.normalize(tiles).contiguous(memory_format=torch.channels_last),
            partial(operator, channels_last=True),
        ),
        Case(
            f"tile_preprocess, Macenko, B = {n}", random_tiles(n), textbook.macenko,
            partial(operator, stain=STAIN),
        ),
        Case(
            f"tissue_statistics, N = {n}", random_tiles(n), textbook.histogram,
            lambda tiles: tissue_statistics(tiles).histogram,
        ),
    ]  # fmt: skip


def random_scan(length: int, channels: int, states: int) -> Callable[[torch.device], list[Tensor]]:
    """Return a function that draws one bag, with the initial step sizes and decays of Mamba."""

    def arguments(device: torch.device) -> list[Tensor]:
        shapes = ((1, length, channels), (1, length, states), (1, length, states), (channels,))
        inputs, into, out, skip = (torch.randn(s, device=device) for s in shapes)
        steps = 10 ** (-1 - 2 * torch.rand(1, length, channels, device=device))
        decay = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
        return [inputs, steps, decay, into, out, skip]

    return arguments


def scan_cases(length: int = 300, channels: int = 1024, states: int = 16) -> list[Case]:
    """The scan of MambaMIL on one bag, not compiled, since unrolling 300 steps takes minutes."""
    return [
        Case(
            f"selective_scan, L = {length}",
            random_scan(length, channels, states),
            torch.compiler.disable(textbook.scan),
            torch.compiler.disable(selective_scan),
        )
    ]


def random_bags(bag: Sequence[int], logits: Sequence[int]) -> Callable[[torch.device], list[Tensor]]:
    """Return a function that draws embeddings, logits, and a mask that keeps half of the tiles."""
    return lambda device: [*normal(bag, logits)(device), torch.rand(*logits, device=device) < 0.5]


def bags_case(bag: Sequence[int], logits: Sequence[int], n_bags: int) -> Case:
    """Masked pooling of bags of equal lengths."""
    lengths = [bag[0] // n_bags] * n_bags
    segments = Segments(lengths, torch.device("cpu"))
    return Case(
        f"segment_softmax_pool, {n_bags} masked bags, N = {bag[0]}",
        random_bags(bag, logits),
        partial(textbook.pool_bags, lengths=lengths),
        partial(segment_softmax_pool, segments=segments),
    )


def attention_cases(n_tiles: int, embed_dim: int = 512, hidden: int = 256, branches: int = 2) -> list[Case]:
    """The attention of DMIN with its pooling in one pass, with dropout, its pooling, and its selection."""
    bag, logits, width = (n_tiles, embed_dim), (n_tiles, branches), 2 * embed_dim
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
            f"gated_attention_pool, N = {n_tiles}", normal(bag, *weights), textbook.attention_pool,
            lambda *tensors: gated_attention_pool(*tensors)[0],
        ),
        Case(
            f"gated_attention, dropout, N = {n_tiles}", normal(bag, *weights),
            partial(textbook.attention, p=0.25), partial(gated_attention, dropout=0.25, seed=0),
            checked=(textbook.attention, gated_attention),
        ),
        Case(
            f"segment_softmax_pool, N = {n_tiles}", normal(bag, logits), textbook.pool, segment_softmax_pool,
        ),
        bags_case(bag, logits, 4),
        Case(
            f"self_distillation_pool, N = {n_tiles}", normal(bag, *weights), textbook.distilled,
            lambda *tensors: torch.cat(self_distillation_pool(*tensors, temperature=0.7)[:2]),
        ),
        Case(
            f"tile_projection, N = {n_tiles}",
            normal((n_tiles, width), (embed_dim, width), (embed_dim,), (width,), (width,)),
            textbook.projection,
            lambda f, weight, bias, mean, d: tile_projection(f, weight, bias, mean, 1 + d.square()),
        ),
        Case(
            f"gumbel_mask, N = {n_tiles}", normal(logits), textbook.mask,
            partial(gumbel_mask, temperature=0.7),
        ),
        Case(
            f"gumbel_mask, noise, N = {n_tiles}", normal(logits), textbook.mask_with_noise,
            partial(gumbel_mask, seed=0, temperature=0.7),
            checked=(textbook.mask, partial(gumbel_mask, temperature=0.7)),
        ),
    ]  # fmt: skip


def random_s4d(length: int, channels: int, states: int) -> Callable[[torch.device], list[Tensor]]:
    """Return a function that draws one bag, with the initial parameters of S4D."""

    def arguments(device: torch.device) -> list[Tensor]:
        shapes = ((1, length, channels), (channels, states, 2), (channels,))
        inputs, output, skip = (torch.randn(s, device=device) for s in shapes)
        log_step = math.log(1e-3) + math.log(100) * torch.rand(channels, device=device)
        frequency = math.pi * torch.arange(states, device=device).repeat(channels, 1)
        return [inputs, log_step, torch.full_like(frequency, math.log(0.5)), frequency, output, skip]

    return arguments


def s4d_cases(length: int = 300, channels: int = 512, states: int = 16) -> list[Case]:
    """The layer of S4MIL on one bag."""
    return [
        Case(
            f"s4d_convolution, L = {length}",
            random_s4d(length, channels, states),
            textbook.s4d,
            s4d_convolution,
        )
    ]


def lipn_case(n_patches: int) -> Case:
    """The frozen pre-screening network, layer by layer and as matrix products."""
    network = LIPN().eval().requires_grad_(False)
    packed = network.packed(torch.float32)
    return Case(
        f"lipn_forward, N = {n_patches}",
        random_tiles(n_patches, 16),
        network,
        lambda patches: lipn_forward(patches, packed),
    )


def cases() -> list[Case]:
    """Return all operators at the sizes of the paper."""
    return (
        [
            Case(
                f"chebyshev_kan{note}, B = {rows}",
                normal((rows, 512), (512, 1, 13)),
                formula,
                chebyshev_kan,
            )
            for rows in (64, 2_000)
            for note, formula in (
                ("", textbook.chebyshev),
                (" as published", textbook.chebyshev_as_published),
            )
        ]
        + attention_cases(2_000)
        + [lipn_case(4_096)]
        + tile_cases(64)
        + scan_cases()
        + s4d_cases()
    )


def run(function: Callable[..., Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of its sum."""
    output = function(*arguments)
    leaves = [a for a in arguments if a.requires_grad]
    if not leaves:
        return [output]
    return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]


def check_agreement(case: Case, arguments: Sequence[Tensor]) -> None:
    """Exit if the two forms differ."""
    formula, operator = case.checked or (case.textbook, case.operator)
    for ours, wanted in zip(run(operator, arguments), run(formula, arguments), strict=True):
        difference = (ours.float() - wanted.float()).abs().max()
        if difference > TOLERANCE * wanted.float().abs().max().clamp(min=1):
            raise SystemExit(f"{case.name}: operator and textbook form differ by {difference:.1e}")


def times_ms(
    contenders: dict[str, Callable], arguments: Sequence[Tensor], repeats: int
) -> dict[str, list[float]]:
    """Time the contenders in turns, each after an untimed call that fills the caches again."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 2):
        for name, function in contenders.items():
            run(function, arguments)
            start = time.perf_counter()
            run(function, arguments)
            if repeat >= 2:  # the first two turns warm up and compile
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def judge(textbook: list[float], library: list[float]) -> dict[str, float | str]:
    """Return the median ratio over turns, its 95 % interval, and the verdict."""
    ratios = sorted(a / b for a, b in zip(textbook, library, strict=True))
    # The ranks of the interval's ends come from the normal approximation of the binomial distribution.
    outside = max(0, int(len(ratios) / 2 - 0.98 * len(ratios) ** 0.5))
    low, high = ratios[outside], ratios[-1 - outside]
    return {
        "ratio": statistics.median(ratios),
        "at least": low,
        "at most": high,
        "verdict": "faster" if low > 1 else "slower" if high < 1 else "equal within noise",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", nargs="+", default=[""], help="operators to time; the other rows stay")
    parsed = parser.parse_args()
    repeats, only = parsed.repeats, tuple(parsed.only)
    setup()
    rows = {} if "" in only else json.loads(RESULTS.read_text())["operators"]
    for case in [case for case in cases() if case.name.startswith(only)]:
        arguments = [a.requires_grad_(a.is_floating_point()) for a in case.arguments(torch.device("cpu"))]
        check_agreement(case, arguments)
        contenders = {
            "textbook": case.textbook,
            "library": case.operator,
            "textbook, compiled": torch.compile(case.textbook),
            "library, compiled": torch.compile(case.operator),
        }
        torch.compiler.reset()
        times = times_ms(contenders, arguments, repeats)
        row = {name: statistics.median(values) for name, values in times.items()}
        row |= judge(times["textbook"], times["library"])
        row["ratio, compiled"] = row["textbook"] / row["library, compiled"]
        rows[case.name] = {k: v if isinstance(v, str) else round(v, 4) for k, v in row.items()}
        print(case.name, rows[case.name], flush=True)
    result = {
        "device": f"{platform.machine()} CPU, 1 thread",
        "torch": torch.__version__,
        "repeats": repeats,
        "load_average": round(os.getloadavg()[0], 1),
        "unit": "ms, forward and backward",
        "operators": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(to_markdown(pd.DataFrame(rows).T))
    for verdict in ("faster", "equal within noise", "slower"):
        found = [name for name, row in rows.items() if row["verdict"] == verdict]
        print(f"{verdict}: {'; '.join(found) or 'none'}")


if __name__ == "__main__":
    main()
