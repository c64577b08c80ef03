"""Files that are written whole or not at all."""

import csv
import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdmil_lib.errors import CheckpointError, CohortError, HDMILError

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


def check_output(path: Path, *, folder: bool = False) -> None:
    """Check that a file, or with `folder` a folder, can be made here, before the work for it is done.

    Raises:
        HDMILError: Something else is there, or a part of the path is a file.
    """
    if path.is_dir() if not folder else path.is_file():
        raise HDMILError(f"{path}: is a {'file' if folder else 'folder'} already; choose another name")
    for parent in path.parents:
        if parent.is_dir():
            return
        if parent.exists():
            raise HDMILError(f"{path}: {parent} is a file, no folder; choose another place")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, then rename it, so that it is never incomplete.

    Args:
        path: The file; its folder is created.
        write: Function that writes the content to the path that it gets, which has the suffix of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # some writers create files that only the owner can read
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
        CheckpointError: The file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); delete its folder and train again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object; delete its folder and train again")
    return content


def write_table(path: Path, table: "pd.DataFrame") -> None:
    """Write a CSV file, or a parquet file if its suffix is .parquet, whole or not at all."""
    if path.suffix == ".parquet":
        write_whole(path, lambda temporary: table.to_parquet(temporary, index=False))
    else:
        write_whole(path, lambda temporary: table.to_csv(temporary, index=False))


def read_table(path: Path) -> "pd.DataFrame":
    """Read a CSV file as text: names of columns and values without the blanks around them.

    Columns may be separated by commas, semicolons or tabs, whichever the first line has most of.

    Raises:
        CohortError: The file is missing, empty, a spreadsheet, not in UTF-8, or its lines have different
            numbers of fields.
    """
    import pandas as pd

    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "no such label file" if isinstance(error, FileNotFoundError) else error.strerror
        raise CohortError(f"{path}: {reason}; give a CSV with a header and one row per slide") from error
    if content.startswith(b"PK"):
        raise CohortError(f"{path}: is a spreadsheet; export it as CSV in UTF-8")
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeError as error:
        raise CohortError(f"{path}: is not text in UTF-8 ({error}); save it as CSV in UTF-8") from error
    if "\0" in text or not text.strip():
        what = "is empty" if not text.strip() else "is no text"
        raise CohortError(f"{path}: {what}; give a CSV with a header and one row per slide")
    separator = max(",;\t", key=text.lstrip().splitlines()[0].count)
    try:
        lines = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        header, *rows = [[field.strip() for field in line] for line in lines if any(map(str.strip, line))]
    except csv.Error as error:
        raise CohortError(f"{path}: cannot be read as a table ({error})") from error
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        raise CohortError(f"{path}: the column {repeated[0]!r} is there more than once; rename one")
    for number, row in enumerate(rows, 1):
        if len(row) > len(header):
            raise CohortError(
                f"{path}: cannot be read as a table (row {number} has {len(row)} fields, the header "
                f"{len(header)}); put texts with a {separator!r} in quotes"
            )
    filled = [row + [""] * (len(header) - len(row)) for row in rows]
    return pd.DataFrame(filled, columns=header, dtype=str).replace("", pd.NA)


def readable(name: str) -> str:
    r"""A file name as text that can be printed and stored: a byte that is not UTF-8 is written as "\xff"."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def save_weights(model: "nn.Module", path: Path) -> None:
    """Write the parameters and buffers of a model as safetensors."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary))


def load_weights(model: "nn.Module", path: Path) -> None:
    """Load the parameters and buffers that `save_weights` wrote.

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
    """Short hash of the parameters and buffers of a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
