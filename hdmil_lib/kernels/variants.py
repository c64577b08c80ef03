"""Compilations of a kernel: `tools/aot_check.py` compiles every variant that an operator can launch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel.

    Attributes:
        kernel: Kernel function, as returned by `triton.jit`.
        types: Type of each argument that is not a constant: "*fp32", "*bf16", "*u8", "i32", "fp32", or
            "i32:16" for a size that is a multiple of 16. Pointers are aligned to 16 bytes, as in PyTorch.
        constants: Values of the `tl.constexpr` arguments.
        num_warps: Number of warps per program.
        uses_tensor_cores: Whether the kernel has a `tl.dot`, which must become matrix instructions where a
            target has them.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    uses_tensor_cores: bool = False

    @property
    def name(self) -> str:
        """Kernel, type of the first argument, and constants, for reports."""
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        first = next(iter(self.types.values())).lstrip("*")
        return f"{self.kernel.__name__} {first} {constants}"
