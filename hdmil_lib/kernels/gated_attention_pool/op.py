"""`gated_attention_pool`: the public operator."""

from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check, kernel_op, same_type, use_triton
from hdmil_lib.kernels.gated_attention import op as attention
from hdmil_lib.kernels.gated_attention_pool import reference
from hdmil_lib.kernels.random import Seed
from hdmil_lib.kernels.segment_softmax_pool import op as pooling
from hdmil_lib.kernels.segments import Segments, check_segments


def gated_attention_pool(
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    mask: Tensor | None = None,
    segments: Segments | None = None,
    *,
    dropout: float = 0.0,
    seed: Seed | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`gated_attention` and `segment_softmax_pool` of its logits, in one pass over the embeddings.

    For a mask that does not depend on these logits; one that does (DMIN's own) needs the two operators.

    Args:
        embeddings: Embeddings F, (N, E).
        tanh_weight: Weight V of the tanh, (H, E).
        tanh_bias: Bias of the tanh, (H,).
        gate_weight: Weight U of the gate, (H, E).
        gate_bias: Bias of the gate, (H,).
        score_weight: Weight W of the scores, (C, H).
        score_bias: Bias of the scores, (C,).
        mask: Mask M, (N, C), 1 or True for a kept tile; `None` keeps all.
        segments: Where each of B bags lies among the N tiles; `None` for one bag.
        dropout: Share of hidden units that is dropped from each factor of the attention.
        seed: Seed of the dropout.
        backend: "torch" is the reference; "triton" the kernel, whose gradients cannot be differentiated
            again; "auto" the kernel on a GPU.

    Returns:
        pooled: (B, C, E), or (C, E) without `segments`.
        logits: A, (N, C).

    Raises:
        ValueError: An argument has another shape, type, device or range, or the backend cannot run.
    """
    mask = pooling.as_numbers(mask, embeddings)
    embeddings, mask, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias = same_type(
        embeddings, mask, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias
    )
    weights = (tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias)
    attention.check_arguments(embeddings, weights, dropout, seed)
    check(embeddings=(embeddings, "N E"), score_bias=(score_bias, "C"), mask=(mask, "N C"))
    check_segments(segments, len(embeddings), embeddings.device)
    if not use_triton(backend, embeddings):
        number = 0 if seed is None else seed
        return reference.gated_attention_pool(embeddings, weights, mask, segments, dropout, number)
    bags, key = pooling.bag_chunks(segments, embeddings), attention.drop_key(dropout, seed, embeddings)
    pooled, logits, *_ = _forward(embeddings, *weights, mask, *bags, dropout, key)
    return pooling.of_bags(pooled, segments), logits


@kernel_op("hdmil::gated_attention_pool")
def _forward(
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    mask: Tensor | None,
    table: Tensor,
    first_chunk: Tensor,
    dropout: float,
    key: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pooled (B, C, E), logits (N, C), and the statistics of `segment_softmax_pool`, (B, C) each."""
    from hdmil_lib.kernels.gated_attention_pool import gpu

    weights = (tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias)
    return gpu.forward(embeddings, weights, mask, table, first_chunk, dropout, key)


@_forward.register_fake
def _(
    embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias, mask, table,
    first_chunk, dropout, key,
):  # fmt: skip
    logits = embeddings.new_empty(embeddings.shape[0], score_weight.shape[0])
    pooled, *statistics = pooling.empty_results(embeddings, logits, first_chunk)
    return pooled, logits, *statistics


def _save(ctx, inputs, output):
    *tensors, _score_bias, mask, table, _first_chunk, ctx.dropout, key = inputs
    pooled, logits, *statistics = output
    ctx.save_for_backward(*tensors, pooled, logits, mask, table, *statistics, key)


def _differentiate(ctx, grad_pooled, grad_logits, *_):
    """The gradients of the pooling, then those of the attention for the logits' whole gradient."""
    embeddings, *weights, pooled, logits, mask, table, largest, total, fallback, key = ctx.saved_tensors
    saved = (pooled, embeddings, logits, mask, table, largest, total, fallback)
    from_pool, through_logits, grad_mask = pooling.backward(grad_pooled, *saved)
    through_logits = through_logits + grad_logits
    grads = attention.backward(through_logits, embeddings, *weights, ctx.dropout, key)
    grad_mask = grad_mask if grad_mask.numel() else None
    return from_pool + grads[0], *grads[1:], grad_mask, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
