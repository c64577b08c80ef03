"""Settings read from the environment: folders, sizes, threads; and the seeds of all generators."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hdmil_lib.errors import HDMILError


@dataclass(frozen=True)
class Config:
    """Settings of one run.

    Attributes:
        fast: Whether sizes are small (`HDMIL_FAST=1`); the code paths are the same.
        seed: Seed that `setup` gave to every generator.
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
    """Folder of slides, bags and trained models: `HDMIL_CACHE`, or `~/.cache/hdmil`.

    Raises:
        HDMILError: The user has no home folder, as in some containers, and `HDMIL_CACHE` is not set.
    """
    try:
        return Path(os.environ.get("HDMIL_CACHE") or "~/.cache/hdmil").expanduser()
    except RuntimeError as error:
        raise HDMILError(
            "there is no home folder for the cache; set HDMIL_CACHE to a folder that can be written"
        ) from error


def build_dir() -> Path:
    """Folder of executed notebooks, tables and figures.

    This is `HDMIL_BUILD` or, without that variable, `build/` in the checkout that contains this package. For
    a package outside a checkout it is `build/` in the current working directory.
    """
    named = os.environ.get("HDMIL_BUILD")
    return Path(named) if named is not None else (_checkout() or Path.cwd()) / "build"


def _checkout() -> Path | None:
    """Folder of the repository that this package is run from, or None where it is installed."""
    folder = Path(__file__).resolve().parent.parent
    is_checkout = (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir()
    return folder if is_checkout else None


def interprets_triton() -> bool:
    """Whether this process runs Triton kernels in the interpreter on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def n_threads() -> int:
    """Number of threads for heavy work: `OMP_NUM_THREADS`, or the number of cores of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("OMP_NUM_THREADS", cores))


def slow_bars(seconds: int = 60) -> None:
    """Let progress bars write a line per this time in seconds, for logs; called before they are imported."""
    for name in ("TQDM_DELAY", "TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
        os.environ.setdefault(name, str(seconds))


def one_core_unless_told() -> None:
    """Let `n_threads` be 1 in this process where `OMP_NUM_THREADS` says nothing, as PyTorch's number is."""
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch."""
    # Imported here, since they take seconds that `import hdmil_lib` and `hdmil --help` must not take.
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Set PyTorch's number of threads within a `with` block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def setup(seed: int = 0) -> Config:
    """Seed all generators, give PyTorch one thread, and return the settings of this run.

    Bags are small, and two threads that compete for a busy core are far slower than one. Encoders raise the
    number of threads while they run.
    """
    import torch

    seed_everything(seed)
    torch.set_num_threads(1)
    return Config(fast=is_fast(), seed=seed, cache=cache_dir(), build=build_dir())
