"""What the interpreter records of a kernel, the pictures of it, and the puzzles of notebook 09."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from hdmil_lib.course import check, puzzles
from hdmil_lib.errors import HDMILError
from hdmil_lib.viz.hardware import loads_and_stores, memory_accesses

pytest.importorskip("triton")

import puzzle_kernels as kernels  # these need Triton
import triton
import triton.language as tl

from hdmil_lib.kernels.recording import record

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n), i < n)


@triton.jit
def transpose(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1)
    tl.store(out + column * ROWS + row, tl.load(x + row * COLUMNS + column))


@triton.jit
def beyond(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i - 1, tl.load(x + i))


def test_each_program_is_recorded_with_its_lanes_and_their_mask():
    x, out = torch.arange(10.0), torch.zeros(10)
    recording = record(copy, (3,), x, out, 10, 4)
    assert out.tolist() == x.tolist()
    loads = recording.of("x", "load")
    assert [access.program for access in loads] == [0, 1, 2]
    assert loads[2].index.tolist() == [8, 9, 10, 11]
    assert loads[2].active.tolist() == [True, True, False, False]
    assert recording.n_programs == 3
    assert recording.n_outside() == 0
    assert recording.masked_share() == pytest.approx(2 / 12)
    assert recording.programs("out", "store").tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert recording.counts("x", "load").tolist() == [1] * 10
    assert not recording.of("x", "store")
    assert (recording.programs("x", "store") == -1).all()


def test_programs_of_two_axes_are_counted_along_the_first():
    x, out = torch.arange(6.0).view(2, 3), torch.zeros(3, 2)
    recording = record(transpose, (2, 3), x=x, out=out, ROWS=2, COLUMNS=3)
    assert torch.equal(out, x.T)
    assert recording.programs("x", "load").tolist() == [[0, 2, 4], [1, 3, 5]]


def test_what_lies_outside_is_noted_and_not_touched():
    memory = torch.zeros(30)
    x, out = torch.ones(6), memory[10:16]
    recording = record(beyond, (1,), x, out, 8)
    assert recording.of("x", "load")[0].index[recording.of("x", "load")[0].outside].tolist() == [6, 7]
    assert recording.of("out", "store")[0].index[recording.of("out", "store")[0].outside].tolist() == [-1, 6]
    assert recording.n_outside() == 4
    assert memory.nonzero().ravel().tolist() == [10, 11, 12, 13, 14]


def test_a_view_gets_its_results_back():
    memory = torch.zeros(4, 6)
    record(copy, (2,), torch.arange(8.0), memory[:, 1:3].reshape(-1), 8, 4)
    strided = memory.T[:2]
    record(copy, (2,), torch.arange(8.0), strided, 8, 4)
    assert strided.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_interpreter_is_as_before_afterwards():
    from triton.runtime import interpreter

    before = interpreter.interpreter_builder.create_masked_load
    with pytest.raises(HDMILError, match="the kernel failed: "):
        record(copy, (1,), torch.zeros(4), torch.zeros(4), "four", 4)
    assert interpreter.interpreter_builder.create_masked_load == before


def test_errors_name_what_is_missing():
    with pytest.raises(HDMILError, match="needs the argument BLOCK"):
        record(copy, (1,), torch.zeros(4), torch.zeros(4), 4)
    with pytest.raises(HDMILError, match=r"is no Triton kernel; decorate"):
        record(len, (1,))
    recording = record(copy, (1,), torch.zeros(4), torch.zeros(4), 4, 4)
    with pytest.raises(HDMILError, match="no tensor 'y'; choose from x, out"):
        recording.of("y", "load")


# Pictures


def test_squares_are_loaded_masked_or_outside():
    recording = record(copy, (2,), torch.zeros(6), torch.zeros(6), 6, 4)
    ax = memory_accesses(recording, "x", "load")
    assert ax.images[0].get_array().tolist() == [[2, 2, 2, 2, 0, 0, 0, 0], [0, 0, 0, 0, 2, 2, 1, 1]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["program 0", "program 1"]
    assert ax.lines[-1].get_xdata()[0] == 5.5, "the end of the tensor"
    outside = memory_accesses(record(beyond, (1,), torch.ones(6), torch.zeros(6), 8), "x", "load")
    assert outside.images[0].get_array().tolist() == [[2] * 6 + [3] * 2]


def test_all_panels_of_a_launch():
    figure = loads_and_stores(record(copy, (2,), torch.zeros(6), torch.zeros(6), 6, 4))
    titles = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]
    assert titles == ["x: loads", "out: stores"]


# Puzzles

SOLUTIONS = {
    "09.2": kernels.density,
    "09.3": kernels.color,
    "09.4": kernels.gather,
    "09.5": kernels.largest,
    "09.6": kernels.pooling,
}


WRONG = [
    ("09.2", len, "no Triton kernel"),
    ("09.2", kernels.color, "takes patches, means"),
    ("09.2", kernels.density_without_mask, "Program 2 loads from 3 places.*element 21"),
    ("09.2", kernels.density_of_first_block, r"first at \[8\]: it is nan, and no program"),
    ("09.4", kernels.gather_masked_by_size, "nobody needs|more than once"),
    ("09.5", kernels.largest_with_zeros, r"first at \[0\]: it is 0, and program 0"),
    ("09.6", kernels.pooling_of_all_loaded, r"nobody needs, the first at \[1, 0\]"),
]


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_solution_is_right(name):
    verdict = check(name, SOLUTIONS[name])
    assert verdict.state == "right", verdict
    assert check(name, None).state == "open"


@pytest.mark.parametrize(("name", "kernel", "hint"), WRONG)
def test_a_mistake_gets_a_hint(name, kernel, hint):
    verdict = check(name, kernel)
    assert verdict.state == "wrong", verdict
    with pytest.raises(AssertionError, match=hint):
        raise AssertionError(verdict.text)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_solution_touches_what_the_puzzle_asks_for(name):
    puzzle = puzzles.PUZZLES[name]
    goal, mine = puzzles.wanted(puzzle), puzzles._run(puzzle, SOLUTIONS[name])[0]
    for argument, kind in ((puzzle.data, "load"), (puzzle.output, "store")):
        assert np.array_equal(goal.programs(argument, kind), mine.programs(argument, kind))
        assert np.array_equal(goal.counts(argument, kind), mine.counts(argument, kind))
    assert len(puzzles.draw(name).axes) == len(puzzles.draw(name, SOLUTIONS[name]).axes)


def test_an_unknown_puzzle_is_refused():
    with pytest.raises(HDMILError, match=r"no puzzle '09.7'.*choose from 09.2"):
        puzzles.draw("09.7")
