"""The Triton kernels without a GPU: tested in the interpreter, and compiled ahead of time."""

import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hdmil_lib.kernels.blocks import TARGETS

ROOT = Path(__file__).resolve().parent.parent
AOT = [sys.executable, str(ROOT / "tools" / "aot_check.py")]
KERNEL_TESTS = sorted(path.stem for path in (ROOT / "tests" / "kernels").glob("test_*.py"))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Run tests/kernels once in the interpreter, in its own process, and return the results of each file."""
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider", "-n", "0"]
    command += ["--continue-on-collection-errors", f"--junitxml={report}"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout[-5000:] + run.stderr[-2000:]
    results = defaultdict(list)
    for result in ElementTree.parse(report).iter("testcase"):
        module = result.get("classname") or result.get("name")  # the latter if a file cannot be imported
        results[module.rpartition(".")[2]].append(result)
    assert set(results) <= set(KERNEL_TESTS)
    return results


@pytest.mark.slow
@pytest.mark.xdist_group("interpreter")  # one worker runs them all
@pytest.mark.parametrize("file", KERNEL_TESTS)
def test_kernels_equal_their_references_in_the_interpreter(interpreted, file):
    faults = [
        f"{result.get('name')}\n{fault.text}"
        for result in interpreted[file]
        for fault in result
        if fault.tag in ("failure", "error")
    ]
    assert not faults, "\n".join(faults)[-5000:]
    assert any(len(result) == 0 for result in interpreted[file]), "no test has passed"


@pytest.mark.slow
def test_every_variant_compiles_without_spills_for_every_target():
    environment = os.environ.copy()
    environment.pop("OMP_NUM_THREADS", None)  # a compiler has one thread, so that all cores have work
    run = subprocess.run(AOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert {line.split()[0] for line in run.stdout.splitlines()} == set(TARGETS)


BAD = {
    "spills registers": """
        @triton.jit
        def kernel(x, y, N: tl.constexpr):
            place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
            tile = tl.load(x + place)
            tl.store(y + place, tile - tl.sum(tile))

        def variants(target):
            yield Variant(kernel, {"x": "*fp32", "y": "*fp32"}, {"N": 128}, num_warps=1)
    """,
    "shared memory over": """
        @triton.jit
        def kernel(x, y, N: tl.constexpr):
            i = tl.arange(0, N)
            tile = tl.load(x + i[:, None] * N + i[None, :])
            tl.store(y + i[:, None] * N + i[None, :], tl.dot(tile, tl.trans(tile)))

        def variants(target):
            yield Variant(kernel, {"x": "*fp16", "y": "*fp32"}, {"N": 256}, num_warps=8)
    """,
    "no matrix instruction": """
        @triton.jit
        def kernel(x, y, N: tl.constexpr):
            i = tl.arange(0, N)
            tl.store(y + i, tl.load(x + i) + 1)

        def variants(target):
            yield Variant(kernel, {"x": "*fp32", "y": "*fp32"}, {"N": 64}, uses_tensor_cores=True)
    """,
    # AMD's compiler has no register s200 and prints this error, but still returns a binary.
    "error: could not allocate input reg": """
        @triton.jit
        def kernel(x, y, N: tl.constexpr):
            i = tl.arange(0, N)
            loaded = [tl.load(x + i)]
            tile = tl.inline_asm_elementwise("; $0 $1", "=v,{s200}", loaded, tl.float32, True, 1)
            tl.store(y + i, tile)

        def variants(target):
            yield Variant(kernel, {"x": "*fp32", "y": "*fp32"}, {"N": 64})
    """,
}
ON = {"spills registers": ["sm_80"], "no matrix instruction": ["sm_80", "sm_90", "gfx942"]}


@pytest.mark.parametrize("fault", BAD)
def test_the_check_refuses_a_bad_kernel(fault, tmp_path):
    header = "import triton\nimport triton.language as tl\nfrom hdmil_lib.kernels.variants import Variant\n\n"
    (tmp_path / "bad.py").write_text(header + textwrap.dedent(BAD[fault]))
    targets = ON.get(fault, ["gfx942"])
    command = [*AOT, "--modules", "bad", "--targets", *targets]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    for _ in range(2 if "error:" in fault else 1):  # a cached kernel must not hide the error
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode != 0
        reports = [line for line in run.stdout.splitlines() if line.startswith(tuple(targets))]
        assert sum(fault in line for line in reports) == len(targets)
