"""`gated_attention`: the public operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check, kernel_op, same_type, use_triton
from hdmil_lib.kernels.gated_attention import reference
from hdmil_lib.kernels.random import Seed, key


def gated_attention(
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    *,
    dropout: float = 0.0,
    seed: Seed | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Compute the attention logits A = [tanh(F V) * sigmoid(F U)] W (paper: DMIN, attention).

    Args:
        embeddings: Tile embeddings F, (N, E).
        tanh_weight: Weight of V, (H, E).
        tanh_bias: Bias of V, (H,).
        gate_weight: Weight of U, (H, E).
        gate_bias: Bias of U, (H,).
        score_weight: Weight of W, (C, H).
        score_bias: Bias of W, (C,).
        dropout: Dropout rate of the hidden units, applied to each of the two factors; 0 in evaluation.
        seed: Seed of the dropout, required if `dropout` is above 0. The dropped units are a function of the
            seed and the position (`kernels.random.bits`).
        backend: "torch" for the reference; "triton" for the kernel, which supports first derivatives only;
            "auto" for the kernel on a GPU and the reference elsewhere.

    Returns:
        Logits A before the softmax over tiles, one column per branch, (N, C).

    Raises:
        ValueError: An argument has a wrong shape, type, device or value, or the backend cannot run here.
    """
    embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias = same_type(
        embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias
    )
    weights = (tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias)
    check_arguments(embeddings, weights, dropout, seed)
    if use_triton(backend, embeddings):
        return _forward(embeddings, *weights, dropout, drop_key(dropout, seed, embeddings))
    return reference.gated_attention(embeddings, *weights, dropout, 0 if seed is None else seed)


def check_arguments(embeddings: Tensor, weights: Sequence[Tensor], dropout: float, seed: Seed | None) -> None:
    """Raise a ValueError if an argument is not as `gated_attention` describes it."""
    names = ("tanh_weight", "tanh_bias", "gate_weight", "gate_bias", "score_weight", "score_bias")
    axes = ("H E", "H", "H E", "H", "C H", "C")
    expected = {name: (weight, axis) for name, weight, axis in zip(names, weights, axes, strict=True)}
    check(embeddings=(embeddings, "N E"), **expected)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected at least 0 and less than 1")
    if dropout > 0 and seed is None:
        raise ValueError("seed is None, but dropout needs one: draw it with kernels.random.draw_seed()")


def drop_key(dropout: float, seed: Seed | None, embeddings: Tensor) -> Tensor | None:
    """Return the key of a seed where the embeddings are; `None` without dropout."""
    return key(seed, embeddings.device) if dropout > 0 and seed is not None else None


@kernel_op("hdmil::gated_attention")
def _forward(
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    dropout: float,
    key: Tensor | None,
) -> Tensor:
    from hdmil_lib.kernels.gated_attention import gpu

    weights = (tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias)
    return gpu.forward(embeddings, *weights, dropout, key)


@_forward.register_fake
def _(embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias, dropout, key):
    return embeddings.new_empty(embeddings.shape[0], score_weight.shape[0])


@kernel_op("hdmil::gated_attention_backward")
def backward(
    grad_logits: Tensor,
    embeddings: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score_weight: Tensor,
    dropout: float,
    key: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the seven tensors of `gated_attention`, in its order."""
    from hdmil_lib.kernels.gated_attention import gpu

    weights = (tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight)
    return gpu.backward(grad_logits, embeddings, *weights, dropout, key)


@backward.register_fake
def _(
    grad_logits, embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, dropout, key
):  # fmt: skip
    tensors = (embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    return *grads, score_weight.new_empty(score_weight.shape[0])


def _save(ctx, inputs, output):
    *tensors, _score_bias, ctx.dropout, key = inputs
    ctx.save_for_backward(*tensors, key)


def _differentiate(ctx, grad_logits):
    *tensors, key = ctx.saved_tensors
    return *backward(grad_logits, *tensors, ctx.dropout, key), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
