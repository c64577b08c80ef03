"""The selective scan in plain PyTorch, one block of steps after another."""

import torch
from torch import Tensor

STEPS = 16  # steps per block, whose tensors, (S, D) per step, fit into the cache of a CPU core


def selective_scan(
    inputs: Tensor, steps: Tensor, decay: Tensor, input_matrix: Tensor, output_matrix: Tensor, skip: Tensor
) -> Tensor:
    """Return the outputs (B, L, D) that `kernels.selective_scan` describes."""
    if not inputs.numel():
        return skip * inputs
    rates = decay.T.contiguous()
    state = inputs.new_zeros(len(inputs), *rates.shape)
    rows = (
        steps[:, :, None],
        (steps * inputs)[:, :, None],
        input_matrix[..., None],
        output_matrix[:, :, None],
    )
    outputs = []
    for step, drive, into, out in zip(*(row.split(STEPS, 1) for row in rows), strict=True):
        states = []
        for kept, added in zip((step * rates).exp().unbind(1), (into * drive).unbind(1), strict=True):
            state = torch.addcmul(added, kept, state)
            states.append(state)
        outputs.append((out @ torch.stack(states, 1))[:, :, 0])
    return torch.cat(outputs, 1) + skip * inputs
