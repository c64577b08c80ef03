"""`segment_softmax_pool`: the public operator."""

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check, check_tensor, kernel_op, same_type, use_triton
from hdmil_lib.kernels.segment_softmax_pool import reference
from hdmil_lib.kernels.segments import Segments, check_segments, one_bag


def segment_softmax_pool(
    embeddings: Tensor,
    logits: Tensor,
    mask: Tensor | None = None,
    segments: Segments | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Bag embedding of each branch: E_c = sum_j exp(A_c^j) M_c^j F^j / sum_s exp(A_c^s) M_c^s.

    A branch that keeps no tile of a bag pools its single tile of highest attention, the first of equals. A
    bag without tiles is pooled to zeros. Gradients reach a straight-through mask as the equation says, also
    at dropped tiles; there, a logit above the largest kept one counts as equal to it, which bounds the
    gradient (paper: teacher and student pooling).

    Args:
        embeddings: F, (N, E).
        logits: A, (N, C).
        mask: M, (N, C), 1 (or True) for a kept and 0 for a dropped tile; `None` keeps all (the teacher).
        segments: Where each of B bags lies among the N tiles; `None` for one bag.
        backend: "torch" is the reference; "triton" the kernel, whose gradients cannot be differentiated
            again; "auto" the kernel on a GPU.

    Returns:
        (B, C, E), or (C, E) without `segments`.

    Raises:
        ValueError: An argument has another shape, type or device, or the backend cannot run.
    """
    mask = as_numbers(mask, embeddings)
    embeddings, logits, mask = same_type(embeddings, logits, mask)
    check(embeddings=(embeddings, "N E"), logits=(logits, "N C"), mask=(mask, "N C"))
    check_segments(segments, len(embeddings), embeddings.device)
    if not use_triton(backend, embeddings):
        return reference.segment_softmax_pool(embeddings, logits, mask, segments)
    pooled = _forward(embeddings, logits, mask, *bag_chunks(segments, embeddings))[0]
    return of_bags(pooled, segments)


def as_numbers(mask: Tensor | None, embeddings: Tensor) -> Tensor | None:
    """A mask of booleans or other numbers in the type of the embeddings."""
    if mask is None:
        return None
    check_tensor("mask", mask, "N C")
    check_tensor("embeddings", embeddings, "N E")
    return mask.to(embeddings.dtype)


def bag_chunks(segments: Segments | None, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks of the bags, or of one bag of all tiles, such that every tile has a bag.

    Returns:
        table: Bag, first tile and end of each chunk, int32 (chunks, 3).
        first_chunk: Index of the first chunk of each bag, int32 (B + 1,).
    """
    if segments is None:
        made_up = type(embeddings) is not Tensor or torch.compiler.is_compiling()  # such as a fake tensor
        make = one_bag.__wrapped__ if made_up else one_bag
        segments = make(len(embeddings), embeddings.device)
    return segments.chunks()


def of_bags(pooled: Tensor, segments: Segments | None) -> Tensor:
    """Results (B, ...) of the bags of `bag_chunks` for the segments, or that of the only bag."""
    return pooled[0] if segments is None else pooled[: segments.n_bags]


@kernel_op("hdmil::segment_softmax_pool")
def _forward(
    embeddings: Tensor, logits: Tensor, mask: Tensor | None, table: Tensor, first_chunk: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pooled (B, C, E); largest kept logit, sum of weights, and tile pooled where none is kept: (B, C)."""
    from hdmil_lib.kernels.segment_softmax_pool import gpu

    return gpu.forward(embeddings, logits, mask, table, first_chunk)


def empty_results(embeddings: Tensor, logits: Tensor, first_chunk: Tensor) -> tuple[Tensor, ...]:
    """Tensors as `_forward` returns them, without values."""
    shape = (len(first_chunk) - 1, logits.shape[1])
    largest, total = (embeddings.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return (
        embeddings.new_empty(*shape, embeddings.shape[1]),
        largest,
        total,
        embeddings.new_empty(shape, dtype=torch.int32),
    )


@_forward.register_fake
def _(embeddings, logits, mask, table, first_chunk):
    return empty_results(embeddings, logits, first_chunk)


@kernel_op("hdmil::segment_softmax_pool_backward")
def backward(
    grad_pooled: Tensor,
    pooled: Tensor,
    embeddings: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    table: Tensor,
    largest: Tensor,
    total: Tensor,
    fallback: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of embeddings, logits and mask; the last one is empty without a mask."""
    from hdmil_lib.kernels.segment_softmax_pool import gpu

    saved = (embeddings, logits, mask, table, largest, total, fallback)
    return gpu.backward(grad_pooled, pooled, *saved)


@backward.register_fake
def _(grad_pooled, pooled, embeddings, logits, mask, table, largest, total, fallback):
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad_mask = logits.new_empty(0) if mask is None else torch.empty_like(grad_logits)
    return torch.empty_like(embeddings, memory_format=torch.contiguous_format), grad_logits, grad_mask


def _save(ctx, inputs, output):
    *tensors, _first_chunk = inputs
    pooled, *statistics = output
    ctx.save_for_backward(pooled, *tensors, *statistics)


def _differentiate(ctx, grad_pooled, *_):
    grad_embeddings, grad_logits, grad_mask = backward(grad_pooled, *ctx.saved_tensors)
    return grad_embeddings, grad_logits, grad_mask if grad_mask.numel() else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
