"""Schemas of files that are read back: types, bounds, and no unknown fields."""

from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hdmil_lib.errors import CheckpointError
from hdmil_lib.system_errors import refusal

Kind = TypeVar("Kind", bound="Schema")

MAX_BYTES = 4 * 2**20
"""Size of the largest file that is read; a file that fits its schema is much smaller."""

SHORT = Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 40


class Schema(BaseModel):
    """A frozen record with checked fields; unknown fields and values of another type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def first_problem(error: ValidationError) -> str:
    """The first problem that a schema found, in one line: the field, its value, and what is expected."""
    problem = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(_short(part) for part in problem["loc"]) or "the file"
    shown = SHORT.repr(problem["input"])
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"not JSON ({message.removeprefix('Invalid JSON: ')})"
    if problem["type"] == "missing":
        return f"{place} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{place} is not known"
    return f"{place} is {shown}, expected {message}"


def _short(name: str | int) -> str:
    """The name of a field in one line: those that are not known come from the file."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 40 else SHORT.repr(text)


def read_schema(path: Path, kind: type[Kind], remedy: str) -> Kind:
    """Read a JSON file that must fit a schema.

    Args:
        path: The file.
        kind: Schema of the file.
        remedy: What the user can do if the file does not fit.

    Raises:
        CheckpointError: The file is missing, cannot be read, is not JSON, or does not fit.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path}: has {size:,} bytes, expected at most {MAX_BYTES:,}; {remedy}")
        text = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{path}: {refusal(error)}") from error
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}; {remedy}") from error


def to_json(record: Schema) -> dict[str, Any]:
    """Convert a record to JSON values."""
    return record.model_dump(mode="json")
