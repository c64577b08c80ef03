"""What a call of one of our operators moves and computes in our kernels, calculated rather than measured.

A `Work` is what one call of an operator of PyTorch, `hdmil::...`, does: the bytes that its kernels move,
intermediate results and PyTorch's operators within the call included, and their operations. `WORK` has a
formula for every operator, which takes what the operator takes. What a kernel reads again while it is in a
cache counts once, weights that all programs share too; exponentials and the like count as one operation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hdmil_lib.kernels import cost
from hdmil_lib.kernels.cost import LIPN_MULTIPLY_ADDS, Device


@dataclass(frozen=True)
class Work:
    """What one call does on a GPU.

    Attributes:
        bytes: Bytes that are read from and written to the memory of the GPU.
        matrix_flops: Operations in matrix products of 16-bit numbers, which run on matrix units.
        vector_flops: All other operations, products of float32 numbers included.
    """

    bytes: float = 0
    matrix_flops: float = 0
    vector_flops: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.bytes + other.bytes,
            self.matrix_flops + other.matrix_flops,
            self.vector_flops + other.vector_flops,
        )

    @property
    def flops(self) -> float:
        """All operations."""
        return self.matrix_flops + self.vector_flops

    def memory_seconds(self, device: Device) -> float:
        """Time to move the bytes."""
        return self.bytes / device.bytes

    def arithmetic_seconds(self, device: Device) -> float:
        """Time of the operations, one kind of units after the other."""
        return self.matrix_flops / device.matrix_flops + self.vector_flops / device.vector_flops


WORK: dict[str, Callable[..., Work]] = {}
"""By the name of an operator: its work, given its arguments, of which only shapes and types are used."""


def work(operator: str, *arguments: Any) -> Work:
    """Count the work of a call of one of our operators.

    Args:
        operator: Name of the operator, such as "hdmil::gumbel_mask".
        *arguments: Its arguments.

    Raises:
        ValueError: There is no formula for this operator.
    """
    if operator not in WORK:
        raise ValueError(
            f"{operator} has no formula in hdmil_lib/kernels/work.py: add one with the bytes and operations "
            "of its kernels"
        )
    return WORK[operator](*arguments)


def _work_of(operator: str) -> Callable[[Callable[..., Work]], Callable[..., Work]]:
    """Enter a formula into `WORK`."""

    def enter(formula: Callable[..., Work]) -> Callable[..., Work]:
        WORK[operator] = formula
        return formula

    return enter


def _size(*tensors: Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _copies(*tensors: Tensor | None) -> int:
    """Bytes that `contiguous` moves: those tensors that need it are read and written."""
    return sum(2 * _size(t) for t in tensors if t is not None and not t.is_contiguous())


def _products(flops: float, like: Tensor, moved: float, others: float = 0) -> Work:
    """Work with matrix products of numbers of this tensor's type, and other operations."""
    narrow = like.element_size() == 2
    return Work(moved, flops if narrow else 0, others if narrow else flops + others)


