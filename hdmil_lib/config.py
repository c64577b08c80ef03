"""Where things are kept, how large a run is, and the seeds: everything read from the environment."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Config:
    """One run's surroundings.

    Attributes:
        fast: Sizes are small (`HDMIL_FAST=1`); code paths are the same.
        seed: Seed given to every generator by `setup`.
        cache: Folder of slides, bags and trained models (`HDMIL_CACHE`).
        build: Folder of executed notebooks, tables and figures (`HDMIL_BUILD`).
    """

    fast: bool
    seed: int
    cache: Path
    build: Path


def is_fast() -> bool:
    """Whether `HDMIL_FAST` asks for small sizes."""
    return os.environ.get("HDMIL_FAST", "0").lower() not in ("", "0", "false", "no")


def cache_dir() -> Path:
    """Folder for slides, bags and trained models: `HDMIL_CACHE`, or `~/.cache/hdmil`."""
    return Path(os.environ.get("HDMIL_CACHE", Path.home() / ".cache" / "hdmil")).expanduser()


def build_dir() -> Path:
    """Folder for executed notebooks, tables and figures: `HDMIL_BUILD`, or `build/` in the repository."""
    return Path(os.environ.get("HDMIL_BUILD", Path(__file__).resolve().parent.parent / "build"))


def interprets_triton() -> bool:
    """Whether this process runs Triton kernels in the interpreter, on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def n_threads() -> int:
    """Threads for heavy work: every core of the process, or as many as `OMP_NUM_THREADS` allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("OMP_NUM_THREADS", cores))


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    import torch  # takes seconds, which `hdmil --help` need not wait for

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let PyTorch have so many threads for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def setup(seed: int = 0) -> Config:
    """Seed all generators, keep torch to one thread, and return where and how large this run is.

    One thread: bags are small, and two threads fighting for a busy core are far slower than one.
    Encoders raise the number for themselves.
    """
    import torch

    seed_everything(seed)
    torch.set_num_threads(1)
    return Config(fast=is_fast(), seed=seed, cache=cache_dir(), build=build_dir())
