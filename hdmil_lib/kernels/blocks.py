"""Whose blocks a kernel takes on a GPU: the blocks of the target that is most like it.

`tools/aot_check.py` compiles every kernel for `TARGETS`, and a kernel is launched with the blocks with which
it was compiled. Most blocks fit all targets; where they do not, a function of the kernel's module says which
blocks a target takes, and both `variants` and the launch ask it.

What is special is mostly sm_75 (T4), on which Triton multiplies matrices element by element, so that a thread
holds rows and columns of both factors in registers, and which has 64 kB of shared memory. With the blocks of
the other targets, in float16, the tool reported 13,884 B of spilled registers and 147,456 B of shared memory
for `lipn_forward`, 16 B spilled for `gated_attention_pool`, and 96 B forward and 768 B backward for
`segment_softmax_pool`. LIPN now multiplies 32 rows at a time, with 8 warps, and reads its weights again for
every row of its maps (255 registers, 16,384 B shared); the gated attention takes 16 embedding dimensions at a
time (207 registers); the pooling has 8 warps forward (155 registers) and half the embedding dimensions
backward (248 registers), which suits all targets. Nothing spills. There is no bfloat16 on sm_75.
"""

from functools import lru_cache

import torch

NVIDIA = {(7, 5): "sm_75", (8, 0): "sm_80", (8, 6): "sm_89", (9, 0): "sm_90", (12, 0): "sm_120"}
"""The oldest compute capability of each target; 8.6 has the shared memory of 8.9."""

TARGETS = (*NVIDIA.values(), "gfx942", "gfx1100")


INTERPRETED = "sm_80"
"""The target whose blocks are launched on the CPU, where the interpreter runs them."""


def target_of(device: torch.device) -> str:
    """Return the target whose blocks are launched on a device.

    That is the newest target which is not newer than an NVIDIA GPU, gfx942 for AMD's gfx9, and gfx1100 for
    other GPUs of AMD.
    """
    return INTERPRETED if device.type == "cpu" else _of_gpu(device)


@lru_cache
def _of_gpu(device: torch.device) -> str:
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx942" if name.startswith("gfx9") else "gfx1100"
    capability = torch.cuda.get_device_capability(device)
    older = [known for known in NVIDIA if known <= capability]
    return NVIDIA[max(older, default=min(NVIDIA))]
