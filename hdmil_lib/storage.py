"""Files that are written whole or not at all."""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import re
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdmil_lib.errors import CheckpointError, CohortError, HDMILError
from hdmil_lib.system_errors import check_readable, read_error, refusal

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


TEMPORARY = re.compile(r"\.hdmil-[0-9a-f]{12}(\.\w+)?")
"""Names of files that are being written, or were when their process was killed."""

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that end a line or that a terminal obeys."""

_SEPARATOR_LINE = re.compile(r"sep=[,;\t][,;\t ]*[\r\n]+", re.IGNORECASE)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a disk, a quota or a file that can hold no more."""

YOUNG, OLD = 60.0, 86_400.0
"""Seconds: a temporary file modified less than YOUNG ago is not judged; one of OLD is stale without locks."""


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, then rename it, so that it is never incomplete.

    The content has reached the disk before the file gets its name, so that a power failure leaves the old
    file or the new one.

    Args:
        path: The file; its folder is created.
        write: Function that writes the content to the path that it gets, which has the suffix of `path`.

    Raises:
        HDMILError: The disk is full.
    """
    temporary = path.with_name(f".hdmil-{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        with needs_room(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _held(temporary):
                write(temporary)
                temporary.chmod(0o666 & ~_umask())  # some writers create files that only the owner can read
                _sync(temporary)
                os.replace(temporary, path)
            with suppress(OSError):  # some file systems do not allow it for folders
                _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def needs_room(path: Path) -> Iterator[None]:
    """Within the block, in which a file is written, a full disk becomes an error that says what to do.

    Args:
        path: The file or folder that is written, for the message.

    Raises:
        HDMILError: The disk, or a quota, is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise HDMILError(
            f"{path}: cannot be written ({os.strerror(error.errno)}); make room or choose another place, and "
            "start again: what is finished is kept"
        ) from error


def remove_stale(folder: Path) -> list[Path]:
    """Remove temporary files that killed processes left in a folder, not those of processes that live.

    A process locks the file that it writes. Where the file system has no locks, files are removed that nobody
    has written to for a day.

    Returns:
        The files that were removed.
    """
    stale = [path for path in folder.glob(".hdmil-*") if TEMPORARY.fullmatch(path.name) and _is_stale(path)]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def _is_stale(path: Path) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
        if age < YOUNG or path.is_dir():
            return False
        with path.open("r+b") as file:
            return _lock(file.fileno()) or age > OLD
    except OSError:  # it is gone, or belongs to somebody else
        return False


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Create a file and keep it locked while it is written."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file; returns whether it was possible.

    Such a lock belongs to this opening of the file: it ends when that is closed, or with the process, and not
    when the process closes the file that it opened elsewhere.
    """
    command = getattr(fcntl, "F_OFD_SETLK", None)
    if command is None:  # not on Linux
        return False
    try:
        fcntl.fcntl(descriptor, command, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return False
    return True


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        CheckpointError: The file is missing, cannot be read or is damaged.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, MemoryError, ValueError, RecursionError) as error:
        damage = f"unreadable ({error}); delete its folder and train again"
        raise read_error(CheckpointError, path, error, damage) from error
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

    Columns may be separated by commas, semicolons or tabs, whichever the first line has most of. A first line
    "sep=;", as some spreadsheets write it, is passed over.

    Raises:
        CohortError: The file is missing, cannot be read, is empty, a spreadsheet, not in UTF-8, or its lines
            have different numbers of fields.
    """
    import pandas as pd

    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CohortError(
            f"{path}: no such label file; give a CSV with a header and one row per slide"
        ) from error
    except (OSError, MemoryError) as error:
        raise CohortError(f"{path}: {refusal(error)}") from error
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
    text = _SEPARATOR_LINE.sub("", text.lstrip())
    separator = max(",;\t", key=next(iter(text.splitlines()), "").count)
    try:
        lines = csv.reader(io.StringIO(text, newline=None), delimiter=separator, skipinitialspace=True)
        filled = [[field.strip() for field in line] for line in lines if any(map(str.strip, line))]
    except csv.Error as error:
        raise CohortError(f"{path}: cannot be read as a table ({error})") from error
    if not filled:
        raise CohortError(f"{path}: is empty; give a CSV with a header and one row per slide")
    for number, line in enumerate(filled):
        if odd := [field for field in line if CONTROL.search(field)]:
            where = f"row {number}" if number else "the header"
            raise CohortError(f"{path}: {where} holds control characters, {odd[0][:40]!r}; remove them")
    header, *rows = filled
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
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    content = save(tensors, {"digest": weights_digest(model)})
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def load_weights(model: "nn.Module", path: Path) -> None:
    """Load the parameters and buffers that `save_weights` wrote.

    Raises:
        CheckpointError: The file is missing, cannot be read or is damaged, or belongs to a model of another
            shape.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        check_readable(path)
        model.load_state_dict(load_file(path))
        with safe_open(path, framework="pt") as file:
            wanted = (file.metadata() or {}).get("digest")
    except (OSError, MemoryError, SafetensorError) as error:
        damage = f"unreadable ({error}); delete its folder and train again"
        raise read_error(CheckpointError, path, error, damage) from error
    except RuntimeError as error:
        damage = f"weights of another model ({' '.join(str(error).split())}); train it again"
        raise read_error(CheckpointError, path, error, damage) from error
    if wanted not in (None, weights_digest(model)):
        raise CheckpointError(f"{path}: was changed or damaged; delete its folder and train again")


def loading_problem(error: Exception) -> str:
    """What is wrong with a file that `torch.load` refused, in one line that a terminal can print.

    For files that hold more than tensors, its own message advises to execute what is in them.
    """
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds other things than tensors"
    return CONTROL.sub(" ", (str(error).splitlines() or [type(error).__name__])[0])


def weights_digest(model: "nn.Module") -> str:
    """Short hash of the parameters and buffers of a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
