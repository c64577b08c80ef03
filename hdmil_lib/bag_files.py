"""HDF5 files of bags: opened, measured and read so that no file can harm, and faults are told from damage."""

import errno
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hdmil_lib.errors import BagError
from hdmil_lib.memory import free_memory, size_in_words
from hdmil_lib.system_errors import error_number, refusal, refusal_of_file

DIGEST, ATTRS_DIGEST = "sha256", "attrs_sha256"
"""Attributes with SHA-256: of a data set's values, and of all other attributes and digests of the file."""
PATCH_SIZE = 16
LOOK = "look_"
"""Prefix of the data sets with features of coarser looks; their side in pixels follows."""
MAX_CELLS = 2**22
"""Largest number of tiles of a grid: 2,048 x 2,048 tiles of 128 um are 26 cm wide, more than any slide."""
MAX_WIDTH = 65_536
"""Largest width of features, as of the networks that take them."""
FORMAT = ("v110", "v110")
"""Format of HDF5 1.10: its metadata have checksums, without which damage can crash the library."""
MAX_RATIO = 1200
"""Largest ratio of the bytes of a data set to those that it takes in the file; gzip reaches a thousand."""
TRIDENT_ATTRS = (
    "patch_size",
    "patch_size_level0",
    "level0_magnification",
    "target_magnification",
    "overlap",
    "name",
    "level0_width",
    "level0_height",
)
"""Attributes that TRIDENT stores on the dataset `coords`; all others are attributes of the file."""

REMEDY = "Delete the file and extract the slide again."
FOREIGN = "Another tool may have made it: give the folder that `hdmil extract` wrote, or extract the slide."
_NO_LOCKS = "its file system has no locks; set the environment variable HDF5_USE_FILE_LOCKING=FALSE"
_LOCKED = {
    errno.EAGAIN: "another program has it open for writing; wait until it is done",
    errno.ENOLCK: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
}
"""Why HDF5, which locks what it reads, does not open a healthy file, by the number of the error."""


@contextmanager
def open_bag(path: Path) -> Iterator[h5py.File]:
    """Open a bag; whatever h5py raises while it is read becomes a BagError.

    Where the operating system refused to read the file, the error says so: the file is not called damaged.

    Raises:
        BagError: The file is missing, damaged, or cannot be read.
    """
    try:
        there = path.is_file()
    except OSError as error:
        raise BagError(f"{path}: {refusal(error)}.") from error
    if not there:
        raise BagError(f"{path}: no such bag. Extract its slide first (`hdmil extract`).")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except Exception as error:  # a damaged file can end in any of h5py's errors
        explained = _explained(path, error)
        if explained is error:
            raise
        raise explained from error


def _explained(path: Path, error: Exception) -> BagError:
    """What an error means that came while a bag was read.

    HDF5 hides some errors of the system: a directory that could not be read looks like one without data sets.
    So the file is read once more before it is called damaged or foreign.
    """
    if isinstance(error, BagError) and isinstance(error.__cause__, MemoryError):
        return error
    reason = _LOCKED.get(error_number(error) or 0) or refusal(error) or refusal_of_file(path)
    if reason is not None:
        return BagError(f"{path}: {reason}.")
    if isinstance(error, BagError):
        return error
    return BagError(f"{path}: damaged or not HDF5 ({_line(error)}). {REMEDY}")


def read_data(path: Path, file: h5py.File, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read data sets after all of them were checked and found to fit into memory together.

    Args:
        path: The file, for messages.
        file: The same, opened.
        names: Names of the data sets.

    Returns:
        Their values by name.

    Raises:
        BagError: One is missing, is no array of numbers in the file itself, does not agree with its digest,
            or they take more memory than is free.
    """
    names = list(names)
    if missing := [name for name in names if name not in file]:
        raise BagError(f"{path}: lacks {', '.join(missing)}. {FOREIGN}")
    found = {name: _dataset(path, file, name) for name in names}
    _check_memory(path, found.values())
    return {name: _values(path, file, data) for name, data in found.items()}


def check_layout(path: Path, file: h5py.File, names: Iterable[str]) -> None:
    """Check, before anything is read, that data sets describe the same tiles and not more than a slide has.

    Args:
        path: The file, for messages.
        file: The same, opened.
        names: Names of the data sets; those that are missing are passed over.

    Raises:
        BagError: Their shapes do not fit together, or no slide has so many tiles.
    """
    found = {name: _dataset(path, file, name) for name in names if name in file}
    check_shapes(path, {name: data.shape for name, data in found.items()})


def check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that arrays have the shapes of a bag, with the same number of tiles, and sizes that can be.

    Args:
        path: The file, for messages.
        shapes: Shapes by name of the data set.

    Raises:
        BagError: They do not, or features are wider, or tiles more, than any.
    """
    n = next(iter(shapes.values()), ())[:1]
    fits = n not in ((), (0,)) and all(_fits(name, shape, n) for name, shape in shapes.items())
    if not fits:
        shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise BagError(f"{path}: arrays do not describe the same tiles: {shown}. {REMEDY}")
    if n[0] > MAX_CELLS:
        raise BagError(f"{path}: no slide has {n[0]:,} tiles, more than {MAX_CELLS:,}. {REMEDY}")
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] > MAX_WIDTH:
            raise BagError(f"{path}: {name} are {shape[1]:,} wide, more than {MAX_WIDTH:,}. {REMEDY}")


