"""What the operating system refuses, in words: such an error says nothing about the content of a file."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hdmil_lib.errors import HDMILError

Kind = TypeVar("Kind", bound=HDMILError)

_PERMISSION = "there is no permission for it; change that with chmod, or ask its owner"
_CONNECTION = "its file server does not answer; check the network and the mount, then try again"
_REMEDIES = {
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENOENT: "check its path, and whether its disk is mounted",
    errno.EEXIST: "choose another name",
    errno.ENOTDIR: "a part of its path is a file; choose another",
    errno.EROFS: "its disk can only be read; choose another place",
    errno.ENOSPC: "make room or choose another place",
    errno.EDQUOT: "make room or choose another place",
    errno.EISDIR: "name a file in it",
    errno.EMFILE: "close other files of this program, or raise the limit with `ulimit -n`",
    errno.ENFILE: "close other programs, then try again",
    errno.ENOMEM: "close other programs, or use a machine with more memory",
    errno.EIO: "the disk or the network failed; check it, then try again",
    errno.ESTALE: "its network folder has changed; mount it again, then try again",
    errno.ETIMEDOUT: _CONNECTION,
    errno.EHOSTDOWN: _CONNECTION,
    errno.EHOSTUNREACH: _CONNECTION,
    errno.ENETUNREACH: _CONNECTION,
    errno.ENOTCONN: _CONNECTION,
    errno.ECONNRESET: _CONNECTION,
}
_OTHERWISE = "the file may be whole; find the cause, then try again"

_IN_TEXT = re.compile(r"\berrno = (\d+), error message|\(os error (\d+)\)|\[Errno (\d+)\]")
"""The number of an error as HDF5, libraries in Rust, and Python write it into a message."""

_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|bad_alloc", re.IGNORECASE
)


def error_number(error: BaseException) -> int | None:
    """The number of the operating system's error that an exception reports.

    Libraries that read files raise it as an OSError or write it into the message of another exception.

    Args:
        error: Any exception.

    Returns:
        The number, as in `errno`, with ENOMEM for memory that could not be had; None if the exception is
        about something else, such as the content of a file.
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, FileNotFoundError):  # of safetensors, without a number
        return errno.ENOENT
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        return errno.ENOMEM
    found = None if isinstance(error, HDMILError) else _IN_TEXT.search(text)
    return int(next(filter(None, found.groups()))) or None if found else None


def refusal(error: BaseException) -> str | None:
    """Why a file could not be read, and what to do, if that has nothing to do with its content.

    Args:
        error: What reading the file raised.

    Returns:
        The reason in one line, for a message that starts with the file; None if the content is at fault.
    """
    number = error_number(error)
    if number is None:
        return None
    return f"cannot be read ({os.strerror(number)}); {_REMEDIES.get(number, _OTHERWISE)}"


def in_words(error: HDMILError | OSError) -> str:
    """The message of an error for a user, in one line that says what to do.

    Args:
        error: An error of ours, whose message is such a line, or one of the system.

    Returns:
        The file, the reason of the system and a remedy; the error's own text where it has no number.
    """
    if isinstance(error, HDMILError) or not error.errno:
        return str(error)
    place = f"{error.filename}: " if error.filename is not None else ""
    return (
        f"{place}{os.strerror(error.errno)}; {_REMEDIES.get(error.errno, 'find the cause, then try again')}"
    )


def read_error(kind: Callable[[str], Kind], path: Path, error: BaseException, damage: str) -> Kind:
    """The error to raise where a file could not be read.

    Only an error about the content of the file may propose to delete it.

    Args:
        kind: Class of the error.
        path: The file.
        error: What reading it raised.
        damage: What is wrong with the file and what to do, for an error about its content.

    Returns:
        The error: with the operating system's reason if it refused, else with `damage`.
    """
    refused = refusal(error) or refusal_of_file(path)
    return kind(f"{path}: {refused or damage}")


def refusal_of_file(path: Path) -> str | None:
    """Find out whether a file can be read from start to end, for libraries that hide the system's errors.

    Args:
        path: The file.

    Returns:
        Why it cannot, and what to do; None if it can.
    """
    try:
        check_readable(path)
    except (OSError, MemoryError) as error:
        return refusal(error)
    return None


def check_readable(path: Path) -> None:
    """Read a file once, before a library maps it into memory: there, a failing disk would end the process.

    Args:
        path: The file.

    Raises:
        OSError: The operating system refuses it.
    """
    with path.open("rb", buffering=0) as file:
        while file.read(2**20):
            pass


def is_refused(error: BaseException) -> bool:
    """Whether an error, or the one that it came from, is the system refusing a file that is there."""
    found = (error_number(each) for each in (error, error.__cause__) if each is not None)
    return any(number not in (None, errno.ENOENT) for number in found)
