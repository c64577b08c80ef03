"""Downloads that go on where they stopped: ranges, waiting for a server that is busy, checksums."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import BinaryIO, Literal, TypeVar

import requests

from hdmil_lib.errors import CohortError

T = TypeVar("T")
Checked = Literal["md5", "etag", "size"]
"""How the content of a file was checked: by its MD5 sum, that of its parts, or by its length alone."""

BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Answers of a server after which trying again is worth while."""

MIB = 2**20
PART_SIZES = tuple(MIB * n for n in (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 150, 256, 512, 1024))
"""Sizes of the parts in which the usual programs upload large files to a bucket."""

LONGEST_PAUSE = 60.0
"""Longest pause between two tries in seconds, whatever a server asks for."""

CHUNK = 2**16
"""Bytes that are read at a time: so many are lost at most where a connection ends."""

LARGEST_DOCUMENT = 256 * MIB
"""Largest list or table that is read into memory."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    Attributes:
        url: Its address.
        size: Its length in bytes.
        etag: What a bucket says of its content: an MD5 sum, or that of the MD5 sums of its parts followed by
            a dash and their number.
        md5: Its MD5 sum, where its authors publish one.
    """

    url: str
    size: int
    etag: str = ""
    md5: str = ""


class _Passing(Exception):
    """A failure that may be gone at the next try."""

    def __init__(self, message: str, *, wait: float | None = None, progressed: bool = False):
        super().__init__(message)
        self.wait, self.progressed = wait, progressed


class Stopped(Exception):
    """`Client.stop` was called; what arrived is kept."""


class Client:
    """Reads documents and downloads files, and tries again after failures that may pass."""

    def __init__(
        self, *, attempts: int = 6, pause: float = 1.0, timeout: tuple[float, float] = (15.0, 60.0)
    ) -> None:
        """Prepare a client.

        Args:
            attempts: Number of failures in a row after which it gives up. A try that brought bytes is none.
            pause: Seconds before the second try, doubled before each further one, up to a minute.
            timeout: Seconds to wait for a connection, and for further bytes.
        """
        self._attempts, self._pause, self._timeout = attempts, pause, timeout
        self._stopped = Event()

    def stop(self) -> None:
        """End the downloads of all threads; each raises `Stopped` at its next bytes."""
        self._stopped.set()

    def read(self, url: str, params: dict[str, str] | None = None) -> bytes:
        """Read a small document into memory.

        Args:
            url: Its address.
            params: Parameters that are added to the address.

        Raises:
            CohortError: The server cannot be reached or has no such document.
        """

        def once() -> bytes:
            with self._get(url, params=params) as response:
                content = b""
                for chunk in _chunks(response):
                    content += chunk
                    if len(content) > LARGEST_DOCUMENT:
                        raise CohortError(f"{url}: is larger than {LARGEST_DOCUMENT // MIB} MiB, so no list")
                return content

        return self._patiently(url, once, min(self._attempts, 4))

    def download(
        self, remote: RemoteFile, path: Path, report: Callable[[int], object] = lambda n: None
    ) -> Checked:
        """Download a file; it appears under its name when it is whole and its content is checked.

        What arrives is kept in `<name>.part` beside it, from which an interrupted download goes on. Content
        with a wrong checksum is fetched once more.

        Args:
            remote: The file.
            path: Where it is to be.
            report: Function that gets the number of bytes that arrived, negative where bytes are discarded.

        Returns:
            How its content was checked.

        Raises:
            CohortError: The server does not give the file, or the content is wrong twice.
            OSError: The file cannot be written.
        """
        part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            self._patiently(remote.url, lambda: self._go_on(remote, part, report), self._attempts)
            checked = check_content(part, remote)
            if checked is not None:
                os.replace(part, path)
                return checked
            _discard(part, report)
        raise CohortError(
            f"{remote.url}: the content has another checksum than the list says, twice; try again later"
        )

    def _go_on(self, remote: RemoteFile, part: Path, report: Callable[[int], object]) -> None:
        """Fetch the bytes that are missing in `part`.

        Raises:
            _Passing: The connection ended before the last byte, or the server sent something else.
        """
        start = part.stat().st_size if part.is_file() else 0
        if start > remote.size:
            _discard(part, report)
            start = 0
        if start == remote.size and part.is_file():
            return
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-"} | (
                {"If-Range": f'"{remote.etag}"'} if remote.etag else {}
            )
        with self._get(remote.url, headers=headers) as response:
            if response.status_code == 416:
                _discard(part, report)
                raise _Passing("the server refuses to go on from where the download stopped")
            if start and response.status_code == 206:
                if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    _discard(part, report)
                    raise _Passing("the server sent another range than was asked for")
            elif start:  # the server sends the whole file
                _discard(part, report)
                start = 0
            have = self._append(response, part, start, remote, report)
        if have < remote.size:
            raise _Passing(f"{have:,} of {remote.size:,} bytes arrived", progressed=have > start)

    def _append(
        self,
        response: requests.Response,
        part: Path,
        start: int,
        remote: RemoteFile,
        report: Callable[[int], object],
    ) -> int:
        """Write what arrives behind the first `start` bytes of `part`; returns its length then."""
        have = start
        with part.open("ab" if start else "wb") as file:
            try:
                for chunk in _chunks(response):
                    _write(file, chunk, part)
                    have += len(chunk)
                    report(len(chunk))
                    if self._stopped.is_set():
                        raise Stopped
                    if have > remote.size:
                        break
            except _Passing as error:
                raise _Passing(str(error), progressed=have > start) from error
        if have > remote.size:
            _discard(part, report)
            raise _Passing(f"more bytes arrived than the {remote.size:,} of the list")
        return have

    def _get(
        self, url: str, *, params: dict[str, str] | None = None, headers: dict[str, str] | None = None
    ) -> requests.Response:
        """Ask for an address.

        Raises:
            CohortError: The server says that it will not answer, whenever it is asked.
            _Passing: It may answer later.
        """
        try:
            response = requests.get(url, params=params, headers=headers, stream=True, timeout=self._timeout)
        except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
            raise CohortError(f"{url}: cannot be reached ({_reason(error)})") from error
        except requests.RequestException as error:
            raise _Passing(_reason(error)) from error
        if response.status_code < 400 or response.status_code == 416:
            return response
        response.close()
        says = f"the server says {response.status_code} {response.reason}".rstrip()
        if response.status_code in BUSY:
            raise _Passing(says, wait=_seconds(response.headers.get("Retry-After")))
        raise CohortError(f"{url}: cannot be downloaded ({says})")

    def _patiently(self, url: str, action: Callable[[], T], attempts: int) -> T:
        """Do something until it succeeds or has failed too often in a row."""
        failures = 0
        while True:
            try:
                return action()
            except _Passing as error:
                failures = 1 if error.progressed else failures + 1
                if failures >= attempts:
                    raise CohortError(
                        f"{url}: cannot be downloaded ({error}); try again later, what is here is kept"
                    ) from error
                wait = self._pause * 2 ** (failures - 1) if error.wait is None else error.wait
                if self._stopped.wait(min(wait, LONGEST_PAUSE)):
                    raise Stopped from error


