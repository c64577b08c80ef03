"""Which blocks, warps and stages of the kernels are fastest on this GPU: about a minute on 16 cores.

    PYTHONPATH=benchmarks python benchmarks/gpu/blocks.py [--out FILE]

Processes compile all candidates side by side into Triton's cache; then one process times them one after the
other, as the time between start and end on the GPU that the profiler reads. The slide is that of the paper:
10,000 tiles, 1,024 features, 512 embedding dimensions, 256 hidden units, in bfloat16. A target may take the
fastest blocks that `tools/aot_check.py` compiles for it without spilled registers.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from gpu.operators import describe

from hdmil_lib.kernels.chebyshev_kan import gpu as kan
from hdmil_lib.kernels.gated_attention import gpu as attention
from hdmil_lib.kernels.gated_attention_pool import gpu as attention_pool
from hdmil_lib.kernels.segment_softmax_pool import gpu as pool
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.kernels.self_distillation_pool import gpu as distillation
from hdmil_lib.kernels.tile_projection import gpu as projection
from hdmil_lib.storage import write_json

TILES, FEATURES, EMBED, HIDDEN, DEGREE = 10_000, 1024, 512, 256, 12
SHARED = 200_000  # bytes of shared memory that a pipeline of loads may take
FOLDER = Path(__file__).resolve().parents[1] / "results" / "gpu_blocks"

Blocks = dict[str, int]


class Launcher:
    """A kernel that is launched with other options."""

    def __init__(self, kernel: Any, **options: int):
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *values, **named: self.kernel[grid](*values, **(named | self.options))


def candidates() -> Iterator[tuple[str, Blocks]]:
    """Kernels by name, and blocks for each."""
    for t, h, e, w, s in product((32, 64, 128), (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        if (w == 4) == (t * h <= 4096) and 2 * s * e * (t + 2 * h) <= SHARED:
            blocks = {"tiles": t, "hidden": h, "embed": e, "warps": w, "stages": s}
            yield "gated_attention forward", blocks
    for h, e, w, s in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        if (h < 128 or w == 8) and 2 * s * e * (64 + 2 * h) <= SHARED:
            yield "gated_attention_pool forward", {"hidden": h, "embed": e, "warps": w, "stages": s}
    for t, h, e, w, s in product((32, 64), (32, 64), (32, 64, 128), (4, 8), (2, 3)):
        blocks = {"tiles": t, "hidden": h, "embed": e, "warps": w, "stages": s}
        yield "self_distillation_pool backward", blocks
    for t, e, f, s in product((64, 128), (64, 128, 256), (32, 64), (2, 3, 4)):
        if 2 * s * f * (t + e) <= SHARED:
            warps = 8 if t * e > 8192 else 4
            blocks = {"tiles": t, "embed": e, "features": f, "warps": warps, "stages": s}
            yield "tile_projection forward", blocks
    for t, e, f, s in product((32, 64, 128), (64, 128), (64, 128), (1, 2, 3)):
        warps = 8 if e * f > 8192 else 4
        yield (
            "tile_projection backward",
            {"tiles": t, "embed": e, "features": f, "warps": warps, "stages": s},
        )
    for r, q, w in product((16, 32, 64), (32, 64, 128), (2, 4, 8)):
        yield "chebyshev_kan backward", {"rows": r, "inputs": q, "warps": w}
    for c, e, w in product((32, 64, 128), (16, 32, 64), (2, 4)):
        yield "combination of chunks", {"chunks": c, "embed": e, "warps": w}


class Slide:
    """Tensors of a slide, and the launch of each kernel on them."""

    def __init__(self, device: torch.device):
        torch.manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).bfloat16()

        large, bias = (HIDDEN, EMBED), (HIDDEN,)
        self.weights = [normal(*s) / 16 for s in (large, bias, large, bias, (2, HIDDEN), (2,))]
        self.embeddings, self.key = normal(TILES, EMBED), torch.tensor(7, dtype=torch.int32, device=device)
        self.chunks = Segments([TILES], device).chunks()
        self.features = torch.randn(TILES, FEATURES, device=device).half()
        self.first = normal(EMBED, FEATURES) / 32, normal(EMBED)
        self.scale = torch.randn(FEATURES, device=device), torch.rand(FEATURES, device=device) + 0.5
        self.polynomials, self.slopes = normal(EMBED, 1, DEGREE + 1), normal(TILES, 1)
        self.grad, self.active = self.project()
        pooled, logits, mask, *statistics = self.distill()
        self.saved = pooled, logits, mask, self.chunks[0], *statistics
        self.grads = [torch.randn_like(t) for t in (pooled, logits, mask)]

    def project(self) -> Any:
        return projection.forward(self.features, *self.first, *self.scale, None, 0.25, self.key, None)

    def distill(self) -> Any:
        return distillation.forward(
            self.embeddings, self.weights, *self.chunks, 0.25, self.key, self.key, 1.0, 0.5
        )

    def launch(self, name: str, b: Blocks) -> tuple[str, Callable[[], Any], list[tuple[Any, str, Any]]]:
        """The kernel's own name, the call that launches it, and what to replace for these blocks."""
        options = {"num_stages": b["stages"]} if "stages" in b else {"num_warps": b["warps"]}

        def replaced(module: Any, kernel: str, **values: Any) -> tuple[str, list[tuple[Any, str, Any]]]:
            changes = [(module, n, v) for n, v in values.items()]
            return kernel, [*changes, (module, kernel, Launcher(getattr(module, kernel), **options))]

        match name:
            case "gated_attention forward":
                kernel, changes = replaced(
                    attention,
                    "forward_kernel",
                    tile_block=lambda *_: b["tiles"],
                    hidden_block=lambda *_: b["hidden"],
                    embed_block=lambda *_: b["embed"],
                    WARPS=b["warps"],
                )
                return (
                    kernel,
                    lambda: attention.forward(self.embeddings, *self.weights, 0.25, self.key),
                    changes,
                )
            case "gated_attention_pool forward":
                sides = b["hidden"], b["embed"], b["warps"]
                kernel, changes = replaced(attention_pool, "forward_kernel", blocks=lambda *_: sides)
                arguments = self.embeddings, self.weights, None, *self.chunks, 0.0, None
                return kernel, lambda: attention_pool.forward(*arguments), changes
            case "self_distillation_pool backward":
                sides = b["tiles"], b["hidden"], b["embed"], b["warps"]
                kernel, changes = replaced(distillation, "backward_kernel", backward_blocks=lambda *_: sides)
                options_ = 0.25, self.key, self.key, 1.0
                arguments = self.grads, self.embeddings, self.weights[:5], self.saved, *options_
                return kernel, lambda: distillation.backward(*arguments), changes
            case "tile_projection forward":
                sides = b["tiles"], b["embed"], b["features"], b["warps"]
                kernel, changes = replaced(projection, "forward_kernel", blocks=lambda *_: sides)
                return kernel, self.project, changes
            case "tile_projection backward":
                sides = b["tiles"], b["embed"], b["features"], b["warps"]
                kernel, changes = replaced(projection, "backward_kernel", backward_blocks=lambda *_: sides)
                arguments = self.grad, self.active, self.features, self.first[0], *self.scale, None, 0.25
                return kernel, lambda: projection.backward(*arguments), changes
            case "chebyshev_kan backward":
                sides = b["inputs"], b["warps"]
                kernel, changes = replaced(
                    kan, "backward_kernel", backward_blocks=lambda *_: sides, ROWS=b["rows"]
                )
                return kernel, lambda: kan.backward(self.slopes, self.embeddings, self.polynomials), changes
            case _:
                kernel, changes = replaced(
                    pool, "combine_kernel", CHUNKS=b["chunks"], COMBINE_EMBED=b["embed"]
                )
                return kernel, self.distill, changes


