"""What a Triton kernel loads and stores, recorded while Triton's interpreter runs it on the CPU.

The interpreter runs one program after the other, and each load or store of a block is one call with the
addresses and the mask of all its lanes. `record` notes both. It also keeps a kernel from touching memory that
belongs to none of its tensors: such lanes are noted as outside and are neither read nor written, so that a
wrong mask shows in the recording and harms nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from hdmil_lib.errors import HDMILError

GUARD = 4096
"""Elements on either side of a tensor whose addresses still count as its own: beyond its edges."""

Kind = Literal["load", "store"]


@dataclass(frozen=True)
class Access:
    """One load or store of one program; N lanes.

    Attributes:
        kind: "load" or "store".
        argument: Name of the kernel's argument whose tensor is meant.
        program: Number of the program, counted along the first axis of the grid fastest.
        index: Position of each lane's element in the flattened tensor, int64 (N,); below 0 or beyond the end
            where there is no element.
        active: Lanes that the mask lets through, bool (N,).
        outside: Active lanes without an element, bool (N,).
    """

    kind: Kind
    argument: str
    program: int
    index: np.ndarray
    active: np.ndarray
    outside: np.ndarray


@dataclass(frozen=True)
class Recording:
    """All loads and stores of one launch.

    Attributes:
        accesses: In the order in which they happened.
        shapes: Shape of each tensor among the arguments, by name.
        n_programs: Number of programs.
    """

    accesses: tuple[Access, ...]
    shapes: dict[str, tuple[int, ...]]
    n_programs: int

    def of(self, argument: str, kind: Kind) -> list[Access]:
        """The loads or the stores of one argument.

        Raises:
            HDMILError: The kernel has no tensor of that name.
        """
        if argument not in self.shapes:
            raise HDMILError(f"the kernel has no tensor '{argument}'; choose from {', '.join(self.shapes)}")
        return [a for a in self.accesses if (a.argument, a.kind) == (argument, kind)]

    def counts(self, argument: str, kind: Kind) -> np.ndarray:
        """How often each element is loaded or stored, int64 of the tensor's shape."""
        count = np.zeros(int(np.prod(self.shapes[argument])), np.int64)
        for access in self.of(argument, kind):
            np.add.at(count, access.index[access.active & ~access.outside], 1)
        return count.reshape(self.shapes[argument])

    def programs(self, argument: str, kind: Kind) -> np.ndarray:
        """The last program that touched each element, int64 of the tensor's shape; -1 where none did."""
        owner = np.full(int(np.prod(self.shapes[argument])), -1, np.int64)
        for access in self.of(argument, kind):
            owner[access.index[access.active & ~access.outside]] = access.program
        return owner.reshape(self.shapes[argument])

    def n_outside(self) -> int:
        """Number of lanes that would have touched memory of no tensor."""
        return sum(int(access.outside.sum()) for access in self.accesses)

    def masked_share(self) -> float:
        """Share of all lanes that a mask kept from memory."""
        lanes = sum(access.active.size for access in self.accesses)
        return 1 - sum(int(access.active.sum()) for access in self.accesses) / max(lanes, 1)


def record(kernel: Any, grid: Sequence[int], *arguments: Any, **named: Any) -> Recording:
    """Run a kernel in the interpreter, whatever the machine has, and note what it loads and stores.

    Tensors are copied to the CPU for the run, and what the kernel stored is copied back.

    Args:
        kernel: Function decorated with `triton.jit`.
        grid: Number of programs along each axis, one to three.
        arguments: Arguments of the launch, tensors and numbers.
        named: Arguments of the launch by name.

    Returns:
        The recording.

    Raises:
        HDMILError: `kernel` is no Triton kernel, an argument is missing, or the kernel failed.
    """
    interpreted = _interpretable(kernel)
    values = dict(zip(interpreted.arg_names, arguments, strict=False)) | named
    if missing := [name for name in interpreted.arg_names if name not in values]:
        raise HDMILError(f"the kernel needs the argument {', '.join(missing)}")
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    guarded = {name: _Guarded(tensor) for name, tensor in tensors.items()}
    accesses: list[Access] = []
    quiet = np.errstate(all="ignore")  # a GPU does not warn of a division by zero either
    with quiet, _interpreted_language(), _watched(guarded, tuple(grid), accesses):
        try:
            interpreted[tuple(grid)](**values | {name: copy.view for name, copy in guarded.items()})
        except Exception as error:
            cause = error.__cause__ or error
            raise HDMILError(f"the kernel failed: {type(cause).__name__}: {cause}") from error
    for name, tensor in tensors.items():
        with torch.no_grad():
            tensor.copy_(guarded[name].view)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Recording(tuple(accesses), shapes, int(np.prod(grid)))


