"""Exercises of notebook 09: kernels that Triton's interpreter runs, judged by what they load and store."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hdmil_lib.course.verdicts import Wrong, exercise, number
from hdmil_lib.errors import HDMILError, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from hdmil_lib.kernels.recording import Recording

Arguments = dict[str, Any]
Lanes = tuple[Literal["load", "store"], str, int, np.ndarray, np.ndarray]
"""A load or store as it should be: direction, argument, program, elements (N,), and its mask (N,)."""


@dataclass(frozen=True)
class Puzzle:
    """A kernel to be written.

    Attributes:
        n_programs: Size of the grid.
        arguments: Makes the arguments of a launch, by name, in the order of the kernel's signature.
        output: Name of the argument that the kernel fills; it holds nan at first.
        solve: What the output has to be, computed with PyTorch.
        goal: Loads and stores that suffice, for the picture and to find wasted loads.
        data: The argument of which no element may be loaded in vain, or twice.
        praise: What a right answer is told.
    """

    n_programs: int
    arguments: Callable[[], Arguments]
    output: str
    solve: "Callable[[Arguments], Tensor]"
    goal: Callable[[Arguments], list[Lanes]]
    data: str
    praise: str


def draw(exercise: str, kernel: object = None) -> "Figure":
    """Loads and stores of a kernel on the puzzle's data; without a kernel, those that the puzzle asks for.

    Args:
        exercise: Number of the puzzle, "09.2" to "09.6".
        kernel: Function decorated with `triton.jit`, or None.

    Raises:
        HDMILError: There is no puzzle of that number, or the kernel cannot be run.
    """
    from hdmil_lib.viz.hardware import loads_and_stores

    if exercise not in PUZZLES:
        raise HDMILError(
            f"there is no puzzle {exercise!r}{nearest(exercise, PUZZLES)}; choose from {', '.join(PUZZLES)}"
        )
    puzzle = PUZZLES[exercise]
    recording = wanted(puzzle) if kernel is None else _run(puzzle, kernel)[0]
    figure = loads_and_stores(recording, (puzzle.data, puzzle.output))
    figure.suptitle(
        "what the puzzle asks for" if kernel is None else "your kernel", fontsize=10, x=0.99, ha="right"
    )
    return figure


def wanted(puzzle: Puzzle) -> "Recording":
    """The loads and stores that suffice for a puzzle, as if a kernel had made them."""
    from hdmil_lib.kernels.recording import Access, Recording

    arguments = puzzle.arguments()
    accesses = [
        Access(kind, name, program, index, active, np.zeros_like(active))
        for kind, name, program, index, active in puzzle.goal(arguments)
    ]
    shapes = {name: tuple(value.shape) for name, value in arguments.items() if hasattr(value, "shape")}
    return Recording(tuple(accesses), shapes, puzzle.n_programs)


def _run(puzzle: Puzzle, kernel: object) -> "tuple[Recording, Arguments]":
    """Record the kernel on the puzzle's data; its arguments are matched by their order."""
    from hdmil_lib.kernels.recording import argument_names, record

    arguments = puzzle.arguments()
    names = argument_names(kernel)
    if names != list(arguments):
        raise HDMILError(
            f"the kernel takes {', '.join(names)}, and this puzzle gives it {', '.join(arguments)}, in this "
            "order"
        )
    return record(kernel, (puzzle.n_programs,), **arguments), arguments


def _judge(puzzle: Puzzle, kernel: object) -> str:
    """Hold a kernel to a puzzle: nothing outside, right numbers, nothing loaded in vain."""
    try:
        recording, arguments = _run(puzzle, kernel)
    except HDMILError as error:
        raise Wrong(f"{str(error)[:1].upper()}{str(error)[1:]}.") from error
    _nothing_outside(recording)
    _right_numbers(puzzle, recording, arguments)
    _nothing_in_vain(puzzle, recording)
    return f"{puzzle.praise} The masks kept {recording.masked_share():.0%} of the lanes from memory."


def _nothing_outside(recording: "Recording") -> None:
    for access in recording.accesses:
        if access.outside.any():
            verb = "loads from" if access.kind == "load" else "stores to"
            raise Wrong(
                f"Program {access.program} {verb} {access.outside.sum()} places that are not in "
                f"`{access.argument}` (element {access.index[access.outside][0]}; the tensor has "
                f"{int(np.prod(recording.shapes[access.argument]))}). Draw the kernel and look at the red "
                "lanes."
            )


