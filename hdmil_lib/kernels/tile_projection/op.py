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
    rows: Tensor | None = None,
    dropout: float = 0.0,
    seed: Seed | None = None,
    positions: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Turn features into embeddings: F = ReLU(((I - mean) / std) W^T + b), with dropout (paper: DMIN).

    This is the first layer of the bag classifiers, where a training step moves most bytes. The kernel reads
    features as they are stored, in 16 bits, and writes embeddings alone; in PyTorch each operation reads and
    writes (N, D) or (N, E) numbers.

    With `rows`, the tiles of a batch are read where they lie among those of a cohort. A few tiles of a batch
    can be projected again, with their rows, seed and positions. They have the same embeddings, and the
    gradient takes these tiles alone, while that of an index would be as large as all embeddings.

    Args:
        features: I, (M, D), of any floating type; M = N without `rows`.
        weight: W, (E, D); the result has its type.
        bias: b, (E,); `None` for none.
        mean: Mean of each feature, (D,); `None` together with `std` for features as they are.
        std: Standard deviation of each feature, (D,), above 0.
        rows: Row of `features` of each tile, int64 (N,) on their device, from 0 to M - 1, which is not
            checked on a GPU; `None` for all in their order.
        dropout: Dropout rate of the embeddings; 0 in evaluation.
        seed: Seed of the dropout. `None` draws from PyTorch's generator, which only the reference can.
        positions: Number of each tile in the dropout, int64 (N,), by default from 0 to N - 1: what is dropped
            is a function of it, of the seed and of E.
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
    for name, numbers in (("rows", rows), ("positions", positions)):
        if numbers is not None:
            check_numbers(name, numbers, weight.device)
    n_tiles = len(features if rows is None else rows)
    if positions is not None and len(positions) != n_tiles:
        raise ValueError(f"positions has {len(positions)} numbers, expected one for each of {n_tiles} tiles")
    if not use_triton(backend, weight):
        if rows is not None:
            features = features[rows]
        return reference.tile_projection(features, weight, bias, mean, std, dropout, seed, positions)
    if dropout > 0 and seed is None:
        raise ValueError("seed is None, but dropout needs one: draw it with kernels.random.draw_seed()")
    drop_key = key(seed, weight.device) if dropout > 0 and seed is not None else None
    positions = positions if dropout > 0 else None
    return _forward(features, weight, bias, mean, std, rows, dropout, drop_key, positions)[0]


def check_numbers(name: str, numbers: Tensor, device: torch.device) -> None:
    """Check that an argument is int64 (N,) on the device.

    Raises:
        ValueError: It is not.
    """
    check_tensor(name, numbers, "N")
    if numbers.dtype != torch.int64 or numbers.ndim != 1:
        raise ValueError(f"{name} is {numbers.dtype} of shape {tuple(numbers.shape)}, expected int64 (N,)")
    check_device(name, numbers, device, "weight")


@kernel_op("hdmil::tile_projection")
def _forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    rows: Tensor | None,
    dropout: float,
    key: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, E), and a bit for each that says whether it is above 0, int32 (N, ceil(E / 32))."""
    from hdmil_lib.kernels.tile_projection import gpu

    return gpu.forward(features, weight, bias, mean, std, rows, dropout, key, positions)


@_forward.register_fake
def _(features, weight, bias, mean, std, rows, dropout, key, positions):
    n_tiles, embed_dim = (features if rows is None else rows).shape[0], weight.shape[0]
    active = weight.new_empty(n_tiles, (embed_dim + 31) // 32, dtype=torch.int32)
    return weight.new_empty(n_tiles, embed_dim), active


@kernel_op("hdmil::tile_projection_backward")
def _backward(
    grad: Tensor,
    active: Tensor,
    features: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    rows: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and of a bias."""
    from hdmil_lib.kernels.tile_projection import gpu

    return gpu.backward(grad, active, features, weight, mean, std, rows, dropout)


@_backward.register_fake
def _(grad, active, features, weight, mean, std, rows, dropout):
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(len(weight))


def _save(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    features, weight, bias, mean, std, rows, ctx.dropout, _key, _positions = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(output[1], features, weight, mean, std, rows)


def _differentiate(ctx: Any, grad: Tensor, _active: None) -> tuple[Tensor | None, ...]:
    active, features, weight, mean, std, rows = ctx.saved_tensors
    grad_weight, grad_bias = _backward(grad, *ctx.saved_tensors, ctx.dropout)
    grad_features = None
    if ctx.needs_input_grad[0]:  # features are data, except for a caller who asks what they did
        unit = torch.arange(len(weight), device=grad.device)
        kept = (active[:, unit // 32] >> (unit % 32)) & 1
        grad_features = (grad * kept / (1 - ctx.dropout)) @ weight
        grad_features = (grad_features if std is None else grad_features / std).to(features.dtype)
        if rows is not None:
            grad_features = torch.zeros_like(features).index_add(0, rows, grad_features)
    return grad_features, grad_weight, grad_bias if ctx.has_bias else None, *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)
