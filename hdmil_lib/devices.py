"""Devices by name: the one place that asks what hardware there is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdmil_lib.errors import HDMILError


def resolve(device: str | torch.device = "auto") -> torch.device:
    """The device of a name, checked to be there.

    Args:
        device: "auto" (the first CUDA GPU if there is one, else the CPU), "cpu", "cuda", "cuda:1", "mps" or a
            `torch.device`. GPUs of ROCm are called "cuda" too, as in PyTorch. "mps" is used only when named.

    Returns:
        A device whose index is given if it is a GPU.

    Raises:
        HDMILError: There is no such device on this machine; the message lists those that there are.
    """
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise _absent(device) from None
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if wanted.index is None else wanted.index
        if index < torch.cuda.device_count():
            return torch.device("cuda", index)
    if wanted.type == "mps" and torch.backends.mps.is_available() and not wanted.index:
        return torch.device("mps")
    raise _absent(device)


def resolve_all(device: str | torch.device | Sequence[str | torch.device] = "auto") -> list[torch.device]:
    """The devices among which slides or folds are shared.

    Args:
        device: "auto" (all CUDA GPUs if there are any, else the CPU), one device, several, or several in one
            string such as "cuda:0,cuda:1".

    Raises:
        HDMILError: A device is not there, or none is named.
    """
    if isinstance(device, str):
        if device == "auto" and torch.cuda.is_available():
            return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        device = device.split(",")
    names = [device] if isinstance(device, torch.device) else list(device)
    if not names:
        raise _absent("")
    return list(dict.fromkeys(resolve(name.strip() if isinstance(name, str) else name) for name in names))


def prefer(device: str | torch.device, current: torch.device) -> torch.device:
    """The device of a name, where "auto" is the current one if that is a GPU.

    Raises:
        HDMILError: There is no such device.
    """
    return current if device == "auto" and current.type != "cpu" else resolve(device)


def widest(device: torch.device) -> torch.dtype:
    """The floating type of most digits on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def name(device: torch.device) -> str:
    """Name of the hardware of a device, for a record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_memory(gpu: torch.device) -> int:
    """Number of bytes that are free on a CUDA GPU."""
    return torch.cuda.mem_get_info(gpu)[0]


def pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, from which a GPU is filled without waiting; if that fails, the tensor."""
    try:
        return tensor.pin_memory()
    except RuntimeError:  # the system allows no more
        return tensor


def _absent(device: str | torch.device) -> HDMILError:
    present = ["cpu"]
    if torch.cuda.is_available():
        present += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        present.append("mps")
    return HDMILError(f"There is no device {str(device)!r} here. Use 'auto' or one of: {', '.join(present)}.")
