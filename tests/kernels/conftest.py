"""Where the Triton kernels run: on the GPU, or in the interpreter (`TRITON_INTERPRET=1`)."""

import pytest
import torch

from hdmil_lib.config import interprets_triton


@pytest.fixture(scope="session")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if interprets_triton():
        return "cpu"
    pytest.skip("no GPU here; tests/test_triton.py runs these in the interpreter")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold nan, so that a kernel that forgets to write an element is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
