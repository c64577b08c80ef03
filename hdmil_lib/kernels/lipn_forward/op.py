"""`lipn_forward`: the public operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdmil_lib.kernels.dispatch import Backend, check, check_bytes, check_device, kernel_op, use_triton
from hdmil_lib.kernels.lipn_forward import reference


def lipn_forward(patches: Tensor, weights: Sequence[Tensor], *, backend: Backend = "auto") -> Tensor:
    """Run the frozen pre-screening network, all layers in one call and without gradients (paper: LIPN).

    On maps as small as those of LIPN, a convolution can be written as a matrix product. The matrices need
    three times the multiply-adds of the convolutions, 377,000 per patch, but matrix products are what a GPU
    does fastest. On a CPU the two largest layers remain convolutions.

    Args:
        patches: RGB patches, uint8 (N, 16, 16, 3).
        weights: Weights and biases of the eleven layers as `LIPN.packed` returns them; `reference.LAYERS`
            lists the shapes. Their type is the type of the computation.
        backend: "torch" for the reference; "triton" for the kernel; "auto" for the kernel on a GPU if the
            weights have 16 bits, which its matrix units need, and the reference elsewhere.

    Returns:
        Logits P, (N, C), in the type of the weights.

    Raises:
        ValueError: An argument has a wrong shape, type or device, or the backend cannot run here.
    """
    check_bytes("patches", patches, "N 16 16 3")
    _check_weights(weights, patches.device)
    narrow = weights[0].dtype.itemsize == 2
    if backend == "triton" and patches.is_cuda and not narrow:
        raise ValueError(f"weights is {weights[0].dtype}: pack it in torch.float16 for the kernel")
    if use_triton(backend, patches, weights[0].dtype) and (narrow or not patches.is_cuda):
        return _forward(patches, list(weights))
    return reference.lipn_forward(patches, weights)


def _check_weights(weights: Sequence[Tensor], device: torch.device) -> None:
    shapes = [*reference.LAYERS.values(), (64, "C")]
    axes = [" ".join(map(str, shape)) for layer in shapes for shape in (layer, layer[-1:])]
    if len(weights) != len(axes):
        raise ValueError(f"weights has {len(weights)} tensors, expected the {len(axes)} of LIPN.packed")
    check(**{f"weights[{i}]": pair for i, pair in enumerate(zip(weights, axes, strict=True))})
    check_device("weights", weights[0], device, "patches")


@kernel_op("hdmil::lipn_forward")
def _forward(patches: Tensor, weights: list[Tensor]) -> Tensor:
    from hdmil_lib.kernels.lipn_forward import gpu

    return gpu.forward(patches, weights)


@_forward.register_fake
def _(patches, weights):
    return weights[-1].new_empty(patches.shape[0], weights[-1].shape[0])
