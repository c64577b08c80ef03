"""Files that are written whole or not at all, and read back with errors that name them."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdmil_lib.errors import CheckpointError

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name in its folder, then rename it: it is whole or absent.

    Args:
        path: The file; its folder is made.
        write: Writes the content to the path that it is given, which has the same suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); delete its folder and train again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object; delete its folder and train again")
    return content


def write_table(path: Path, table: "pd.DataFrame") -> None:
    """Write a CSV, whole or not at all."""
    write_whole(path, lambda temporary: table.to_csv(temporary, index=False))


def save_weights(model: "nn.Module", path: Path) -> None:
    """Write a model's parameters and buffers as safetensors."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary))


def load_weights(model: "nn.Module", path: Path) -> None:
    """Read what `save_weights` wrote.

    Raises:
        CheckpointError: The file is missing or damaged, or belongs to a model of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); delete its folder and train again") from error
    except RuntimeError as error:
        raise CheckpointError(f"{path}: weights of another model ({error}); train it again") from error


def weights_digest(model: "nn.Module") -> str:
    """Short hash of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
