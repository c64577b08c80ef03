"""Whose blocks a kernel takes on a GPU: the blocks of the target that is most like it.

`tools/aot_check.py` compiles every kernel for `TARGETS`, and a kernel is launched with the blocks with which
it was compiled. Most blocks fit all targets; where they do not, a function of the kernel's module says which
blocks a target takes, and both `variants` and the launch ask it.
"""

from functools import lru_cache

import torch

NVIDIA = {(7, 5): "sm_75", (8, 0): "sm_80", (8, 6): "sm_89", (9, 0): "sm_90", (12, 0): "sm_120"}
"""The oldest compute capability of each target; 8.6 has the shared memory of 8.9."""

TARGETS = (*NVIDIA.values(), "gfx942", "gfx1100")


@lru_cache
def target_of(device: torch.device) -> str:
    """Return the target whose blocks are launched on a device.

    That is the newest target which is not newer than an NVIDIA GPU, gfx942 for AMD's gfx9, and gfx1100 for
    other GPUs of AMD. The CPU, on which the interpreter runs, has the blocks of sm_80.
    """
    if device.type == "cpu":
        return "sm_80"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx942" if name.startswith("gfx9") else "gfx1100"
    capability = torch.cuda.get_device_capability(device)
    older = [known for known in NVIDIA if known <= capability]
    return NVIDIA[max(older, default=min(NVIDIA))]
