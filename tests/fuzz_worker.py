"""Reads files with changed bytes, in a process of its own that ends if one of them takes too long.

Usage: python fuzz_worker.py KIND FOLDER FIRST COUNT
"""

import faulthandler
import resource
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bag_factory import make_bag
from slide_factory import write_slide

from hdmil_lib.bags import bag_info, read_bag, read_tile_labels, write_bag
from hdmil_lib.encoders.own import read_weights
from hdmil_lib.errors import HDMILError
from hdmil_lib.exchange.foreign import read_h5, read_npy, read_pt
from hdmil_lib.slides import Slide
from hdmil_lib.slides.formats import image_size
from hdmil_lib.storage import CONTROL, load_weights, save_weights

SECONDS = 10
"""Time that reading one file may take; usual are milliseconds."""

MEMORY = 4 * 2**30
"""Bytes that the process may take beyond those of its libraries."""

network = torch.nn.Linear(8, 8)


def write_bag_file(path: Path) -> None:
    write_bag(path, replace(make_bag("a", 1, 3, dim=4), looks={64: np.ones((3, 2))}), np.zeros(3))


def write_tiff(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(60, 200, (300, 400, 3)).astype(np.uint8)
    write_slide(path, pixels, tile=128, compression="jpeg")


def read_slide(path: Path) -> None:
    image_size(path)
    with Slide(path, mpp=0.5) as slide:
        slide.read_field(0, 0, (64, 64), 0.5)
        slide.thumbnail(8)


KINDS: dict[str, tuple[str, Callable[[Path], object], list[Callable[[Path], object]]]] = {
    "bag": ("a.h5", write_bag_file, [read_bag, bag_info, read_tile_labels, read_h5]),
    "npy": ("a.npy", lambda path: np.save(path, np.ones((3, 4), np.float32)), [read_npy]),
    "pt": ("a.pt", lambda path: torch.save(torch.ones(3, 4), path), [read_pt]),
    "weights": (
        "a.safetensors",
        lambda path: save_weights(network, path),
        [read_weights, lambda path: load_weights(torch.nn.Linear(8, 8), path)],
    ),
    "slide": ("a.tif", write_tiff, [read_slide]),
}
"""File name, what writes a whole file, and what reads it."""


def changed(content: bytes, seed: int) -> bytes:
    """The content with one to four bytes replaced, half of them near its start; one in four is cut off."""
    rng, changed = np.random.default_rng(seed), bytearray(content)
    for _ in range(rng.integers(1, 5)):
        end = len(content) if rng.random() < 0.5 else min(len(content), 2000)
        changed[rng.integers(0, end)] = rng.integers(0, 256)
    return bytes(changed[: rng.integers(0, len(content))] if rng.random() < 0.25 else changed)


def try_file(path: Path, readers: list[Callable[[Path], object]]) -> None:
    """Each reader reads the file, or raises an error of ours in one line that a terminal can print."""
    for read in readers:
        message = ""
        try:
            read(path)
        except HDMILError as error:
            message = str(error)
        assert not CONTROL.search(message), message


def main(kind: str, folder: str, first: str, count: str) -> None:
    name, write, readers = KINDS[kind]
    path = Path(folder) / name
    write(path)
    for read in readers:
        read(path)
    content = path.read_bytes()
    status = Path("/proc/self/status").read_text()
    taken = int(status.partition("VmSize:")[2].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY,) * 2)
    warnings.simplefilter("ignore")
    faulthandler.enable()
    for seed in range(int(first), int(first) + int(count)):
        print(f"seed {seed}", flush=True)
        path.write_bytes(changed(content, seed))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try_file(path, readers)
        faulthandler.cancel_dump_traceback_later()
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
