"""`self_distillation_pool`: the public operator."""

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check, kernel_op, same_type, use_triton
from hdmil_lib.kernels.gated_attention import op as attention
from hdmil_lib.kernels.gumbel_mask.op import check_selection
from hdmil_lib.kernels.random import Seed, key
from hdmil_lib.kernels.segment_softmax_pool import op as pooling
from hdmil_lib.kernels.segments import Segments, check_segments
from hdmil_lib.kernels.self_distillation_pool import reference

MAX_BRANCHES = 8
"""Branches of student and teacher together fill one matrix product."""


def self_distillation_pool(
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    segments: Segments | None = None,
    *,
    dropout: float = 0.0,
    seed: Seed | None = None,
    noise_seed: Seed | None = None,
    temperature: float = 1.0,
    threshold: float = 0.5,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gated_attention`, `gumbel_mask` of its logits, and `segment_softmax_pool` with this mask and without.

    That is DMIN from embeddings to the bag embeddings of student and teacher (paper: DMIN). The kernel reads
    the embeddings once, and once more for all gradients.

    Args:
        embeddings: Embeddings F, (N, E), N >= 1.
        tanh_weight: Weight V of the tanh, (H, E).
        tanh_bias: Bias of the tanh, (H,).
        gate_weight: Weight U of the gate, (H, E).
        gate_bias: Bias of the gate, (H,).
        score_weight: Weight W of the scores, (C, H).
        score_bias: Bias of the scores, (C,).
        segments: Where each of B bags lies among the N tiles; `None` for one bag.
        dropout: Dropout rate of the hidden units of the attention, as in `gated_attention`.
        seed: Seed of the dropout.
        noise_seed: Seed of the Gumbel noise; `None` for no noise, as in evaluation.
        temperature: Temperature tau of the selection, more than 0.
        threshold: Threshold gamma of the selection, between 0 and 1.
        backend: "torch" for the reference; "triton" for the kernel, which supports first derivatives only;
            "auto" for the kernel on a GPU, with at most 8 branches, and the reference elsewhere.

    Returns:
        student: Bag embeddings of the selected tiles, (B, C, E), or (C, E) without `segments`.
        teacher: Bag embeddings of all tiles, likewise.
        logits: A, (N, C).
        mask: M, (N, C), straight-through.

    Raises:
        ValueError: An argument has a wrong shape, type, device or value, or the backend cannot run here.
    """
    embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias = same_type(
        embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias
    )
    weights = (tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias)
    attention.check_arguments(embeddings, weights, dropout, seed)
    n_branches = check(embeddings=(embeddings, "N E"), score_bias=(score_bias, "C"))["C"]
    check_selection(len(embeddings), temperature, threshold)
    check_segments(segments, len(embeddings), embeddings.device)
    if use_triton(backend, embeddings) and (n_branches <= MAX_BRANCHES or backend == "triton"):
        if n_branches > MAX_BRANCHES:
            raise ValueError(
                f"score_bias has {n_branches} branches, the kernel takes at most {MAX_BRANCHES}: use "
                "backend='auto'"
            )
        keys = (
            attention.drop_key(dropout, seed, embeddings),
            None if noise_seed is None else key(noise_seed, embeddings.device),
        )
        bags = pooling.bag_chunks(segments, embeddings)
        pooled, logits, mask, *_ = _forward(
            embeddings, *weights, *bags, dropout, *keys, temperature, threshold
        )
        student, teacher = pooling.of_bags(pooled, segments).chunk(2, -2)
        return student, teacher, logits, mask
    number = 0 if seed is None else seed
    return reference.self_distillation_pool(
        embeddings, weights, segments, dropout, number, noise_seed, temperature, threshold
    )


@kernel_op("hdmil::self_distillation_pool")
def _forward(
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    table: Tensor,
    first_chunk: Tensor,
    dropout: float,
    key: Tensor | None,
    noise_key: Tensor | None,
    temperature: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pooled (B, 2 C, E), logits and mask (N, C), and statistics of `segment_softmax_pool`, (B, 2 C) each."""
    from hdmil_lib.kernels.self_distillation_pool import gpu

    weights = (tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias)
    return gpu.forward(
        embeddings, weights, table, first_chunk, dropout, key, noise_key, temperature, threshold
    )


@_forward.register_fake
def _(
    embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias, table,
    first_chunk, dropout, key, noise_key, temperature, threshold,
):  # fmt: skip
    n_branches = score_weight.shape[0]
    logits = embeddings.new_empty(embeddings.shape[0], n_branches)
    both = logits.new_empty(0, 2 * n_branches)
    pooled, *statistics = pooling.empty_results(embeddings, both, first_chunk)
    return pooled, logits, torch.empty_like(logits), *statistics


@kernel_op("hdmil::self_distillation_pool_backward")
def _backward(
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
    largest: Tensor,
    total: Tensor,
    fallback: Tensor,
    dropout: float,
    key: Tensor | None,
    noise_key: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the embeddings and the six weights."""
    from hdmil_lib.kernels.self_distillation_pool import gpu

    return gpu.backward(
        (grad_pooled, grad_logits, grad_mask),
        embeddings,
        (tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight),
        (pooled, logits, mask, table, largest, total, fallback),
        dropout,
        key,
        noise_key,
        temperature,
    )


@_backward.register_fake
def _(
    grad_pooled, grad_logits, grad_mask, embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias,
    score_weight, pooled, logits, mask, table, largest, total, fallback, dropout, key, noise_key,
    temperature,
):  # fmt: skip
    tensors = (embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    return *grads, score_weight.new_empty(score_weight.shape[0])


def _save(ctx, inputs, output):
    *tensors, _score_bias, table, _first_chunk, ctx.dropout, key, noise_key, ctx.temperature, _ = inputs
    pooled, logits, mask, *statistics = output
    ctx.save_for_backward(*tensors, pooled, logits, mask, table, *statistics, key, noise_key)


def _differentiate(ctx, grad_pooled, grad_logits, grad_mask, *_):
    *saved, key, noise_key = ctx.saved_tensors
    grads = (grad_pooled, grad_logits, grad_mask)
    found = _backward(*grads, *saved, ctx.dropout, key, noise_key, ctx.temperature)
    return *found, None, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