def argument_names(kernel: Any) -> list[str]:
    """Names of a kernel's arguments, in order.

    Raises:
        HDMILError: `kernel` is no Triton kernel.
    """
    return list(_interpretable(kernel).arg_names)


def _interpretable(kernel: Any) -> Any:
    """The kernel as a function of the interpreter, whether or not it would be compiled here."""
    if not isinstance(kernel, interpreter.InterpretedFunction | triton.JITFunction):
        raise HDMILError(f"{kernel!r} is no Triton kernel; decorate a function with @triton.jit")
    return interpreter.InterpretedFunction(kernel.fn)


class _Guarded:
    """A copy of a tensor on the CPU with room on both sides, so that addresses beyond its edges are known."""

    def __init__(self, tensor: Tensor) -> None:
        flat = tensor.detach().cpu().reshape(-1)
        room = flat.new_zeros(flat.numel() + 2 * GUARD)
        self.view = room[GUARD : GUARD + flat.numel()].view(tensor.shape)
        self.view.copy_(flat.view(tensor.shape))
        self.n, self.itemsize = flat.numel(), flat.element_size()
        self.start = self.view.data_ptr()

    def index(self, addresses: np.ndarray) -> np.ndarray:
        """Position of each address, in elements from the first one of the tensor."""
        return (addresses.astype(np.int64) - self.start) // self.itemsize

    def distance(self, addresses: np.ndarray) -> int:
        """How many bytes the first of the addresses lies away from the tensor; 0 within."""
        first = int(self.index(addresses.reshape(-1)[:1])[0])
        return self.itemsize * max(-first, first - self.n + 1, 0)


@contextmanager
def _watched(tensors: dict[str, _Guarded], grid: tuple[int, ...], accesses: list[Access]) -> Iterator[None]:
    """Note each masked load and store of the interpreter, and keep it inside the tensors."""
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    width = (*grid, 1, 1)[:2]

    def inside(kind: Kind, addresses: Any, mask: Any) -> Any:
        x, y, z = builder.grid_idx
        name = min(tensors, key=lambda name: tensors[name].distance(addresses.data))
        index, active = tensors[name].index(addresses.data.reshape(-1)), mask.data.reshape(-1).astype(bool)
        outside = active & ((index < 0) | (index >= tensors[name].n))
        program = x + width[0] * (y + width[1] * z)
        accesses.append(Access(kind, name, program, index, active, outside))
        kept = (active & ~outside).reshape(mask.data.shape)
        return interpreter.TensorHandle(kept, tl.int1)

    def watched_load(addresses: Any, mask: Any, *rest: Any) -> Any:
        return load(addresses, inside("load", addresses, mask), *rest)

    def watched_store(addresses: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(addresses, value, inside("store", addresses, mask), *rest)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store


@contextmanager
def _interpreted_language() -> Iterator[None]:
    """Let the interpreter call functions of Triton's language that are kernels themselves, such as `tl.sum`.

    Where Triton was imported to compile, they are compiled kernels, which the interpreter cannot call.
    """
    compiled = {name: value for name, value in vars(tl).items() if isinstance(value, triton.JITFunction)}
    for name, value in compiled.items():
        setattr(tl, name, interpreter.InterpretedFunction(value.fn))
    try:
        yield
    finally:
        for name, value in compiled.items():
            setattr(tl, name, value)
