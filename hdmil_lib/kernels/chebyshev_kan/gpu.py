"""The Chebyshev layer on a GPU: the basis is held in registers, one degree at a time.

A program processes a block of rows and a share of the inputs. For every degree it multiplies the current
polynomial by its coefficients and accumulates element by element; the sum over inputs is taken once, at the
end. Programs write partial sums, which a final `sum` adds: without atomic additions the result is the same
in every run. Numbers are read in the type of the tensors and computed in float32.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdmil_lib.kernels.blocks import target_of
from hdmil_lib.kernels.elementary import tanh
from hdmil_lib.kernels.variants import Variant

ROWS, INPUTS = 32, 64  # rows and inputs per block
OUTPUTS = 2  # outputs per program
VARYING = ("n_rows",)  # differs from call to call and must not cause a recompilation
PROGRAMS = 128  # number of programs that keeps a large GPU busy; small batches split the inputs to reach it


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    inputs, coefficients, partials, n_rows, n_inputs, n_outputs, degree, share,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Write partials[s, b, o] = sum_q sum_k T_k(tanh x[b, q]) Omega[q, o, k] for the inputs q of share s."""
    split, o = tl.program_id(1), tl.program_id(2) * OUTPUTS
    b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n_second = tl.where(o + 1 < n_outputs, n_inputs, 0)  # 0 if there is no second output
    total = tl.zeros((ROWS, INPUTS), tl.float32)
    total_next = tl.zeros((ROWS, INPUTS), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, n_inputs), INPUTS):
        q = start + tl.arange(0, INPUTS)
        inside = (b[:, None] < n_rows) & (q[None, :] < n_inputs)
        x = tanh(tl.load(inputs + b[:, None] * n_inputs + q[None, :], inside, 0.0).to(tl.float32))
        current, following = tl.full((ROWS, INPUTS), 1.0, tl.float32), x  # T_k, T_{k+1}
        row = coefficients + (q * n_outputs + o) * (degree + 1)
        for k in range(degree + 1):
            weight = tl.load(row + k, q < n_inputs, 0.0).to(tl.float32)
            total += current * weight[None, :]
            if OUTPUTS == 2:
                weight = tl.load(row + degree + 1 + k, q < n_second, 0.0)
                total_next += current * weight.to(tl.float32)[None, :]
            current, following = following, 2 * x * following - current
    out = partials + (split * n_rows + b) * n_outputs + o
    tl.store(out, tl.sum(total, 1), b < n_rows)
    if OUTPUTS == 2:
        tl.store(out + 1, tl.sum(total_next, 1), b < tl.where(o + 1 < n_outputs, n_rows, 0))


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    grad_outputs, inputs, coefficients, grad_inputs, partials, n_rows, n_inputs, n_outputs, degree,
    ROWS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a block of rows and inputs, those of the coefficients as partial sums over rows.

    With t = tanh x, T_k' = k U_{k-1} and the gradient g of the outputs,
    dx = (1 - t^2) sum_o g[o] sum_k k U_{k-1}(t) Omega[o, k] and dOmega[q, o, k] = sum_b g[b, o] T_k(t[b, q]).
    """
    block = tl.program_id(0)
    b = block * ROWS + tl.arange(0, ROWS)
    q = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    place = b[:, None] * n_inputs + q[None, :]
    inside = (b[:, None] < n_rows) & (q[None, :] < n_inputs)
    x = tanh(tl.load(inputs + place, inside, 0.0).to(tl.float32))
    slope = tl.zeros((ROWS, INPUTS), tl.float32)
    for o in range(n_outputs):
        grad = tl.load(grad_outputs + b * n_outputs + o, b < n_rows, 0.0).to(tl.float32)[:, None]
        row = (q * n_outputs + o) * (degree + 1)
        sums = partials + block * n_inputs * n_outputs * (degree + 1) + row
        current, following = tl.full((ROWS, INPUTS), 1.0, tl.float32), x  # T_k, T_{k+1}
        before = tl.zeros((ROWS, INPUTS), tl.float32)  # U_{k-2}
        second = tl.zeros((ROWS, INPUTS), tl.float32)  # U_{k-1}
        for k in range(degree + 1):
            weight = tl.load(coefficients + row + k, q < n_inputs, 0.0).to(tl.float32)
            slope += k * second * grad * weight[None, :]
            tl.store(sums + k, tl.sum(grad * current, 0), q < n_inputs)
            current, following = following, 2 * x * following - current
            before, second = second, tl.where(k == 0, 1.0, 2 * x * second - before)
    tl.store(grad_inputs + place, slope * (1 - x * x), inside)


def forward(inputs: Tensor, coefficients: Tensor) -> Tensor:
    """Launch `forward_kernel` and return the sum of its partial sums, (B, O), in the type of the inputs."""
    (n_rows, n_inputs), (_, n_outputs, n_terms) = inputs.shape, coefficients.shape
    blocks, outputs = triton.cdiv(n_rows, ROWS), min(n_outputs, OUTPUTS)
    n_shares = min(triton.cdiv(n_inputs, INPUTS), max(1, PROGRAMS // max(blocks, 1)))
    share = INPUTS * triton.cdiv(triton.cdiv(n_inputs, n_shares), INPUTS)
    n_shares = triton.cdiv(n_inputs, share)
    partials = torch.empty(n_shares, n_rows, n_outputs, dtype=torch.float32, device=inputs.device)
    if n_rows:
        forward_kernel[(blocks, n_shares, triton.cdiv(n_outputs, outputs))](
            inputs.contiguous(), coefficients.contiguous(), partials,
            n_rows, n_inputs, n_outputs, n_terms - 1, share, ROWS, INPUTS, outputs,
        )  # fmt: skip
    return partials.sum(0).to(inputs.dtype)


def backward(grad_outputs: Tensor, inputs: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `backward_kernel` and return the gradients of inputs and coefficients, each in its type."""
    (n_rows, n_inputs), (_, n_outputs, n_terms) = inputs.shape, coefficients.shape
    blocks, (columns, warps) = triton.cdiv(n_rows, ROWS), backward_blocks(target_of(inputs.device))
    grad_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    partials = torch.empty(blocks, *coefficients.shape, dtype=torch.float32, device=inputs.device)
    if n_rows:
        backward_kernel[(blocks, triton.cdiv(n_inputs, columns))](
            grad_outputs.contiguous(), inputs.contiguous(), coefficients.contiguous(), grad_inputs, partials,
            n_rows, n_inputs, n_outputs, n_terms - 1, ROWS, columns,
            num_warps=warps,
        )  # fmt: skip
    return grad_inputs, partials.sum(0).to(coefficients.dtype)


def backward_blocks(target: str) -> tuple[int, int]:
    """Return inputs per block and warps of the backward pass: on sm_90, two warps sum faster than four."""
    return (INPUTS // 2, 2) if target == "sm_90" else (INPUTS, 4)


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` and `backward` can launch, in three types of numbers."""
    for number in ("*fp32", "*fp16", "*bf16"):
        sizes = {"n_rows": "i32", "n_inputs": "i32:16", "n_outputs": "i32", "degree": "i32"}
        types = {"inputs": number, "coefficients": number, "partials": "*fp32"} | sizes
        blocks = {"ROWS": ROWS, "INPUTS": INPUTS}
        for outputs in range(1, OUTPUTS + 1):
            yield Variant(forward_kernel, types | {"share": "i32:16"}, blocks | {"OUTPUTS": outputs})
        types |= {"grad_outputs": number, "grad_inputs": number}
        columns, warps = backward_blocks(target)
        yield Variant(backward_kernel, types, {"ROWS": ROWS, "INPUTS": columns}, warps)