def _fits(name: str, shape: tuple[int, ...], n: tuple[int, ...]) -> bool:
    """Whether the shape is that of a data set of this name with n tiles."""
    if name in ("coords", "rowcol"):
        return shape == (*n, 2)
    if name == "patches":
        return shape == (*n, PATCH_SIZE, PATCH_SIZE, 3)
    return shape == n if name == "tile_labels" else len(shape) == 2 and shape[:1] == n and shape[1] > 0


def write_attribute(owner: h5py.HLObject, name: str, value: Any) -> None:
    """Write an attribute; text lies in its header, which has a checksum, and not in a heap without one.

    `name` is read by other tools, which expect text of variable length.

    Args:
        owner: The file or data set, opened for writing.
        name: Name of the attribute.
        value: Text, a number, or an array.
    """
    if not isinstance(value, str) or name == "name" or not value or value.endswith("\0"):
        owner.attrs[name] = value
        return
    text = value.encode()
    owner.attrs.create(name, np.bytes_(text), dtype=h5py.string_dtype("utf-8", len(text)))


def look_names(path: Path, file: h5py.File) -> list[str]:
    """Names of the data sets of looks.

    Raises:
        BagError: A name says no side in pixels.
    """
    names = [name for name in file if name.startswith(LOOK)]
    odd = [name for name in names if not name.removeprefix(LOOK).isdecimal()]
    if odd:
        raise BagError(f"{path}: holds {odd[0]!r}, which is no look. {FOREIGN}")
    return names


def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """An array of numbers that lies in the file itself; nothing of it is read."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise BagError(f"{path}: {name} is a link to elsewhere, which is not followed. {FOREIGN}")
    data = file[name]
    if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "fiu" or data.ndim == 0:
        raise BagError(f"{path}: {name} is no array of numbers. {FOREIGN}")
    if data.external or data.is_virtual:
        raise BagError(f"{path}: {name} lies in other files, which are not read. {FOREIGN}")
    if data.nbytes > max(data.id.get_storage_size(), 1024) * MAX_RATIO:
        raise BagError(f"{path}: {name} declares {data.nbytes:,} bytes that the file does not have. {REMEDY}")
    return data


def _check_memory(path: Path, found: Iterable[h5py.Dataset]) -> None:
    """Compare what data sets take in memory with what is free: their values, and a chunk being unpacked."""
    found = list(found)
    chunks = (int(np.prod(data.chunks)) * data.dtype.itemsize for data in found if data.chunks)
    needed = sum(data.nbytes for data in found) + 2 * max(chunks, default=0)
    free = free_memory()
    if free is not None and needed > free:
        raise BagError(
            f"{path}: needs {size_in_words(needed)} of memory, {size_in_words(free)} are free; close other "
            "programs, or use a machine with more memory."
        ) from MemoryError()


def _values(path: Path, file: h5py.File, data: h5py.Dataset) -> np.ndarray:
    """Read an array and compare it with its digest."""
    name = data.name.removeprefix("/")
    try:
        values = data[()]
    except MemoryError as error:
        raise BagError(
            f"{path}: {name} needs {size_in_words(data.nbytes)} of memory, more than there is; close other "
            "programs, or use a machine with more memory."
        ) from error
    wanted = _plain(data.attrs.get(DIGEST))
    if wanted is None and _has_digests(file):
        raise BagError(f"{path}: the digest of {name} is missing. {REMEDY}")
    if wanted is not None and wanted != digest_of(values):
        raise BagError(f"{path}: {name} was changed or damaged after it was written. {REMEDY}")
    return values


def _has_digests(file: h5py.File) -> bool:
    return int(file.attrs.get("schema_version", 0)) >= 3


def digest_of(values: np.ndarray) -> str:
    """SHA-256 of the type, shape and content of an array; an array in one piece is not copied."""
    digest = hashlib.sha256(f"{values.dtype.str} {values.shape}".encode())
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def attributes(file: h5py.File) -> dict[str, Any]:
    """Attributes of the data set `coords` and of the file, without digests, as Python's types."""
    coords = file["coords"].attrs if "coords" in file else {}
    pairs = (*coords.items(), *file.attrs.items())
    return {key: _plain(value) for key, value in pairs if key not in (DIGEST, ATTRS_DIGEST)}


def checked_attributes(path: Path, file: h5py.File) -> dict[str, Any]:
    """The attributes, which must agree with their digest.

    Raises:
        BagError: They do not, or the digest is missing.
    """
    attrs, wanted = attributes(file), _plain(file.attrs.get(ATTRS_DIGEST))
    if wanted is None and _has_digests(file):
        raise BagError(f"{path}: the digest of its attributes is missing. {REMEDY}")
    if wanted is not None and wanted != attributes_digest(file):
        raise BagError(f"{path}: was changed or damaged after it was written. {REMEDY}")
    return attrs


def attributes_digest(file: h5py.File) -> str:
    """SHA-256 of the attributes and of the digests of the data sets, so that none can be missing."""
    content = {key: np.asarray(value).tolist() for key, value in attributes(file).items()}
    own = [name for name in file if isinstance(file.get(name, getlink=True), h5py.HardLink)]
    digests = {name: _plain(file[name].attrs[DIGEST]) for name in own if DIGEST in file[name].attrs}
    text = json.dumps([content, digests], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar, as h5py returns it, to the Python type; bytes are text."""
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode(errors="replace") if isinstance(value, bytes) else value