@_work_of("hdmil::chebyshev_kan")
def _chebyshev_kan(inputs: Tensor, coefficients: Tensor) -> Work:
    """Partial sums of the shares of the inputs are written and read."""
    from hdmil_lib.kernels.chebyshev_kan import gpu

    (rows, n_inputs), (_, n_outputs, n_terms) = inputs.shape, coefficients.shape
    blocks, wanted = -(-rows // gpu.ROWS), -(-n_inputs // gpu.INPUTS)
    shares = min(wanted, max(1, gpu.PROGRAMS // max(blocks, 1)))
    shares = -(-wanted // -(-wanted // max(shares, 1)))
    result = rows * n_outputs * inputs.element_size()
    moved = _size(inputs, coefficients) + 2 * 4 * shares * rows * n_outputs + result
    flops = cost.chebyshev_kan(rows, n_inputs, n_outputs, n_terms - 1).flops
    return Work(moved + _copies(inputs, coefficients), 0, flops)


@_work_of("hdmil::chebyshev_kan_backward")
def _chebyshev_kan_backward(grad: Tensor, inputs: Tensor, coefficients: Tensor) -> Work:
    """Gradients of the coefficients are partial sums over blocks of rows, written and read.

    Each term of a polynomial takes 10 operations: T and U by their recurrences, the slope, and the sum.
    """
    from hdmil_lib.kernels.chebyshev_kan import gpu

    partials = 4 * coefficients.numel() * -(-len(inputs) // gpu.ROWS)
    moved = _size(grad) + 2 * _size(inputs, coefficients) + 2 * partials
    flops = 10 * len(inputs) * coefficients.numel()
    return Work(moved + _copies(grad, inputs, coefficients), 0, flops)


@_work_of("hdmil::tile_projection")
def _tile_projection(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    rows: Tensor | None,
    dropout: float,
    key: Tensor | None,
    positions: Tensor | None,
) -> Work:
    """Features are read as they are stored, embeddings and one bit of each written.

    Each block of a weight standardizes the features.

    Programs of the same tiles follow each other, so that all but the first find the features in the cache.
    """
    from hdmil_lib.kernels.tile_projection import gpu

    tiles, (embed_dim, in_dim) = gpu.count(features, rows), weight.shape
    others_read = (rows, weight, bias, mean, std, positions)
    moved = tiles * in_dim * features.element_size() + _size(*others_read)
    moved += tiles * (embed_dim * weight.element_size() + 4 * gpu.n_words(embed_dim))
    moved += _copies(features, *others_read)
    _, embed, _, _ = gpu.blocks(weight.dtype, features.dtype, "sm_90")
    scaling = 2 * tiles * in_dim * -(-embed_dim // embed) if mean is not None else 0
    others = scaling + (3 + 12 * (dropout > 0)) * tiles * embed_dim
    return _products(2 * tiles * in_dim * embed_dim, weight, moved, others)


@_work_of("hdmil::tile_projection_backward")
def _tile_projection_backward(
    grad: Tensor,
    active: Tensor,
    features: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    rows: Tensor | None,
    dropout: float,
) -> Work:
    """Features, and gradients and bits of the embeddings, are read.

    Sums over shares of the tiles are written and read.
    The programs of a share, one per block of the weight, go through its tiles side by side, so that all but
    the first find them in the cache.
    """
    from hdmil_lib.kernels.tile_projection import gpu

    tiles, (embed_dim, in_dim) = len(grad), weight.shape
    block, embed, columns, _ = gpu.backward_blocks(weight.dtype, "sm_90")
    down, across = -(-embed_dim // embed), -(-in_dim // columns)
    shares = max(1, min(gpu.PROGRAMS // (down * across), -(-tiles // block)))
    sums = 4 * shares * embed_dim * (in_dim + 1)
    result = weight.element_size() * embed_dim * (in_dim + 1)
    moved = tiles * in_dim * features.element_size() + _size(grad, active, rows, mean, std)
    moved += 2 * sums + result + _copies(grad, features)
    scaling = 2 * tiles * in_dim * down if mean is not None else 0
    others = scaling + 3 * tiles * embed_dim * across
    return _products(2 * tiles * in_dim * embed_dim, weight, moved, others)


@_work_of("hdmil::gated_attention")
def _gated_attention(embeddings: Tensor, *weights_dropout_key: Any) -> Work:
    """Embeddings and weights are read, logits written; hidden units stay in registers."""
    weights = weights_dropout_key[:6]
    (tiles, embed_dim), (branches, hidden) = embeddings.shape, weights[4].shape
    logits = tiles * branches * embeddings.element_size()
    moved = _size(embeddings, *weights) + logits + _copies(embeddings, *weights)
    return _products(cost.gated_attention(tiles, embed_dim, hidden, branches).flops, embeddings, moved)


@_work_of("hdmil::gated_attention_backward")
def _gated_attention_backward(grad_logits: Tensor, embeddings: Tensor, *weights_dropout_key: Any) -> Work:
    """Six matrix products, and a kernel between the first two and the last four.

    With tiles N, widths E and H and branches C: two products recompute the pre-activations (N, H) from the
    embeddings. The kernel reads both and the gradient of the logits, writes their gradients in place, and
    writes sums over blocks of tiles, which are read and added. Two products, the second of which adds to the
    first, make the gradient of the embeddings; two make those of the weights.
    """
    from hdmil_lib.kernels.gated_attention import gpu

    tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight = weights_dropout_key[:5]
    tiles, (branches, hidden) = len(embeddings), score_weight.shape
    f, h = _size(embeddings), tiles * hidden * embeddings.element_size()
    weights, biases = _size(tanh_weight, gate_weight), _size(tanh_bias, gate_bias)
    recompute = 2 * f + weights + biases + 2 * h
    sums = 4 * (branches + 2) * hidden * -(-tiles // gpu.BACKWARD_TILES)
    kernel = _size(grad_logits, score_weight) + 4 * h + 2 * sums + biases + _size(score_weight)
    to_embeddings = (h + f) + (h + 2 * f) + weights
    to_weights = 2 * (h + f) + weights
    to_score_bias = _size(grad_logits) + 2 * 4 * grad_logits.numel()  # copied to float32, and read
    moved = recompute + kernel + to_embeddings + to_weights + to_score_bias
    flops = 3 * 4 * embeddings.numel() * hidden
    others = tiles * hidden * (4 * branches + 20)
    return _products(flops, embeddings, moved + _copies(grad_logits, score_weight), others)


@_work_of("hdmil::gated_attention_pool")
def _gated_attention_pool(embeddings: Tensor, *weights_mask_chunks_dropout_key: Any) -> Work:
    """As both operators, but the embeddings are read once; gradients are computed by those of the two."""
    *weights, mask, table, first_chunk, _dropout, _key = weights_mask_chunks_dropout_key
    (tiles, embed_dim), (branches, hidden) = embeddings.shape, weights[4].shape
    logits = tiles * branches * embeddings.element_size()
    moved = _size(embeddings, mask, *weights) + logits + _copies(embeddings, mask, *weights)
    moved += _chunk_sums(embeddings, branches, table, first_chunk)
    return _products(cost.gated_attention_pool(tiles, embed_dim, hidden, branches).flops, embeddings, moved)


@_work_of("hdmil::segment_softmax_pool")
def _segment_softmax_pool(
    embeddings: Tensor, logits: Tensor, mask: Tensor | None, table: Tensor, first_chunk: Tensor
) -> Work:
    """Embeddings, logits and mask are read once, sums over chunks written and read."""
    (tiles, embed_dim), branches = embeddings.shape, logits.shape[1]
    moved = _size(embeddings, logits, mask) + _copies(embeddings, logits, mask)
    moved += _chunk_sums(embeddings, branches, table, first_chunk)
    return _products(2 * tiles * embed_dim * branches, embeddings, moved)


def _chunk_sums(embeddings: Tensor, branches: int, table: Tensor, first_chunk: Tensor) -> int:
    """Bytes of the pooling of chunks into bags.

    Sums (chunks, C, E) and four statistics (chunks, C) of 4 bytes are written and read, the pooled embeddings
    (B, C, E) and three statistics (B, C) written.
    """
    embed_dim, bags, chunks = embeddings.shape[1], len(first_chunk) - 1, len(table)
    bag = embed_dim * embeddings.element_size() + 3 * 4
    return branches * (2 * chunks * 4 * (embed_dim + 4) + bags * bag)


@_work_of("hdmil::segment_softmax_pool_backward")
def _segment_softmax_pool_backward(
    grad_pooled: Tensor,
    pooled: Tensor,
    embeddings: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    table: Tensor,
    *statistics: Tensor,
) -> Work:
    """Embeddings, logits and mask are read and their gradients written.

    Before that, PyTorch multiplies the pooled embeddings (B, C, E) with their gradient in float32 and sums.
    """
    copied = sum(_size(t) + 4 * t.numel() for t in (grad_pooled, pooled) if t.element_size() != 4)
    inner = copied + 4 * 4 * pooled.numel()  # two factors are read, the product written and read
    moved = 2 * _size(embeddings, logits, mask) + _size(grad_pooled, *statistics) + inner
    flops = 2 * 2 * embeddings.numel() * logits.shape[1]
    return _products(flops, embeddings, moved + _copies(grad_pooled, embeddings, logits, mask))


@_work_of("hdmil::gumbel_mask")
def _gumbel_mask(logits: Tensor, *options: Any) -> Work:
    """Logits are read and the mask written; noise is computed, never stored."""
    return Work(2 * _size(logits) + _copies(logits), 0, 30 * logits.numel())


@_work_of("hdmil::gumbel_mask_backward")
def _gumbel_mask_backward(grad_mask: Tensor, logits: Tensor, *options: Any) -> Work:
    """Gradient of the mask and logits are read, the gradient of the logits written."""
    moved = _size(grad_mask) + 2 * _size(logits) + _copies(grad_mask, logits)
    return Work(moved, 0, 30 * logits.numel())


@_work_of("hdmil::self_distillation_pool")
def _self_distillation_pool(embeddings: Tensor, *weights_and_options: Any) -> Work:
    """Embeddings and weights are read; logits, mask and the sums of 2 C branches are written."""
    weights, (table, first_chunk) = weights_and_options[:6], weights_and_options[6:8]
    (tiles, embed_dim), (branches, hidden) = embeddings.shape, weights[4].shape
    logits_and_mask = 2 * tiles * branches * embeddings.element_size()
    moved = _size(embeddings, *weights) + logits_and_mask + _copies(embeddings, *weights)
    moved += _chunk_sums(embeddings, 2 * branches, table, first_chunk)
    flops = cost.gated_attention_pool(tiles, embed_dim, hidden, 2 * branches).flops
    return _products(flops, embeddings, moved, 30 * tiles * branches)


@_work_of("hdmil::self_distillation_pool_backward")
def _self_distillation_pool_backward(
    grad_pooled: Tensor,
    grad_logits: Tensor,
    grad_mask: Tensor,
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    pooled: Tensor,
    logits: Tensor,
    mask: Tensor,
    table: Tensor,
    *statistics_and_options: Any,
) -> Work:
    """One kernel, and one product that makes the gradients of the two large weights.

    The kernel reads embeddings, logits, mask and the gradients of the last two, and writes the gradients of
    the embeddings (N, E) and of the hidden units (N, 2 H), which the product reads with the embeddings. Sums
    over chunks of tiles, (chunks, 2 C + 2, H) and (chunks, 2 C), are written and read.
    """
    from hdmil_lib.kernels.self_distillation_pool import gpu

    (tiles, embed_dim), (branches, hidden) = embeddings.shape, score_weight.shape
    f, h = _size(embeddings), 2 * tiles * hidden * embeddings.element_size()
    large, biases = _size(tanh_weight, gate_weight), _size(tanh_bias, gate_bias)
    copied = sum(_size(t) + 4 * t.numel() for t in (grad_pooled, pooled) if t.element_size() != 4)
    inner = copied + 4 * 4 * pooled.numel()  # two factors are read, the product written and read
    chunks = len(table) * (gpu.TILES // gpu.backward_blocks(embeddings.dtype, "sm_90")[0])
    sums = 4 * chunks * ((2 * branches + 2) * hidden + 2 * branches)
    scores = _size(grad_pooled, grad_logits, grad_mask, logits, mask, *statistics_and_options[:3])
    kernel = scores + 2 * f + h + large + biases + _size(score_weight) + 2 * sums
    to_weights = f + h + large + 2 * large + biases + _size(score_weight)  # and each half is copied
    flops = 3 * 4 * tiles * embed_dim * hidden + 2 * 2 * tiles * (embed_dim + hidden) * 2 * branches
    moved = inner + kernel + to_weights + _copies(grad_logits, grad_mask, embeddings)
    return _products(flops, embeddings, moved, tiles * (20 * hidden + 60 * branches))


@_work_of("hdmil::tile_preprocess")
def _tile_preprocess(
    tiles: Tensor, scale: Any, shift: Any, stain: Any, dtype: Any, channels_last: bool
) -> Work:
    """Bytes are read, numbers of another type written."""
    values = tiles.numel()
    moved = values * (1 + dtype.itemsize) + _copies(tiles)
    return Work(moved, 0, (2 + 50 * bool(stain)) * values)


@_work_of("hdmil::tissue_statistics")
def _tissue_statistics(tiles: Tensor, bins: int, threshold: int) -> Work:
    """Bytes are read once; histograms (N, 3, bins) and a count per tile, of 8 bytes each, are written."""
    counts = 8 * len(tiles) * (3 * bins + 1)
    return Work(_size(tiles) + counts + _copies(tiles), 0, 80 * tiles.numel() // 3)


@_work_of("hdmil::lipn_forward")
def _lipn_forward(patches: Tensor, weights: list[Tensor]) -> Work:
    """Patches and weights are read, logits written; all maps stay in registers."""
    logits = len(patches) * _size(weights[-1])
    moved = _size(patches, *weights) + logits + _copies(patches, *weights)
    return _products(2 * LIPN_MULTIPLY_ADDS * len(patches), weights[0], moved)


@_work_of("hdmil::selective_scan")
def _selective_scan(
    inputs: Tensor, steps: Tensor, decay: Tensor, input_matrix: Tensor, output_matrix: Tensor, skip: Tensor
) -> Work:
    """Three passes: the end state of every chunk from zero, the states from chunk to chunk, the outputs.

    The first and the last read the inputs. Per step and state the first takes 5 operations, the last 7.
    """
    arguments = (inputs, steps, decay, input_matrix, output_matrix, skip)
    states, durations = _scan_states(inputs)
    ends = _size(inputs, steps, decay, input_matrix) + states + durations
    carry = 2 * states + durations
    scan = _size(*arguments) + states + _size(inputs)
    moved = ends + carry + scan + _copies(*arguments)
    return Work(moved, 0, (5 + 7) * inputs.numel() * decay.shape[1])


def _scan_states(inputs: Tensor) -> tuple[int, int]:
    """Bytes of one state per chunk, float32 (B, chunks, S, D), and of one duration, (B, chunks, D)."""
    from hdmil_lib.kernels.selective_scan import gpu
    from hdmil_lib.kernels.selective_scan.limits import MAX_STATES

    _, n_chunks, blocks = gpu.cut(inputs)
    durations = 4 * len(inputs) * n_chunks * blocks * gpu.CHANNELS
    return durations * MAX_STATES, durations


@_work_of("hdmil::selective_scan_backward")
def _selective_scan_backward(grad: Tensor, starts: Tensor, *arguments: Tensor) -> Work:
    """The first two passes in reverse; then each chunk forward and back.

    The states of every fourth step are written and read. The gradients of decay and skip are partial sums
    over chunks, those of both matrices over blocks of channels, written and read. Per step and state the
    passes take 5, 5, 4 and 19 operations.
    """
    from hdmil_lib.kernels.selective_scan import gpu
    from hdmil_lib.kernels.selective_scan.limits import MAX_STATES

    inputs, steps, decay, input_matrix, output_matrix, skip = arguments
    (batch, length, _), (chunk, _, blocks) = inputs.shape, gpu.cut(inputs)
    states, durations = _scan_states(inputs)
    ends = _size(grad, steps, decay, output_matrix) + states + durations
    carry = 2 * states + durations
    scratch = states * (chunk // gpu.STEPS.value)
    forward = _size(inputs, steps, decay, input_matrix) + states + scratch
    matrices = 4 * blocks * batch * length * 2 * MAX_STATES
    partials = states + durations + matrices
    back = scratch + states + _size(grad, *arguments) + _size(inputs, steps) + partials
    sums = partials + _size(decay, input_matrix, output_matrix, skip)
    moved = ends + carry + forward + back + sums + _copies(grad, *arguments)
    return Work(moved, 0, (5 + 5 + 4 + 19) * inputs.numel() * decay.shape[1])


@_work_of("hdmil::s4d_response")
def _s4d_response(amplitudes: Tensor, exponents: Tensor, length: int) -> Work:
    """Parameters are read and the response (D, L) written; the transforms are operators of their own."""
    channels, states, _ = amplitudes.shape
    moved = _size(amplitudes, exponents) + 4 * channels * length + _copies(amplitudes, exponents)
    return Work(moved, 0, 4 * channels * length * states)


@_work_of("hdmil::s4d_response_backward")
def _s4d_response_backward(grad: Tensor, amplitudes: Tensor, exponents: Tensor) -> Work:
    """The gradient of the response is read once per 16 states; per position and state, four products."""
    from hdmil_lib.kernels.s4d_convolution import gpu

    states = amplitudes.shape[1]
    moved = _size(grad) * -(-states // gpu.STATES.value) + 2 * _size(amplitudes, exponents)
    return Work(moved + _copies(grad, amplitudes, exponents), 0, 8 * grad.numel() * states)
