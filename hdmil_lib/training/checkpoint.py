"""Files of one training run: weights, the state to resume from, and the configuration both belong to."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hdmil_lib.errors import CheckpointError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name in its folder, then rename it: it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's parameters and buffers as safetensors."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary))


def load_weights(model: nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote.

    Raises:
        CheckpointError: The file is missing or damaged, or belongs to a model of another shape.
    """
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); delete its folder and train again") from error
    except RuntimeError as error:
        raise CheckpointError(f"{path}: weights of another model ({error}); train it again") from error


def weights_digest(model: nn.Module) -> str:
    """Short hash of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def claim_folder(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json`, or check that the one there agrees.

    Raises:
        CheckpointError: The folder holds a run of another configuration; both are named.
    """
    path = folder / "config.json"
    config = json.loads(json.dumps(config))
    if not path.is_file():
        write_json(path, config)
        return
    found = read_json(path)
    differing = [key for key in config if found.get(key) != config[key]]
    if differing:
        theirs, ours = ({key: source.get(key) for key in differing} for source in (found, config))
        raise CheckpointError(
            f"{folder}: holds a run with {theirs}, this one has {ours}; "
            "choose another folder, or delete this one to train again"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); delete its folder and train again") from error


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict]) -> None:
    """Write everything the next epoch depends on: weights, optimizer, torch's generator, history."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    tensors["rng"] = torch.get_rng_state()
    groups = optimizer.state_dict()["param_groups"]
    metadata = {"history": json.dumps(history), "groups": json.dumps(groups)}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
    """Put model, optimizer and torch's generator back where `save_state` left them; returns the history.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            history = json.loads(file.metadata()["history"])
            groups = json.loads(file.metadata()["groups"])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); delete it to start over") from error
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = tensor
    model.load_state_dict({key[6:]: tensor for key, tensor in tensors.items() if key.startswith("model.")})
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    torch.set_rng_state(tensors["rng"])
    return history


def save_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV, whole or not at all."""
    write_whole(path, lambda temporary: table.to_csv(temporary, index=False))
