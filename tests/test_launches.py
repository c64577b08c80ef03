"""What operators launch is what `tools/aot_check.py` compiles: constants, warps, types, on every target."""

import importlib
import pkgutil

import pytest
import torch

import hdmil_lib.kernels
from hdmil_lib import kernels
from hdmil_lib.config import interprets_triton
from hdmil_lib.kernels import blocks, dispatch
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.kernels.tile_preprocess.stain import StainTransform
from hdmil_lib.models import LIPN

pytest.importorskip("triton")

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
FOLDERS = [folder.name for folder in pkgutil.iter_modules(hdmil_lib.kernels.__path__) if folder.ispkg]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
N, E, H, C = 5, 16, 16, 2
MATRIX = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
STAIN = StainTransform(MATRIX, MATRIX, (0.0, 0.0, 0.0), MATRIX)


@pytest.fixture
def launches(monkeypatch):
    """What is launched on the CPU, which is recorded and not run."""
    from triton.runtime.jit import JITFunction

    if interprets_triton():
        pytest.skip("the interpreter runs kernels itself")
    seen = set()

    def record(kernel, *arguments, grid, warmup, num_warps=4, **named):
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        constant = {p.name for p in kernel.params if p.is_constexpr}
        constants = {n: v for n, v in given.items() if n in constant or v is None}
        tensors = {n: TYPES[v.dtype] for n, v in given.items() if isinstance(v, torch.Tensor)}
        seen.add(describe(kernel, constants, num_warps, tensors))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(dispatch, "interprets_triton", lambda: True)
    return seen


def describe(kernel, constants, n_warps, types):
    pointers = {name: types[name] for name in kernel.arg_names if types.get(name, "").startswith("*")}
    return (
        f"{kernel.__module__}.{kernel.__name__}",
        n_warps,
        frozenset(constants.items()),
        frozenset(pointers.items()),
    )


def run(operator, *arguments, **options):
    """Call an operator with gradients, if it has any."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.is_floating_point():
            argument.requires_grad_()
    outputs = operator(*arguments, backend="triton", **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if total := [o.float().sum() for o in outputs if o.requires_grad]:
        sum(total).backward()


def attention(dtype):
    shapes = (N, E), (H, E), (H,), (H, E), (H,), (C, H), (C,)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def chebyshev_kan(operator, dtype):
    for outputs in (1, C):
        run(operator, torch.randn(N, E, dtype=dtype), torch.randn(E, outputs, 3, dtype=dtype))


def gated_attention(operator, dtype):
    run(operator, *attention(dtype))
    run(operator, *attention(dtype), dropout=0.5, seed=1)


def gated_attention_pool(operator, dtype):
    for mask in (None, torch.ones(N, C, dtype=dtype)):
        run(operator, *attention(dtype), mask)
        run(operator, *attention(dtype), mask, Segments([2, 3]), dropout=0.5, seed=1)


def gumbel_mask(operator, dtype):
    for seed in (None, 1):
        run(operator, torch.randn(N, C, dtype=dtype), seed=seed)


def lipn_forward(operator, dtype):
    if dtype != torch.float32:  # the interpreter's alone
        run(operator, torch.zeros(N, 16, 16, 3, dtype=torch.uint8), LIPN(C).eval().packed(dtype))


def s4d_convolution(operator, dtype):
    shapes = (1, N, C), (C,), (C, 4), (C, 4), (C, 4, 2), (C,)
    run(operator, *(torch.randn(shape, dtype=dtype) for shape in shapes))


def segment_softmax_pool(operator, dtype):
    for mask in (None, torch.ones(N, C, dtype=dtype)):
        run(operator, torch.randn(N, E, dtype=dtype), torch.randn(N, C, dtype=dtype), mask)


def selective_scan(operator, dtype):
    shapes = (1, N, C), (1, N, C), (C, 4), (1, N, 4), (1, N, 4), (C,)
    run(operator, *(torch.randn(shape, dtype=dtype) for shape in shapes))


def self_distillation_pool(operator, dtype):
    for dropout in ({}, {"dropout": 0.5, "seed": 1}):
        for noise in (None, 1):
            run(operator, *attention(dtype), noise_seed=noise, **dropout)


def tile_preprocess(operator, dtype):
    tiles, channels = torch.zeros(N, 4, 4, 3, dtype=torch.uint8), (0.5, 0.5, 0.5)
    for stain in (None, STAIN):
        for last in (False, True):
            run(operator, tiles, channels, channels, stain=stain, dtype=dtype, channels_last=last)


def tile_projection(operator, dtype):
    weight, bias, mean = torch.randn(H, E, dtype=dtype), torch.randn(H, dtype=dtype), torch.randn(E)
    for stored in (torch.float16, torch.float32):
        features = torch.randn(N, E).to(stored)
        for where in ({}, {"rows": torch.arange(N)}):
            run(operator, features, weight, None, mean, mean.exp(), **where)
            run(operator, features, weight, bias, mean, mean.exp(), **where)
            run(operator, features, weight, bias, mean, mean.exp(), dropout=0.5, seed=1, **where)
        again = {"rows": torch.arange(N), "positions": torch.arange(N)}
        run(operator, features, weight, bias, mean, mean.exp(), dropout=0.5, seed=1, **again)


def tissue_statistics(operator, dtype):
    for bins in (16, 32, 64, 128):
        operator(torch.zeros(N, 4, 4, 3, dtype=torch.uint8), bins=bins, backend="triton")


@pytest.mark.parametrize("target", blocks.TARGETS)
def test_what_is_launched_is_compiled(target, launches, monkeypatch):
    monkeypatch.setattr(blocks, "INTERPRETED", target)
    compiled = set()
    for folder in FOLDERS:
        for dtype in DTYPES:
            globals()[folder](getattr(kernels, folder), dtype)
        gpu = importlib.import_module(f"hdmil_lib.kernels.{folder}.gpu")
        compiled |= {describe(v.kernel, v.constants, v.num_warps, v.types) for v in gpu.variants(target)}
    assert launches - compiled == set()
    assert compiled - launches == set()
