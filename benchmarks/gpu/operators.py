"""Operators on a GPU: formula, compiled formula and Triton kernel against the roof of the device."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu.cases import Case, Sizes, cases
from torch import Tensor

ORDER = (("eager", 0), ("triton", 0), ("triton", 1), ("compiled", 0), ("eager", 1), ("compiled", 1))
"""Forms and, by place, types of numbers of an operator, the most telling first."""

PASSES = ("forward", "forward and backward")

TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1.5e-1, "uint8": 0.0}
"""Largest deviation from the formula in float64 on the same inputs, relative to the largest number.

float32 adds thousands of terms in different orders. Formulas in 16 bits round every intermediate result to 11
(float16) or 8 (bfloat16) bits: in bfloat16 those of a CPU deviate by up to 6e-2, in the gradients of a
selection, and elsewhere by up to 2e-2. Counts are exact. A wrong result is off by about 1.
"""


@dataclass(frozen=True)
class Bench:
    """How this run measures.

    Attributes:
        device: Where it measures.
        timer: `triton.testing.do_bench`, or `wall_clock` without a GPU.
        warmup: Milliseconds of calls before the timed ones.
        rep: Milliseconds of timed calls.
        compiler: Backend of `torch.compile`.
        narrow: The 16-bit type.
    """

    device: torch.device
    timer: Callable[..., float]
    warmup: int
    rep: int
    compiler: str
    narrow: str

    def ms(self, function: Callable[[], Any]) -> float:
        """Median milliseconds of a call."""
        return float(self.timer(function, warmup=self.warmup, rep=self.rep, return_mode="median"))


def wall_clock(
    function: Callable[[], Any],
    warmup: int = 25,
    rep: int = 100,
    grad_to_none: Sequence[Tensor] | None = None,
    quantiles: Sequence[float] | None = None,
    return_mode: str = "mean",
) -> float:
    """Stand in for `triton.testing.do_bench`, which needs a GPU: milliseconds of a single call."""
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def bench_for(interpret: bool, quick: bool) -> Bench:
    """What measures here."""
    if interpret:
        return Bench(torch.device("cpu"), wall_clock, 0, 0, "eager", "float16")
    from triton.testing import do_bench

    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    warmup, rep = (5, 25) if quick else (25, 100)
    narrow = "bfloat16" if has_bfloat16 else "float16"
    return Bench(torch.device("cuda", 0), do_bench, warmup, rep, "inductor", narrow)


def roof(bench: Bench, side: int, numbers: int) -> dict[str, Any]:
    """Rates that the device reaches for a copy and for matrix products, which bound all others here.

    Args:
        bench: What measures.
        side: Side of the matrices.
        numbers: Length of the float32 vector that is copied.

    Returns:
        `copy_gb_s`, counting bytes read and written, and `matrix_tflop_s` by type. float32 is without TF32,
        as the operators compute; it also bounds what runs on the vector units.
    """
    large = torch.empty(numbers, device=bench.device)
    rates = {}
    for name in dict.fromkeys(("float32", "float16", bench.narrow)):
        matrix = torch.randn(side, side, device=bench.device).to(getattr(torch, name))
        rates[name] = 2 * side**3 / bench.ms(lambda m=matrix: m @ m) / 1e9
    copied = 2 * large.nbytes / bench.ms(large.clone) / 1e6
    return {
        "copy_gb_s": _digits(copied),
        "matrix_tflop_s": {name: _digits(rate) for name, rate in rates.items()},
        "measured by": f"a copy of {large.nbytes / 1e9:.2g} GB; products of matrices of {side:,}",
    }


def measure(
    sizes: Sizes, bench: Bench, peaks: dict[str, Any], only: Sequence[str] = ()
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Functions that each measure one form of one operator in one type, the most telling first.

    Args:
        sizes: Sizes of the operators.
        bench: What measures.
        peaks: The roof.
        only: Types to measure; all if empty.
    """
    known = cases(sizes, bench.device)
    for form, place in ORDER:
        for case in known:
            names = [bench.narrow if name == "narrow" else name for name in case.dtypes]
            names = list(dict.fromkeys(names))[place : place + 1]
            for name in names:
                if (not only or name in only) and (form != "compiled" or case.compiles):
                    yield partial(rows, case, name, form, bench, peaks)


