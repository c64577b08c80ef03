"""Devices by name: the one place that asks what hardware there is."""

import torch

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


def _absent(device: str | torch.device) -> HDMILError:
    present = ["cpu"]
    if torch.cuda.is_available():
        present += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        present.append("mps")
    return HDMILError(f"There is no device {str(device)!r} here. Use 'auto' or one of: {', '.join(present)}.")
