"""Which slides of a folder of bags failed before, and why, so that a second run does not try them again."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from hdmil_lib.errors import CheckpointError, HDMILError
from hdmil_lib.schema import Schema, read_schema, to_json
from hdmil_lib.storage import readable, write_json
from hdmil_lib.version import __version__

FOLDER = "failed"
NO_FILE = "0" * 32
"""Fingerprint of a file that is not there or cannot be read."""

REMEDY = "delete it, so that the slide is tried again"

Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Failure(Schema):
    """A slide that could not be extracted; the content of `failed/<slide_id>.json`.

    Attributes:
        format: Version of this record.
        slide_id: Name of the slide.
        path: Its file.
        reason: Why it failed, in one line.
        source: Fingerprint of its file, or `NO_FILE`.
        settings: Digest of the settings with which it was tried, and of the version of hdmil.
    """

    format: Literal[1] = 1
    slide_id: Annotated[str, Field(min_length=1, max_length=1000)]
    path: Annotated[str, Field(max_length=10_000)]
    reason: Annotated[str, Field(max_length=10_000)]
    source: Digest
    settings: Digest


def failure_path(out: Path, slide_id: str) -> Path:
    """The record of a slide in a folder of bags."""
    return out / FOLDER / f"{slide_id}.json"


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Digest of the settings of an extraction and of the version of hdmil."""
    text = json.dumps([__version__, settings], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_failure(path: Path) -> Failure:
    """Read the record of a failed slide.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return read_schema(path, Failure, REMEDY)


def known_reason(out: Path, slide_id: str, source: str | None, settings: str) -> str | None:
    """Why this slide failed before, if neither its file nor the settings have changed since; else None."""
    path = failure_path(out, slide_id)
    if not path.is_file():
        return None
    try:
        failure = read_failure(path)
    except CheckpointError:  # tried again, and then replaced
        return None
    return failure.reason if (failure.source, failure.settings) == (source, settings) else None


def remember(out: Path, slide_id: str, slide: Path, reason: str, source: str, settings: str) -> None:
    """Write the record of a failed slide; without it, where the disk is full, the slide is tried again."""
    failure = Failure(
        slide_id=readable(slide_id)[:1000],
        path=readable(str(slide))[:10_000],
        reason=reason[:10_000],
        source=source,
        settings=settings,
    )
    with suppress(OSError, HDMILError):
        write_json(failure_path(out, slide_id), to_json(failure))


def forget(out: Path, slide_id: str) -> None:
    """Remove the record of a slide, which has its bag now."""
    failure_path(out, slide_id).unlink(missing_ok=True)
