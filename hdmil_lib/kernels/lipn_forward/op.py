"""`lipn_forward`: the public operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check, check_tensor, use_triton
from hdmil_lib.kernels.lipn_forward import reference


def lipn_forward(patches: Tensor, weights: Sequence[Tensor], *, backend: Backend = "auto") -> Tensor:
    """Logits of the frozen pre-screening network, all layers at once (paper: LIPN). No gradients.

    A convolution of a map as small as LIPN's is a matrix product. The matrices have three times the
    multiply-adds of the convolutions, 377,000 a patch, but those are what a GPU does best; on a CPU the two
    largest layers stay convolutions.

    Args:
        patches: RGB, uint8 (N, 16, 16, 3).
        weights: What `LIPN.packed` returns: for each of eleven layers a weight, as `reference.LAYERS` lists
            them, and a bias; their type is the one that is computed in.
        backend: "torch" is the reference; "triton" the kernel; "auto" the kernel on a GPU for weights of 16
            bits, which its matrix units need.

    Returns:
        P, (N, C), in the type of the weights.

    Raises:
        ValueError: An argument has another shape, type or device, or the backend cannot run.
    """
    check_tensor("patches", patches, "N 16 16 3")
    if patches.dtype != torch.uint8 or patches.shape[1:] != (16, 16, 3):
        raise ValueError(
            f"patches is {patches.dtype} of shape {tuple(patches.shape)}, expected torch.uint8 (N, 16, 16, 3)"
        )
    _check_weights(weights, patches.device)
    narrow = weights[0].dtype.itemsize == 2
    if backend == "triton" and patches.is_cuda and not narrow:
        raise ValueError(f"weights is {weights[0].dtype}: pack it in torch.float16 for the kernel")
    if use_triton(backend, patches) and (narrow or not patches.is_cuda):
        return _forward(patches, list(weights))
    return reference.lipn_forward(patches, weights)


def _check_weights(weights: Sequence[Tensor], device: torch.device) -> None:
    shapes = [shape for name in reference.LAYERS.values() for shape in (name, name[-1:])]
    if len(weights) != len(shapes) + 2:
        raise ValueError(
            f"weights has {len(weights)} tensors, expected {len(shapes) + 2}, as LIPN.packed has"
        )
    for place, weight in enumerate(weights):
        check_tensor(f"weights[{place}]", weight, "...")
    classes = weights[-1].shape[-1]
    for place, (weight, shape) in enumerate(zip(weights, [*shapes, (64, classes), (classes,)], strict=True)):
        if weight.shape != shape:
            raise ValueError(f"weights[{place}] has shape {tuple(weight.shape)}, expected {shape}")
        if weight.device != device:
            raise ValueError(f"weights[{place}] is on {weight.device}, but patches is on {device}")
    check(**{f"weights[{i}]": (w.flatten(), f"n{i}") for i, w in enumerate(weights)})


@torch.library.custom_op("hdmil::lipn_forward", mutates_args=())
def _forward(patches: Tensor, weights: list[Tensor]) -> Tensor:
    from hdmil_lib.kernels.lipn_forward import triton

    return triton.forward(patches, weights)


@_forward.register_fake
def _(patches, weights):
    return weights[-1].new_empty(patches.shape[0], weights[-1].shape[0])
