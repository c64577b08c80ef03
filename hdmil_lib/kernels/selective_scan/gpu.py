"""The selective scan on a GPU: states are held in registers, and a long bag is cut into parallel chunks.

A program of one warp processes a chunk of steps for 32 channels with all their states. Pass 1 (`end_kernel`)
runs each chunk from a zero state, pass 2 (`carry_kernel`) carries the states from chunk to chunk, and pass 3
(`scan_kernel`) runs each chunk again from its true start. In the backward pass, passes 1 and 2 carry the
gradient of the state in the other direction; `backward_kernel` then runs over its chunk forward, to store
the state of every fourth step, and back, recomputing the states of four steps at a time. Rows are loaded
four at a time, so that the recurrence waits for memory once per four steps. Partial sums are added by a final
`sum` instead of atomically.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from hdmil_lib.kernels.selective_scan.limits import MAX_STATES
from hdmil_lib.kernels.variants import Variant

CHANNELS = 32  # channels per program; with 64 channels, or 8 steps, the backward pass spills registers
STATES = tl.constexpr(MAX_STATES)
STEPS = tl.constexpr(4)  # steps that are loaded and recomputed at once
MIN_CHUNK = 16  # steps of the shortest chunk
PROGRAMS = 4096  # number of programs that keeps a large GPU busy; chunks get no shorter to exceed it
SIZES = ("length", "chunk", "n_chunks")  # differ from bag to bag and must not cause a recompilation


@triton.jit
def load_row(rows, i, length, width, columns):
    """Load row i of a matrix in float32, or zeros beyond its length."""
    row = tl.load(rows + tl.minimum(i, length - 1) * width + columns).to(tl.float32)
    return tl.where(i < length, row, 0.0)


@triton.jit
def load_rows(rows, first, length, width, columns):
    """Load a tuple of `STEPS` rows, all requested from memory before the first is needed."""
    loaded = ()
    for k in tl.static_range(STEPS):
        loaded = loaded + (load_row(rows, first + k, length, width, columns),)
    return loaded


@triton.jit
def store_row(rows, i, length, width, columns, values):
    """Store row i of a matrix, or nothing beyond its length."""
    tl.store(rows + i * width + columns, values, columns < tl.where(i < length, width, 0))


@triton.jit(do_not_specialize=SIZES)
def end_kernel(
    signal, steps, decay, matrix, ends, durations, length, channels, chunk, n_chunks,
    REVERSE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the state at the end of a chunk that starts from zero, and the sum of its steps.

    In the forward direction, the signal is u and the matrix is B. In reverse, the signal is the gradient of y
    and the matrix is C, and the result is the gradient of the state before the chunk.
    """
    d, s = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    square = s[:, None] * channels + d[None, :]
    rates = tl.load(decay + square)
    signal, steps = signal + b * length * channels, steps + b * length * channels
    matrix += b * length * STATES
    state = tl.zeros((STATES, CHANNELS), tl.float32)
    duration = tl.zeros((CHANNELS,), tl.float32)
    for i in range(0, chunk, STEPS):
        first = c * chunk + (chunk - STEPS - i if REVERSE else i)
        x = load_rows(signal, first, length, channels, d)
        delta = load_rows(steps, first, length, channels, d)
        weights = load_rows(matrix, first, length, STATES, s)
        for j in tl.static_range(STEPS):
            if REVERSE:
                state += weights[STEPS - 1 - j][:, None] * x[STEPS - 1 - j][None, :]
                state *= tl.exp(delta[STEPS - 1 - j][None, :] * rates)
            else:
                state *= tl.exp(delta[j][None, :] * rates)
                state += weights[j][:, None] * (delta[j] * x[j])[None, :]
            duration += delta[j]
    place = b * n_chunks + c
    tl.store(ends + place * STATES * channels + square, state)
    tl.store(durations + place * channels + d, duration)