def _right_numbers(puzzle: Puzzle, recording: "Recording", arguments: Arguments) -> None:
    found, exact = arguments[puzzle.output].numpy(), puzzle.solve(puzzle.arguments()).numpy()
    wrong = ~np.isclose(found, exact, atol=1e-4, rtol=1e-4)
    if not wrong.any():
        return
    place = np.argwhere(wrong)[0].tolist()
    writer = int(recording.programs(puzzle.output, "store")[wrong][0])
    by = "no program stored it" if writer < 0 else f"program {writer} stored it"
    value = "nan" if np.isnan(found[wrong][0]) else f"{found[wrong][0]:.3g}"
    raise Wrong(
        f"{wrong.sum()} of {wrong.size} numbers of `{puzzle.output}` are wrong, the first at {place}: it is "
        f"{value}, and {by}."
    )


def _nothing_in_vain(puzzle: Puzzle, recording: "Recording") -> None:
    counts, needed = (r.counts(puzzle.data, "load") for r in (recording, wanted(puzzle)))
    if (vain := (counts > 0) & (needed == 0)).any():
        raise Wrong(
            f"The numbers are right, but {vain.sum()} elements of `{puzzle.data}` are loaded that nobody "
            f"needs, the first at {np.argwhere(vain)[0].tolist()}."
        )
    if (twice := counts > np.maximum(needed, 1)).any():
        raise Wrong(
            f"The numbers are right, but {twice.sum()} elements of `{puzzle.data}` are loaded more than "
            f"once, the first at {np.argwhere(twice)[0].tolist()}. One pass over memory is enough."
        )


# The puzzles


def _seeded(*shape: int) -> "Tensor":
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _nan(*shape: int) -> "Tensor":
    import torch

    return torch.full(shape, torch.nan)


