"""Compile every kernel for GPUs that need not be present, and refuse kernels that would be slow or fail.

    python tools/aot_check.py [--targets sm_90 ...] [--modules hdmil_lib.kernels.chebyshev_kan.gpu ...]

A variant fails if it spills registers, if it needs more shared memory than the target has, if a `tl.dot`
did not become a matrix instruction, or if the compiler printed an error (it does not raise all of them).
Targets are compiled in parallel, each in a process of its own. Triton caches compiled kernels, and this
script the report of NVIDIA's assembler beside them, so that a second run takes seconds; kernels with an error
are removed from the cache, which does not store messages.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import hdmil_lib.kernels
from hdmil_lib.config import n_threads
from hdmil_lib.kernels.variants import Variant


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it.

    Attributes:
        backend: "cuda" or "hip".
        arch: Compute capability as a number, or AMD's name.
        warp_size: Threads per warp.
        shared_limit: Largest shared memory of a program in bytes.
        matrix_instruction: Regex of its matrix instructions, or None where Triton emits none: since 2024 it
            multiplies element by element before compute capability 8.0 (triton-lang/triton, #5066).
        bfloat16: Whether it computes in bfloat16.
    """

    backend: str
    arch: str | int
    warp_size: int
    shared_limit: int
    matrix_instruction: str | None
    bfloat16: bool = True


TARGETS = {
    "sm_75": Target("cuda", 75, 32, 65_536, None, bfloat16=False),
    "sm_80": Target("cuda", 80, 32, 166_912, r"\bmma\.sync"),
    "sm_89": Target("cuda", 89, 32, 101_376, r"\bmma\.sync"),
    "sm_90": Target("cuda", 90, 32, 232_448, r"\b(wgmma\.mma_async|mma\.sync)"),
    "sm_120": Target("cuda", 120, 32, 101_376, r"\bmma\.sync"),
    "gfx942": Target("hip", "gfx942", 64, 65_536, r"\bv_(mfma|smfmac)"),
    "gfx1100": Target("hip", "gfx1100", 32, 65_536, r"\bv_wmma"),
}


PTXAS_LOG = "ptxas.log"


@dataclass(frozen=True)
class Report:
    """Result of the compilation of a variant: registers per thread, bytes spilled and shared, and faults."""

    name: str
    registers: int
    spills: int
    shared: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        verdict = "; ".join(self.faults) or "ok"
        used = f"{self.registers:4d} registers {self.spills:4d} B spilled {self.shared:7,d} B shared"
        return f"{self.name:<70} {used}  {verdict}"


def kernel_modules() -> list[str]:
    """Return the modules of `hdmil_lib.kernels` with Triton kernels."""
    folders = pkgutil.iter_modules(hdmil_lib.kernels.__path__, "hdmil_lib.kernels.")
    names = [f"{folder.name}.gpu" for folder in folders if folder.ispkg]
    return [name for name in names if importlib.util.find_spec(name)]


def variants(modules: list[str], target: str) -> Iterator[Variant]:
    """Return all variants that these modules launch on a target."""
    for name in modules:
        for variant in importlib.import_module(name).variants(target):
            if TARGETS[target].bfloat16 or "*bf16" not in variant.types.values():
                yield variant


def compile_variant(variant: Variant, target: Target):
    """Return Triton's compiled kernel, and what the compiler wrote to stderr.

    The report of NVIDIA's assembler, which Triton can print, is put into Triton's cache.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = variant.kernel.arg_names
    types = {name: variant.types.get(name, "constexpr") for name in names}
    aligned = [
        i for i, name in enumerate(names) if types[name].startswith("*") or types[name].endswith(":16")
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature={name: kind.removesuffix(":16") for name, kind in types.items()},
        constexprs=dict(variant.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    knobs.nvidia.dump_ptxas_log = True
    printed = io.StringIO()
    stderr = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        os.dup2(said.fileno(), 2)  # the compiler is not Python and does not use sys.stderr
        try:
            with contextlib.redirect_stdout(printed):
                kernel = compile(source, target=gpu, options={"num_warps": variant.num_warps})
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            words = said.read()
            sys.stderr.write(words)
    if printed.getvalue():
        cache_of(kernel).put(printed.getvalue(), PTXAS_LOG, binary=False)
    return kernel, words


def cache_of(kernel):
    """Return the part of Triton's cache that belongs to a compiled kernel."""
    from triton.runtime.cache import get_cache_manager

    return get_cache_manager(kernel.hash)


def forget(kernel) -> None:
    """Remove a compiled kernel from Triton's cache."""
    shutil.rmtree(cache_of(kernel).cache_dir)


def inspect(variant: Variant, target: Target) -> Report:
    """Compile a variant and judge the result."""
    kernel, said = compile_variant(variant, target)
    if target.backend == "cuda" and not cache_of(kernel).has_file(PTXAS_LOG):
        forget(kernel)  # it was compiled by other means
        kernel, said = compile_variant(variant, target)
    registers, spills = (_amd_usage if target.backend == "hip" else _nvidia_usage)(kernel)
    shared = kernel.metadata.shared
    faults = []
    if spills:
        faults.append("spills registers")
    if shared > target.shared_limit:
        faults.append(f"shared memory over {target.shared_limit:,} B")
    assembly = kernel.asm["amdgcn" if target.backend == "hip" else "ptx"]
    wanted = target.matrix_instruction if variant.uses_tensor_cores else None
    if wanted and not re.search(wanted, assembly):
        faults.append("no matrix instruction")
    if errors := re.findall(r"error:.*", said):
        faults += errors
        forget(kernel)
    return Report(variant.name, registers, spills, shared, tuple(faults))


def _amd_usage(kernel) -> tuple[int, int]:
    fields = dict(
        re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", kernel.asm["amdgcn"])
    )
    return int(fields["vgpr_count"]), int(fields["vgpr_spill_count"]) + int(fields["sgpr_spill_count"])


def _nvidia_usage(kernel) -> tuple[int, int]:
    """Return the registers per thread and the bytes of spill stores and loads that the assembler reports."""
    said = Path(cache_of(kernel).get_file(PTXAS_LOG)).read_text()
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return int(re.search(r"Used (\d+) registers", said).group(1)), spills


def check_target(name: str, modules: list[str]) -> bool:
    """Compile for one target in this process, print one line per variant, and return whether all passed."""
    passed = True
    for variant in variants(modules, name):
        report = inspect(variant, TARGETS[name])
        print(f"{name:<8}{report}", flush=True)
        passed &= not report.faults
    return passed


def check_in_subprocess(name: str, modules: list[str]) -> tuple[bool, str]:
    """Run `check_target` in a process of its own, since the compiler may crash; return its output too."""
    command = [sys.executable, __file__, "--here", "--targets", name, "--modules", *modules]
    done = subprocess.run(command, capture_output=True, text=True)
    passed = done.returncode == 0 and "error:" not in done.stderr.lower()
    return passed, done.stdout + ("" if passed else f"{name} FAILED\n{done.stderr[-3000:]}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--modules", nargs="+", default=kernel_modules(), help="modules with `variants()`")
    parser.add_argument("--here", action="store_true", help="run in this process")
    arguments = parser.parse_args()
    if arguments.here:
        return int(not all([check_target(name, arguments.modules) for name in arguments.targets]))
    with ThreadPoolExecutor(n_threads()) as pool:
        results = list(pool.map(lambda name: check_in_subprocess(name, arguments.modules), arguments.targets))
    print("".join(text for _, text in results), end="")
    return int(not all(passed for passed, _ in results))


if __name__ == "__main__":
    sys.exit(main())
