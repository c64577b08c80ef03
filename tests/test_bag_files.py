"""Files of bags: what the system refuses is no damage, and sizes are checked before anything is read."""

import errno
import os
import re
import resource
import subprocess
import sys
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shutil import which

import h5py
import numpy as np
import pytest
from bag_factory import make_bag

from hdmil_lib.bags import bag_info, read_bag, read_tile_labels, write_bag
from hdmil_lib.errors import BagError


def full_bag(path: Path) -> Path:
    """A bag of five tiles with all kinds of data sets."""
    write_bag(path, replace(make_bag("a", 1, 5, dim=8), looks={64: np.ones((5, 3), np.float16)}), np.zeros(5))
    return path


# Faults of the system


REFUSED = {
    errno.EAGAIN: "has it open",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENOLCK: "has no locks",
    errno.EIO: "the disk or the network failed",
    errno.ENOMEM: "more memory",
    errno.EMFILE: "ulimit -n",
    errno.ENFILE: "Too many open files in system",
    errno.ESTALE: "mount it again",
    errno.ETIMEDOUT: "file server does not answer",
    errno.ENOTCONN: "file server does not answer",
    errno.EBUSY: "Device or resource busy",
}


@pytest.mark.parametrize("number", REFUSED, ids=errno.errorcode.get)
def test_a_bag_that_the_system_refuses_to_open_is_not_called_damaged(tmp_path, monkeypatch, number):
    full_bag(tmp_path / "a.h5")

    def refuse(*arguments):
        raise OSError(number, "refused")

    monkeypatch.setattr(h5py, "File", refuse)
    for read in (read_bag, bag_info, read_tile_labels):
        with pytest.raises(BagError, match=REFUSED[number]) as caught:
            read(tmp_path / "a.h5")
        check_keeps_the_file(caught.value)


def check_keeps_the_file(error: BagError) -> None:
    """The message is one line and neither calls the file damaged nor proposes to delete it."""
    assert len(str(error).splitlines()) == 1
    for word in ("delete", "damaged", "extract", "another tool"):
        assert word not in str(error).lower()


FAULTY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(int file, off_t place, size_t size) {
    char link[64], name[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0) return 0;
    name[length] = 0;
    if (!strstr(name, "/faulty.h5")) return 0;
    errno = atoi(getenv("FAULT"));
    return place + (off_t)size > atol(getenv("FAULT_FROM")) && place < atol(getenv("FAULT_TO"));
}

ssize_t pread64(int file, void *to, size_t size, off_t place) {
    ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread64");
    return fails(file, place, size) ? -1 : real(file, to, size, place);
}

ssize_t pread(int file, void *to, size_t size, off_t place) { return pread64(file, to, size, place); }

ssize_t read(int file, void *to, size_t size) {
    ssize_t (*real)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    return fails(file, lseek(file, 0, SEEK_CUR), size) ? -1 : real(file, to, size);
}
"""
"""A library in front of the C library in which reading one place of the file faulty.h5 fails."""

READ_FAULTY = """
import os, sys
from hdmil_lib.bags import bag_info, read_bag, read_tile_labels
from hdmil_lib.errors import BagError

