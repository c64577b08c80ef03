"""The selective scan in plain PyTorch: blocks of steps, one after the other (Gu & Dao 2023, section 3)."""

import torch
from torch import Tensor

STEPS = 16  # of a block: its tensors, (S, D) a step, then stay in the cache of a core


def selective_scan(
    inputs: Tensor, steps: Tensor, decay: Tensor, input_matrix: Tensor, output_matrix: Tensor, skip: Tensor
) -> Tensor:
    """A linear recurrence whose step size, input and output depend on the tile.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t from h_0 = 0, and y_t = <C_t, h_t> + D u_t.

    Args:
        inputs: u, (B, L, D).
        steps: delta, (B, L, D), positive.
        decay: A, (D, S), negative.
        input_matrix: B, (B, L, S).
        output_matrix: C, (B, L, S).
        skip: D, (D,).

    Returns:
        y, (B, L, D).
    """
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
