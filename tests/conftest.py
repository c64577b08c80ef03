"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hdmil_lib.config import interprets_triton

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Bags are small: one thread a process is faster, and two test processes then share two cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("HDMIL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def real_data() -> Path:
    """Folder of real histology for development checks; the test is skipped where it is absent."""
    folder = Path(os.environ.get("HDMIL_REAL_DATA", REPOSITORY.parent / "shared" / "real"))
    if not folder.is_dir():
        pytest.skip(f"no real histology at {folder}; set HDMIL_REAL_DATA to a folder that has it")
    return folder


@pytest.fixture
def device() -> Iterator[str]:
    """Where Triton kernels run: the GPU, or the interpreter (`TRITON_INTERPRET=1`).

    Fresh tensors hold nan meanwhile, so that a kernel that forgets to write an element is seen.
    """
    if not torch.cuda.is_available() and not interprets_triton():
        pytest.skip("no GPU here; tests/test_triton.py runs these in the interpreter")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield "cuda" if torch.cuda.is_available() else "cpu"
    torch.use_deterministic_algorithms(False)