size = os.path.getsize(sys.argv[1])
for start in range(0, size, size // 60):
    os.environ["FAULT_FROM"], os.environ["FAULT_TO"] = str(start), str(start + size // 60)
    for read in (read_bag, bag_info, read_tile_labels):
        try:
            read(sys.argv[1])
            print("read")
        except BagError as error:
            print(error)
"""


@pytest.mark.skipif(which("gcc") is None or sys.platform != "linux", reason="needs gcc, on Linux")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_a_disk_that_fails_anywhere_in_a_bag_does_not_make_it_damaged(tmp_path, number):
    """Also where HDF5 hides the error, as in its directories."""
    full_bag(tmp_path / "faulty.h5")
    (tmp_path / "faulty.c").write_text(FAULTY)
    library = tmp_path / "faulty.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "faulty.c", "-ldl"], check=True)
    faults = {"LD_PRELOAD": str(library), "FAULT": str(number), "FAULT_FROM": "0", "FAULT_TO": "0"}
    command = [sys.executable, "-c", READ_FAULTY, tmp_path / "faulty.h5"]
    printed = subprocess.run(command, env=os.environ | faults, capture_output=True, text=True, check=True)
    refused = [line for line in printed.stdout.splitlines() if line != "read"]
    assert len(refused) > 60
    for line in refused:
        assert line.startswith(f"{tmp_path / 'faulty.h5'}: cannot be read ({os.strerror(number)}); ")
        check_keeps_the_file(line.removeprefix(str(tmp_path)))


@pytest.mark.parametrize("length", [0, 3, 700, 5000])
def test_a_truncated_bag_is_damaged(tmp_path, length):
    path = full_bag(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BagError, match=r"damaged or not HDF5 \(.*Delete the file and extract"):
        read_bag(path)


def test_a_bag_for_which_no_file_can_be_opened(tmp_path):
    full_bag(tmp_path / "a.h5")
    kept, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        with suppress(OSError):
            while True:
                kept.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(BagError, match=r"Too many open files.*ulimit -n") as caught:
            read_bag(tmp_path / "a.h5")
    finally:
        for descriptor in kept:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    check_keeps_the_file(caught.value)


# Memory


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> Path:
    """A file of less than a megabyte whose features, all zero, are 400 MB."""
    path = tmp_path_factory.mktemp("compressed") / "zeros.h5"
    with h5py.File(path, "w") as file:
        gzip = dict(compression="gzip", compression_opts=9)
        file.create_dataset("features", (200_000, 1000), np.float16, chunks=(2000, 1000), **gzip)
        chunk = zlib.compress(bytes(2000 * 1000 * 2), 9)
        for row in range(0, 200_000, 2000):
            file["features"].id.write_direct_chunk((row, 0), chunk)
        cells = np.stack(np.divmod(np.arange(200_000), 500), axis=1)
        file.create_dataset("coords", data=cells * 256, **gzip)
    assert path.stat().st_size < 2**20
    return path


def test_a_small_file_with_much_in_it_is_read_only_if_that_fits(compressed, monkeypatch):
    monkeypatch.setattr("hdmil_lib.bag_files.free_memory", lambda: 300_000_000)
    with pytest.raises(BagError, match=r"needs 411\.\d MB of memory, 300\.0 MB are free; close") as caught:
        read_bag(compressed)
    check_keeps_the_file(caught.value)
    assert bag_info(compressed)["n_tiles"] == 200_000


LIMITED = """
import resource, sys
from hdmil_lib.bags import read_bag
from hdmil_lib.errors import BagError
from hdmil_lib.memory import free_memory

if sys.argv[3] == "unknown":
    import hdmil_lib.bag_files
    hdmil_lib.bag_files.free_memory = lambda: None
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
try:
    print(len(read_bag(sys.argv[1])))
except BagError as error:
    print(error)
"""


@pytest.mark.parametrize("free", ["known", "unknown"])
def test_a_bag_larger_than_the_memory_of_the_process_is_said_to_be_so(compressed, free):
    """Also where the memory that is free is not known, so that taking it fails."""
    command = [sys.executable, "-c", LIMITED, compressed, str(200_000_000), free]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(
        r"needs 4\d\d\.\d MB of memory, (1\d\d\.\d MB are free|more than there is); close", printed
    )
    check_keeps_the_file(printed)


def test_reading_a_bag_takes_little_more_than_its_arrays(tmp_path):
    """Digests and checks make no copies; the mask of finite rows and coordinates are small."""
    path, cells = tmp_path / "a.h5", np.stack(np.divmod(np.arange(20_000), 200), axis=1)
    arrays = {"features": np.zeros((20_000, 1000), np.float16), "coords": cells * 256, "rowcol": cells}
    patches = np.zeros((20_000, 16, 16, 3), np.uint8)
    write_bag(path, replace(make_bag("a", 0), **arrays, shape=(100, 200), patches=patches))
    tracemalloc.start()
    try:
        bag = read_bag(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kept = sum(values.nbytes for values in (bag.features, bag.coords, bag.rowcol, bag.patches))
    assert peak < 1.05 * kept


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("features", (4, 8), "same tiles"),
        ("features", (5, 8, 1), "same tiles"),
        ("features", (5, 0), "same tiles"),
        ("features", (5, 70_000), "features are 70,000 wide, more than 65,536"),
        ("coords", (5, 3), "same tiles"),
        ("coords", (3_000_000, 2), "same tiles"),
        ("patches", (5, 16, 16, 4), "same tiles"),
        ("patches", (5, 32, 16, 3), "same tiles"),
        ("patches", (5, 4096, 4096, 3), "same tiles"),
        ("look_64", (5,), "same tiles"),
    ],
)
def test_shapes_are_checked_before_values_are_read(tmp_path, monkeypatch, name, shape, reason):
    path = full_bag(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        del file[name]
        file.create_dataset(name, shape, np.uint8, chunks=True, compression="gzip", fillvalue=0)
    monkeypatch.setattr("hdmil_lib.bag_files._values", None)
    monkeypatch.setattr("hdmil_lib.bag_files.MAX_RATIO", 10**12)
    with pytest.raises(BagError, match=reason):
        read_bag(path)


def test_more_tiles_than_any_slide_has_are_refused_before_they_are_read(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, width in (("features", 8), ("coords", 2)):
            file.create_dataset(name, (5_000_000, width), np.uint8, chunks=(1_000_000, width), compression=9)
    monkeypatch.setattr("hdmil_lib.bag_files._values", None)
    monkeypatch.setattr("hdmil_lib.bag_files.MAX_RATIO", 10**12)
    with pytest.raises(BagError, match=r"no slide has 5,000,000 tiles"):
        read_bag(tmp_path / "a.h5")


def test_a_chunk_that_is_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        wide = dict(chunks=(10**6, 8), maxshape=(None, 8), compression=9)
        file.create_dataset("features", data=np.zeros((5, 8), np.float16), **wide)
        file["coords"] = np.arange(10).reshape(5, 2)
    monkeypatch.setattr("hdmil_lib.bag_files.free_memory", lambda: 10**6)
    with pytest.raises(BagError, match=r"needs 32\.0 MB of memory, 1\.0 MB are free"):
        read_bag(tmp_path / "a.h5")
