"""`tile_projection`: the public operator."""

from typing import Any

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import (
    Backend,
    check,
    check_device,
    check_tensor,
    kernel_op,
    same_type,
    use_triton,
)
from hdmil_lib.kernels.random import Seed, key
from hdmil_lib.kernels.tile_projection import reference


def tile_projection(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: Seed | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Turn features into embeddings: F = ReLU(((I - mean) / std) W^T + b), with dropout (paper: DMIN).

    This is the first layer of the bag classifiers, where a training step moves most bytes. The kernel reads
    features as they are stored, in 16 bits, and writes embeddings alone; in PyTorch each operation reads and
    writes (N, D) or (N, E) numbers.

    Args:
        features: I, (N, D), of any floating type.
        weight: W, (E, D); the result has its type.
        bias: b, (E,); `None` for none.
        mean: Mean of each feature, (D,); `None` together with `std` for features as they are.
        std: Standard deviation of each feature, (D,), above 0.
        dropout: Dropout rate of the embeddings; 0 in evaluation.
        seed: Seed of the dropout. `None` draws from PyTorch's generator, which only the reference can.
        backend: "torch" for the reference; "triton" for the kernel, which supports first derivatives only;
            "auto" for the kernel on a GPU and the reference elsewhere.

    Returns:
        Embeddings F, (N, E).

    Raises:
        ValueError: An argument has a wrong shape, type, device or value, or the backend cannot run here.
    """
    check_tensor("features", features, "N D")
    weight, bias = same_type(weight, bias)
    check(weight=(weight, "E D"), bias=(bias, "E"))
    if features.ndim != 2 or features.shape[1] != weight.shape[1] or not features.is_floating_point():
        raise ValueError(
            f"features is {features.dtype} of shape {tuple(features.shape)}, expected floating numbers "
            f"(N, {weight.shape[1]})"
        )
    for name, tensor in (("features", features), ("mean", mean), ("std", std)):
        if tensor is not None:
            check_device(name, tensor, weight.device, "weight")
    if (mean is None) != (std is None):
        raise ValueError("mean and std come together: give both, or neither")
    check(mean=(mean, "D"), std=(std, "D")) if mean is not None else None
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected at least 0 and less than 1")
    if not use_triton(backend, weight):
        return reference.tile_projection(features, weight, bias, mean, std, dropout, seed)
    if dropout > 0 and seed is None:
        raise ValueError("seed is None, but dropout needs one: draw it with kernels.random.draw_seed()")
    drop_key = key(seed, weight.device) if dropout > 0 and seed is not None else None
    return _forward(features, weight, bias, mean, std, dropout, drop_key)


@kernel_op("hdmil::tile_projection")
def _forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dropout: float,
    key: Tensor | None,
) -> Tensor:
    from hdmil_lib.kernels.tile_projection import gpu

    return gpu.forward(features, weight, bias, mean, std, dropout, key)


@_forward.register_fake
def _(features, weight, bias, mean, std, dropout, key):
    return weight.new_empty(features.shape[0], weight.shape[0])


@kernel_op("hdmil::tile_projection_backward")
def _backward(
    grad: Tensor,
    embeddings: Tensor,
    features: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and of a bias."""
    from hdmil_lib.kernels.tile_projection import gpu

    return gpu.backward(grad, embeddings, features, weight, mean, std, dropout)


@_backward.register_fake
def _(grad, embeddings, features, weight, mean, std, dropout):
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(len(weight))


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    features, weight, bias, mean, std, ctx.dropout, _key = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(output, features, weight, mean, std)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    embeddings, features, weight, mean, std = ctx.saved_tensors
    grad_weight, grad_bias = _backward(grad, *ctx.saved_tensors, ctx.dropout)
    grad_features = None
    if ctx.needs_input_grad[0]:  # features are data, except for a caller who asks what they did
        through = torch.where(embeddings > 0, grad / (1 - ctx.dropout), 0)
        grad_features = (through @ weight).to(features.dtype)
        grad_features = grad_features if std is None else (grad_features / std).to(features.dtype)
    return grad_features, grad_weight, grad_bias if ctx.has_bias else None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