def _block(program: int, start: int, length: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    index = start + np.arange(length)
    return index, index < end


def _density() -> Puzzle:
    def goal(_: Arguments) -> list[Lanes]:
        blocks = [(p, *_block(p, 8 * p, 8, 21)) for p in range(3)]
        loads: list[Lanes] = [("load", "pixels", *block) for block in blocks]
        return loads + [("store", "density", *block) for block in blocks]

    return Puzzle(
        n_programs=3,
        arguments=lambda: {
            "pixels": 20 + 220 * _seeded(21).sigmoid(),
            "density": _nan(21),
            "n": 21,
            "BLOCK": 8,
        },
        output="density",
        solve=lambda given: -(given["pixels"] / 255).log(),
        goal=goal,
        data="pixels",
        praise="Each program owns a block, and the last one is cut by its mask.",
    )


def _color() -> Puzzle:
    def goal(_: Arguments) -> list[Lanes]:
        lanes: list[Lanes] = []
        for p in range(3):
            for channel in range(3):
                index = 12 * p + 3 * np.arange(4) + channel
                lanes.append(("load", "patches", p, index, np.ones(4, bool)))
                lanes.append(("store", "means", p, np.array([3 * p + channel]), np.ones(1, bool)))
        return lanes

    def arguments() -> Arguments:
        import torch

        patches = (255 * _seeded(3, 4, 3).sigmoid()).to(torch.uint8)
        return {"patches": patches, "means": _nan(3, 3), "PIXELS": 4}

    return Puzzle(
        n_programs=3,
        arguments=arguments,
        output="means",
        solve=lambda given: given["patches"].float().mean(1),
        goal=goal,
        data="patches",
        praise="Neighbors in a channel are three bytes apart, and the cache serves the other two channels.",
    )


def _gather() -> Puzzle:
    def arguments() -> Arguments:
        import torch

        kept = torch.tensor([1, 3, 4], dtype=torch.int32)
        return {"features": _seeded(6, 6), "kept": kept, "compact": _nan(3, 6), "WIDTH": 6, "BLOCK": 8}

    def goal(given: Arguments) -> list[Lanes]:
        lanes: list[Lanes] = []
        for p, tile in enumerate(given["kept"].tolist()):
            lanes.append(("load", "kept", p, np.array([p]), np.ones(1, bool)))
            lanes.append(("load", "features", p, *_block(p, 6 * tile, 8, 6 * tile + 6)))
            lanes.append(("store", "compact", p, *_block(p, 6 * p, 8, 6 * p + 6)))
        return lanes

    return Puzzle(
        n_programs=3,
        arguments=arguments,
        output="compact",
        solve=lambda given: given["features"][given["kept"].long()],
        goal=goal,
        data="features",
        praise="A loaded number may be an address: dropped tiles are never touched.",
    )


def _bags(n: int, offsets: list[int], block: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Blocks of each bag: its number, the tiles of the block, and which of them belong to the bag."""
    blocks = []
    for bag, (first, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        blocks += [(bag, *_block(bag, start, block, end)) for start in range(first, end, block)]
    return blocks


def _largest() -> Puzzle:
    offsets = [0, 3, 4, 11, 19]

    def arguments() -> Arguments:
        import torch

        logits = -1 - _seeded(19).abs()
        return {
            "logits": logits,
            "offsets": torch.tensor(offsets, dtype=torch.int32),
            "largest": _nan(4),
            "TILES": 4,
        }

    def goal(_: Arguments) -> list[Lanes]:
        lanes: list[Lanes] = [("load", "logits", *block) for block in _bags(19, offsets, 4)]
        return lanes + [("store", "largest", p, np.array([p]), np.ones(1, bool)) for p in range(4)]

    return Puzzle(
        n_programs=4,
        arguments=arguments,
        output="largest",
        solve=lambda given: given["logits"].new_tensor(
            [given["logits"][a:b].max() for a, b in zip(offsets, offsets[1:], strict=False)]
        ),
        goal=goal,
        data="logits",
        praise="A program loops over its own bag, and what is masked counts as minus infinity.",
    )


def _pooling() -> Puzzle:
    offsets, flags = [0, 3, 12, 17], [1, 0, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1]

    def arguments() -> Arguments:
        import torch

        return {
            "embeddings": _seeded(17, 4),
            "logits": 3 * _seeded(17),
            "kept": torch.tensor(flags, dtype=torch.int32),
            "offsets": torch.tensor(offsets, dtype=torch.int32),
            "pooled": _nan(3, 4),
            "WIDTH": 4,
            "TILES": 4,
        }

    def solve(given: Arguments) -> "Tensor":
        import torch

        logits = given["logits"].masked_fill(given["kept"] == 0, -torch.inf)
        pairs = zip(offsets, offsets[1:], strict=False)
        return torch.stack([logits[a:b].softmax(0) @ given["embeddings"][a:b] for a, b in pairs])

    def goal(_: Arguments) -> list[Lanes]:
        lanes: list[Lanes] = []
        for bag, tiles, inside in _bags(17, offsets, 4):
            read = inside & (np.resize(flags, 32)[tiles] == 1)
            elements = 4 * tiles[:, None] + np.arange(4)
            lanes.append(("load", "embeddings", bag, elements.ravel(), np.repeat(read, 4)))
        return lanes + [("store", "pooled", p, 4 * p + np.arange(4), np.ones(4, bool)) for p in range(3)]

    return Puzzle(
        n_programs=3,
        arguments=arguments,
        output="pooled",
        solve=solve,
        goal=goal,
        data="embeddings",
        praise="One pass; no dropped tile is read, and a block without kept tiles changes no sum.",
    )


PUZZLES: Mapping[str, Puzzle] = {
    "09.2": _density(),
    "09.3": _color(),
    "09.4": _gather(),
    "09.5": _largest(),
    "09.6": _pooling(),
}
"""The puzzles of notebook 09, from easy to hard."""


@exercise("09.1")
def _bytes_of_a_warp(answer: object) -> str:
    moved = number(answer)
    if moved == 128:
        raise Wrong("This is what is asked for. What is moved are whole sectors of 32 bytes.")
    if moved == 1024:
        raise Wrong(
            "Then each thread would have a sector of its own. How many bytes apart are two neighbors?"
        )
    if moved != 512:
        raise Wrong("Count the sectors of 32 bytes that hold at least one of the 32 numbers.")
    return "Two threads share a sector, so a quarter of what is moved is used."


def _register(name: str, puzzle: Puzzle) -> None:
    exercise(name)(lambda answer: _judge(puzzle, answer))


for _name, _puzzle in PUZZLES.items():
    _register(_name, _puzzle)