def run(slide: Slide, name: str, blocks: Blocks, measure: Callable[[Callable[[], Any], str], Any]) -> Any:
    """Call `measure` with the launch while these blocks are in place."""
    kernel, call, changes = slide.launch(name, blocks)
    with ExitStack() as stack:
        for module, attribute, value in changes:
            stack.enter_context(patch.object(module, attribute, value))
        return measure(call, kernel)


def microseconds(call: Callable[[], Any], kernel: str, calls: int = 6) -> float:
    """Median time of the kernel on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    times = sorted(e.time_range.elapsed_us() for e in profile.events() if e.name == kernel)
    return round(times[len(times) // 2], 1)


def compile_share(part: int, parts: int) -> None:
    """Compile every `parts`-th candidate into Triton's cache."""
    slide = Slide(torch.device("cuda", 0))
    for number, (name, blocks) in enumerate(candidates()):
        if number % parts == part:
            try:
                run(slide, name, blocks, lambda call, _: call())
            except Exception as error:  # some need more than the GPU has; the timing reports it
                print(name, blocks, describe(error), flush=True)
    torch.cuda.synchronize()


def main() -> None:
    device = torch.cuda.get_device_name(0)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    slug = "-".join(device.lower().split())
    parser.add_argument("--out", type=Path, default=FOLDER / f"{slug}.json")
    out = parser.parse_args().out
    parts = max(1, (os.cpu_count() or 2) - 1)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_share, args=(part, parts)) for part in range(parts)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    slide, rows = Slide(torch.device("cuda", 0)), []
    for name, blocks in candidates():
        row: dict[str, Any] = {"kernel": name, "blocks": blocks}
        try:
            row["us"] = run(slide, name, blocks, microseconds)
        except Exception as error:
            row["error"] = describe(error)
        rows.append(row)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    result = {"device": device, **versions, "date": now, "tiles": TILES, "dtype": "bfloat16", "rows": rows}
    write_json(out, json.loads(json.dumps(result)))
    for name in dict.fromkeys(row["kernel"] for row in rows):
        timed = sorted((r for r in rows if r["kernel"] == name and "us" in r), key=lambda r: r["us"])
        for row in timed[:5]:
            print(f"{name}: {row['us']} us with {row['blocks']}")


if __name__ == "__main__":
    main()