@triton.jit(do_not_specialize=SIZES)
def carry_kernel(states, durations, decay, channels, n_chunks, REVERSE: tl.constexpr, CHANNELS: tl.constexpr):
    """Replace the end state of each chunk by its start state, the decayed sum of the end states before it."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    s, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rates = tl.load(decay + s * channels + d)
    states += b * n_chunks * STATES * channels + s * channels
    durations += b * n_chunks * channels
    state = tl.zeros((CHANNELS,), tl.float32)
    for i in range(0, n_chunks, STEPS):
        ends, times = (), ()
        for k in tl.static_range(STEPS):
            c = n_chunks - 1 - i - k if REVERSE else i + k
            inside = d < tl.where(i + k < n_chunks, channels, 0)
            ends = ends + (tl.load(states + c * STATES * channels + d, inside, 0.0),)
            times = times + (tl.load(durations + c * channels + d, inside, 0.0),)
        for k in tl.static_range(STEPS):
            c = n_chunks - 1 - i - k if REVERSE else i + k
            inside = d < tl.where(i + k < n_chunks, channels, 0)
            tl.store(states + c * STATES * channels + d, state, inside)
            state = tl.exp(times[k] * rates) * state + ends[k]


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    inputs, steps, decay, input_matrix, output_matrix, skip, starts, outputs,
    length, channels, chunk, n_chunks, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write y for a chunk, from its true start state."""
    d, s = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    square = s[:, None] * channels + d[None, :]
    rates, past = tl.load(decay + square), tl.load(skip + d).to(tl.float32)
    inputs, steps = inputs + b * length * channels, steps + b * length * channels
    outputs += b * length * channels
    input_matrix, output_matrix = input_matrix + b * length * STATES, output_matrix + b * length * STATES
    state = tl.load(starts + (b * n_chunks + c) * STATES * channels + square)
    for first in range(c * chunk, tl.minimum((c + 1) * chunk, length), STEPS):
        u = load_rows(inputs, first, length, channels, d)
        delta = load_rows(steps, first, length, channels, d)
        into = load_rows(input_matrix, first, length, STATES, s)
        out = load_rows(output_matrix, first, length, STATES, s)
        for k in tl.static_range(STEPS):
            state *= tl.exp(delta[k][None, :] * rates)
            state += into[k][:, None] * (delta[k] * u[k])[None, :]
            y = tl.sum(out[k][:, None] * state, 0) + past * u[k]
            store_row(outputs, first + k, length, channels, d, y)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad_outputs, inputs, steps, decay, input_matrix, output_matrix, skip, starts, flows, scratch,
    grad_inputs, grad_steps, grad_decay, grad_matrices, grad_skip,
    length, channels, chunk, n_chunks, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a chunk.

    With the gradient of the state, g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}, and
    k_t = exp(delta_t A) g_t h_{t-1}: dC_t = sum_d dy_t h_t, dB_t = sum_d delta_t u_t g_t,
    du_t = delta_t <B_t, g_t> + D dy_t, ddelta_t = u_t <B_t, g_t> + <A, k_t> and dA = sum_t delta_t k_t. The
    gradients of A and D are partial sums over chunks and bags, those of B and C over blocks of channels.
    """
    d, s = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    square = s[:, None] * channels + d[None, :]
    rates, past = tl.load(decay + square), tl.load(skip + d).to(tl.float32)
    place = b * n_chunks + c
    rows, narrow = b * length * channels, b * length * STATES
    inputs, steps, grad_outputs = inputs + rows, steps + rows, grad_outputs + rows
    grad_inputs, grad_steps = grad_inputs + rows, grad_steps + rows
    input_matrix, output_matrix = input_matrix + narrow, output_matrix + narrow
    grad_matrices += (tl.program_id(0) * tl.num_programs(2) + b) * length * STATES * 2
    scratch += place * (chunk // STEPS) * STATES * channels
    state = tl.load(starts + place * STATES * channels + square)
    for i in range(chunk // STEPS):
        first = c * chunk + i * STEPS
        tl.store(scratch + i * STATES * channels + square, state)
        u = load_rows(inputs, first, length, channels, d)
        delta = load_rows(steps, first, length, channels, d)
        into = load_rows(input_matrix, first, length, STATES, s)
        for k in tl.static_range(STEPS):
            state *= tl.exp(delta[k][None, :] * rates)
            state += into[k][:, None] * (delta[k] * u[k])[None, :]
    flow = tl.load(flows + place * STATES * channels + square)
    slope = tl.zeros((STATES, CHANNELS), tl.float32)
    through = tl.zeros((CHANNELS,), tl.float32)
    for i in range(chunk // STEPS - 1, -1, -1):
        first = c * chunk + i * STEPS
        states = (tl.load(scratch + i * STATES * channels + square),)
        for k in tl.static_range(STEPS - 1):
            u = load_row(inputs, first + k, length, channels, d)
            delta = load_row(steps, first + k, length, channels, d)
            into = load_row(input_matrix, first + k, length, STATES, s)
            kept = tl.exp(delta[None, :] * rates) * states[k]
            states = states + (kept + into[:, None] * (delta * u)[None, :],)
        for k in tl.static_range(STEPS - 1, -1, -1):
            u = load_row(inputs, first + k, length, channels, d)
            delta = load_row(steps, first + k, length, channels, d)
            grad = load_row(grad_outputs, first + k, length, channels, d)
            into = load_row(input_matrix, first + k, length, STATES, s)
            out = load_row(output_matrix, first + k, length, STATES, s)
            rate = tl.exp(delta[None, :] * rates)
            kept = rate * states[k]
            state = kept + into[:, None] * (delta * u)[None, :]
            both = grad_matrices + (first + k) * STATES * 2 + s
            inside = s < tl.where(first + k < length, STATES, 0)
            tl.store(both + STATES, tl.sum(grad[None, :] * state, 1), inside)
            flow += out[:, None] * grad[None, :]
            tl.store(both, tl.sum((delta * u)[None, :] * flow, 1), inside)
            driven = tl.sum(into[:, None] * flow, 0)
            store_row(grad_inputs, first + k, length, channels, d, delta * driven + past * grad)
            kept *= flow
            store_row(grad_steps, first + k, length, channels, d, u * driven + tl.sum(rates * kept, 0))
            slope += delta[None, :] * kept
            through += grad * u
            flow *= rate
    tl.store(grad_decay + place * STATES * channels + square, slope)
    tl.store(grad_skip + place * channels + d, through)


def cut(inputs: Tensor) -> tuple[int, int, int]:
    """Return the steps per chunk, the number of chunks and the blocks of channels for inputs (B, L, D)."""
    batch, length, channels = inputs.shape
    blocks = triton.cdiv(channels, CHANNELS)
    wanted = max(1, PROGRAMS // max(1, batch * blocks))
    chunk = max(MIN_CHUNK, STEPS.value * triton.cdiv(length, STEPS.value * wanted))
    return chunk, triton.cdiv(length, chunk), blocks


def new_states(inputs: Tensor) -> Tensor:
    """Allocate one state per chunk, float32 (B, chunks, S, D), with S and D padded for the kernels."""
    _, n_chunks, blocks = cut(inputs)
    return inputs.new_empty(len(inputs), n_chunks, MAX_STATES, blocks * CHANNELS, dtype=torch.float32)


def pad(tensor: Tensor, multiple: int) -> Tensor:
    """Pad the last axis with zeros to a multiple; padded channels and states do not influence the others."""
    missing = -tensor.shape[-1] % multiple
    return F.pad(tensor, (0, missing)) if missing else tensor.contiguous()


def padded(
    inputs: Tensor, steps: Tensor, decay: Tensor, input_matrix: Tensor, output_matrix: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments as the kernels read them, padded, with A transposed and in float32."""
    inputs, steps, skip = (pad(t, CHANNELS) for t in (inputs, steps, skip))
    rates = pad(pad(decay.float(), MAX_STATES).T, CHANNELS)
    return inputs, steps, rates, pad(input_matrix, MAX_STATES), pad(output_matrix, MAX_STATES), skip