def rows(case: Case, dtype: str, form: str, bench: Bench, peaks: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each pass, with an `error` in place of the times if the form fails or is wrong."""
    passes = PASSES if case.differentiable else PASSES[:1]
    found = [
        {"operator": case.operator, "size": case.size, "dtype": dtype, "pass": p, "form": form}
        for p in passes
    ]
    try:
        torch.manual_seed(0)
        tensors = case.tensors(bench.device)
        drawn = [t if i < case.constants else _cast(t, dtype) for i, t in enumerate(tensors)]
        call = _form(case, dtype, form, bench)
        for row in found:
            row |= _time(case, call, drawn, dtype, row["pass"] == PASSES[1], bench, peaks)
    except Exception as error:  # any error concerns this form only
        for row in found:
            if "ms" not in row:
                row["error"] = describe(error)
    torch.compiler.reset()
    return found


def describe(error: BaseException) -> str:
    """An error as one line of a result file."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    if not tensor.is_floating_point() or dtype == "uint8":
        return tensor
    return tensor.to(getattr(torch, dtype))


def _form(case: Case, dtype: str, form: str, bench: Bench) -> Callable[..., Tensor]:
    """The function to time."""
    options = case.options(getattr(torch, dtype))
    backend = "triton" if form == "triton" else "torch"
    call = partial(case.function, **options, backend=backend)
    if form != "compiled":
        return call
    return torch.compile(lambda *tensors: call(*tensors), dynamic=False, backend=bench.compiler)


def _time(
    case: Case,
    call: Callable[..., Tensor],
    drawn: Sequence[Tensor],
    dtype: str,
    backward: bool,
    bench: Bench,
    peaks: dict[str, Any],
) -> dict[str, Any]:
    """Check a form, time it, and set the time beside what the roof allows.

    The bytes of the forward pass are those of `kernels.cost`, as a fused operator moves them. A backward pass
    reads the inputs and the gradient of the output and writes the gradients of the inputs. Its operations
    count twice those of the forward pass: a product has two gradients.
    """
    tensors = _leaves(case, [t.clone() for t in drawn], backward)
    results = run(call, tensors)
    deviation = _deviation(results, _exact(case, drawn, backward))
    if not deviation <= TOLERANCES[dtype]:
        raise ValueError(f"deviates by {deviation:.1e} from float64, {TOLERANCES[dtype]:.0e} is allowed")
    output, *grads = results
    del results
    ms = bench.ms(lambda: run(call, tensors))
    few = bench.device.type == "cuda" and ms < 50  # a profile of 100,000 launches takes minutes
    gpu = kernels_of(lambda: run(call, tensors)) if few else {}
    work = case.cost(1 if dtype == "uint8" else getattr(torch, dtype).itemsize)
    n_bytes, flops = work.fused_bytes, work.flops
    if backward:
        n_bytes += sum(t.nbytes for t in (*tensors, output, *grads))
        flops *= 3
    peak = dtype if work.matrix else "float32"
    by_memory = n_bytes / peaks["copy_gb_s"] / 1e6
    by_arithmetic = flops / peaks["matrix_tflop_s"][peak] / 1e9
    floor, busy = max(by_memory, by_arithmetic), gpu.get("gpu_ms", ms)
    return {
        "ms": _digits(ms),
        **gpu,
        "gb_s": _digits(n_bytes / busy / 1e6),
        "tflop_s": _digits(flops / busy / 1e9),
        "roof_ms": _digits(floor),
        "share_of_roof": _digits(floor / busy),
        "roof": "copy" if by_memory >= by_arithmetic else f"{peak} matrix product",
        "deviation": _digits(deviation),
    }


def kernels_of(call: Callable[[], Any], calls: int = 5) -> dict[str, Any]:
    """Time that the GPU is busy in a call, and what it runs: `gpu_ms` and `launches`.

    A call of small kernels takes as long as the host needs to launch them; how good the kernels are shows in
    the time between the start and the end of each on the GPU, as the profiler reads it there.
    """
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    ran = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in ran)
    return {"gpu_ms": _digits(busy / calls / 1000), "launches": round(len(ran) / calls)}


def run(call: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradients of its sum if any tensor wants one."""
    output = call(*tensors)
    leaves = [t for t in tensors if t.requires_grad]
    if not leaves:
        return [output]
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]


def _exact(case: Case, drawn: Sequence[Tensor], backward: bool) -> list[Tensor]:
    """What `run` gives with the formula in float64."""
    call = partial(case.function, **case.options(torch.float32), backend="torch")
    wide = [t.double() if t.is_floating_point() and i >= case.constants else t for i, t in enumerate(drawn)]
    return run(call, _leaves(case, wide, backward))


def _leaves(case: Case, tensors: Sequence[Tensor], backward: bool) -> list[Tensor]:
    """The tensors, with gradients where they are wanted."""
    for tensor in tensors[case.constants :] if backward else []:
        tensor.requires_grad_(tensor.is_floating_point())
    return list(tensors)


def _deviation(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest deviation of the output and of the norms of the gradients; nan where a number is nan.

    A straight-through mask of zeros and ones is judged by the share of tiles that differ. A gradient that
    cancels to zero is judged relative to a tenth of the largest one.
    """
    ours, exact = found[0].double(), wanted[0].double()
    difference = (ours - exact).abs()
    binary = exact.is_floating_point() and bool(((exact == 0) | (exact == 1)).all())
    parts = [difference.mean() if binary else difference.amax() / exact.abs().amax().clamp(min=1e-30)]
    floor = max((float(g.double().norm()) for g in wanted[1:]), default=0.0) / 10 + 1e-30
    for grad, exact_grad in zip(found[1:], wanted[1:], strict=True):
        exact_grad = exact_grad.double()
        parts.append((grad.double() - exact_grad).norm() / exact_grad.norm().clamp(min=floor))
    return float(torch.stack(parts).cpu().amax())


def _digits(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}") if math.isfinite(value) else value
