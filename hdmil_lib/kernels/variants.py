"""What a kernel is compiled for: `tools/aot_check.py` compiles every variant that an operator can launch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel.

    Attributes:
        kernel: The function that `triton.jit` made.
        types: Type of each argument that is not a constant: "*fp32", "*bf16", "*u8", "i32", "fp32";
            "i32:16" for a size that is a multiple of 16. Pointers are aligned to 16 bytes, as torch's are.
        constants: The `tl.constexpr` arguments.
        num_warps: Warps a program.
        uses_tensor_cores: It has a `tl.dot`, which must become MMA or MFMA instructions.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    uses_tensor_cores: bool = False

    @property
    def name(self) -> str:
        """Kernel, constants and types, for reports."""
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        first = next(iter(self.types.values())).lstrip("*")
        return f"{self.kernel.__name__} {first} {constants}"