def start_states(signal: Tensor, steps: Tensor, rates: Tensor, matrix: Tensor, reverse: bool) -> Tensor:
    """Run passes 1 and 2: the start state of each chunk or, in reverse, the gradient of its end state.

    Returns:
        States as `new_states` allocates them.
    """
    batch, length, channels = signal.shape
    chunk, n_chunks, blocks = cut(signal)
    states = new_states(signal)
    durations = states.new_empty(batch, n_chunks, channels)
    end_kernel[(blocks, n_chunks, batch)](
        signal, steps, rates, matrix, states, durations, length, channels, chunk, n_chunks, reverse, CHANNELS,
        num_warps=1,
    )  # fmt: skip
    carry_kernel[(blocks, MAX_STATES, batch)](
        states, durations, rates, channels, n_chunks, reverse, CHANNELS, num_warps=1
    )
    return states


def forward(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Run all three passes and return y (B, L, D) and the start states of the chunks, as in `new_states`."""
    batch, length, n_channels = arguments[0].shape
    if not arguments[0].numel():
        return torch.empty_like(arguments[0]), new_states(arguments[0])
    inputs, steps, rates, into, out, skip = padded(*arguments)
    chunk, n_chunks, blocks = cut(inputs)
    starts = start_states(inputs, steps, rates, into, False)
    outputs = torch.empty_like(inputs)
    scan_kernel[(blocks, n_chunks, batch)](
        inputs, steps, rates, into, out, skip, starts, outputs,
        length, inputs.shape[2], chunk, n_chunks, CHANNELS, num_warps=1,
    )  # fmt: skip
    return outputs[..., :n_channels].contiguous(), starts


def backward(
    grad_outputs: Tensor, starts: Tensor, *arguments: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the six arguments, each in the type of its argument."""
    if not arguments[0].numel():
        return tuple(torch.zeros_like(a, memory_format=torch.contiguous_format) for a in arguments)
    grad_outputs = pad(grad_outputs, CHANNELS)
    inputs, steps, rates, into, out, skip = padded(*arguments)
    (batch, length, channels), (chunk, n_chunks, blocks) = inputs.shape, cut(inputs)
    flows = start_states(grad_outputs, steps, rates, out, True)
    grad_inputs, grad_steps = torch.empty_like(inputs), torch.empty_like(steps)
    scratch = starts.new_empty(batch, n_chunks, chunk // STEPS.value, MAX_STATES, channels)
    slopes, through = torch.empty_like(starts), starts.new_empty(batch, n_chunks, channels)
    matrices = starts.new_empty(blocks, batch, length, 2, MAX_STATES)
    backward_kernel[(blocks, n_chunks, batch)](
        grad_outputs, inputs, steps, rates, into, out, skip, starts, flows, scratch,
        grad_inputs, grad_steps, slopes, matrices, through,
        length, channels, chunk, n_chunks, CHANNELS, num_warps=1,
    )  # fmt: skip
    n_channels, n_states = arguments[2].shape
    grads = (
        grad_inputs[..., :n_channels],
        grad_steps[..., :n_channels],
        slopes.sum((0, 1)).T[:n_channels, :n_states],
        matrices[..., 0, :n_states].sum(0),
        matrices[..., 1, :n_states].sum(0),
        through.sum((0, 1))[:n_channels],
    )
    return tuple(g.to(a.dtype).contiguous() for g, a in zip(grads, arguments, strict=True))


def variants(target: str) -> Iterator[Variant]:
    """Return all that `forward` and `backward` can launch, in three types of numbers."""
    sizes = dict.fromkeys(SIZES, "i32") | {"channels": "i32:16"}
    for number in ("*fp32", "*bf16", "*fp16"):
        numbers = dict.fromkeys(("inputs", "steps", "input_matrix", "output_matrix", "skip"), number)
        numbers |= {"decay": "*fp32", "starts": "*fp32"} | sizes
        alone = dict.fromkeys(("signal", "steps", "matrix"), number)
        alone |= dict.fromkeys(("decay", "ends", "durations"), "*fp32") | sizes
        for reverse in (False, True):
            constants = {"REVERSE": reverse, "CHANNELS": CHANNELS}
            yield Variant(end_kernel, alone, constants, num_warps=1)
        constants = {"CHANNELS": CHANNELS}
        yield Variant(scan_kernel, numbers | {"outputs": number}, constants, num_warps=1)
        grads = dict.fromkeys(("grad_outputs", "grad_inputs", "grad_steps"), number)
        partials = ("flows", "scratch", "grad_decay", "grad_matrices", "grad_skip")
        yield Variant(
            backward_kernel, numbers | grads | dict.fromkeys(partials, "*fp32"), constants, num_warps=1
        )
    types = dict.fromkeys(("states", "durations", "decay"), "*fp32")
    for reverse in (False, True):
        constants = {"REVERSE": reverse, "CHANNELS": CHANNELS}
        yield Variant(carry_kernel, types | {"channels": "i32:16", "n_chunks": "i32"}, constants, num_warps=1)
