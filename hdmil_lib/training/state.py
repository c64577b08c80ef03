"""Files of a training run: its configuration, and the state from which it resumes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hdmil_lib.errors import CheckpointError
from hdmil_lib.storage import read_json, write_json, write_whole
from hdmil_lib.system_errors import check_readable, read_error

_FAILURES = (
    OSError,
    MemoryError,
    SafetensorError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
)
"""What loading a state that is damaged or cannot be read raises."""


def claim_folder(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json`, or check that the existing one agrees.

    Raises:
        CheckpointError: The folder holds a run of another configuration.
    """
    path = folder / "config.json"
    config = json.loads(json.dumps(config))
    if not path.is_file():
        write_json(path, config)
        return
    found = read_json(path)
    theirs, ours = dict(_settings(found)), dict(_settings(config))
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    if any(found.get(key) != config[key] for key in config):
        shown = ", ".join(f"{name} {theirs.get(name)}, not {ours[name]}" for name in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise CheckpointError(
            f"{folder}: holds a run with {shown or 'other settings'}{more}; choose another folder, or delete "
            "this one to train again"
        )


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a configuration with their places in it, such as ("recipe.training.epochs", 20)."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict]) -> None:
    """Write everything that the next epoch depends on: weights, optimizer, torch's generators, history."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    tensors["rng"] = torch.get_rng_state()
    if gpu := _gpu_of(model):
        tensors["rng_gpu"] = torch.cuda.get_rng_state(gpu)
    groups = optimizer.state_dict()["param_groups"]
    metadata = {"history": json.dumps(history), "groups": json.dumps(groups)}
    content = save(tensors, metadata)
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
    """Restore model, optimizer and torch's generator from `save_state`.

    Returns:
        The history.

    Raises:
        CheckpointError: The file cannot be read or is damaged.
    """
    try:
        check_readable(path)
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            history = json.loads(file.metadata()["history"])
            groups = json.loads(file.metadata()["groups"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = tensor
        model.load_state_dict(
            {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
        )
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        torch.set_rng_state(tensors["rng"])
        if (gpu := _gpu_of(model)) and "rng_gpu" in tensors:
            torch.cuda.set_rng_state(tensors["rng_gpu"], gpu)
    except _FAILURES as error:
        damage = f"unreadable ({' '.join(str(error).split())[:300]}); delete it to start over"
        raise read_error(CheckpointError, path, error, damage) from error
    return history


def _gpu_of(model: nn.Module) -> torch.device | None:
    """The GPU whose generator draws the dropout of a model."""
    device = next(model.parameters()).device
    return device if device.type == "cuda" else None