def check_content(path: Path, remote: RemoteFile) -> Checked | None:
    """Compare a file with what its server says of it.

    Args:
        path: The file.
        remote: What it is to be.

    Returns:
        How it was compared, or None if it is another content. A file that was uploaded in parts of an unusual
        size can be compared by its length alone.
    """
    if path.stat().st_size != remote.size:
        return None
    if remote.md5:
        return "md5" if _md5(path) == remote.md5.lower() else None
    digest, _, count = remote.etag.lower().partition("-")
    if len(digest) != 32:
        return "size"
    if not count:
        return "etag" if _md5(path) == digest else None
    n_parts = int(count) if count.isdecimal() else 0
    fitting = [size for size in PART_SIZES if -(-remote.size // size) == n_parts]
    return "etag" if any(_md5_of_parts(path, size) == digest for size in fitting) else "size"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5_of_parts(path: Path, size: int) -> str:
    digests = b""
    with path.open("rb") as file:
        while chunk := file.read(size):
            digests += hashlib.md5(chunk, usedforsecurity=False).digest()
    return hashlib.md5(digests, usedforsecurity=False).hexdigest()


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """The content of an answer, piece by piece.

    Raises:
        _Passing: The connection ended early.
    """
    try:
        yield from response.iter_content(CHUNK)
    except requests.RequestException as error:
        raise _Passing(_reason(error)) from error


def _write(file: BinaryIO, chunk: bytes, part: Path) -> None:
    """Write bytes at once.

    Raises:
        OSError: They cannot be written; it names the file.
    """
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(part)) from error


def _discard(part: Path, report: Callable[[int], object]) -> None:
    with suppress(FileNotFoundError):
        report(-part.stat().st_size)
        part.unlink()


def _reason(error: Exception) -> str:
    """The innermost reason of an error of requests, in a few words."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(getattr(error, "reason", None) or (error.args[0] if error.args else ""))
    return re.sub(r"^<?\w+\(.*?\)>?: ", "", text) or type(error).__name__


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after and retry_after.isdecimal() else None
