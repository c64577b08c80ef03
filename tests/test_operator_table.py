"""tools/operator_table.py: what it counts, by hand, and docs/operators.md, which is what it writes."""

import sys

import pytest
import torch
from conftest import REPOSITORY

from hdmil_lib import kernels
from hdmil_lib.kernels import cost, work
from hdmil_lib.kernels.segments import Segments

pytest.importorskip("triton", reason="formulas read the sizes of blocks from the kernels")
sys.path.insert(0, str(REPOSITORY / "tools"))
import fake_gpu
import operator_table
from operator_table import Recorder


@pytest.fixture
def gpu():
    """A fake GPU."""
    with fake_gpu.fake_gpu() as device:
        yield device


def counted(run) -> list[tuple[str, float, float]]:
    """Name, bytes and operations of the operators that a function enters."""
    with Recorder() as recorder:
        run()
    return [(call.name.removeprefix("aten::"), call.work.bytes, call.work.flops) for call in recorder.calls]


def test_the_page_is_what_the_tool_writes():
    committed = operator_table.PAGE.read_text(encoding="utf-8")
    assert committed == operator_table.page(), "run `python tools/operator_table.py`"


# Our operators


def test_every_operator_has_a_formula():
    for name in kernels.__all__:
        getattr(kernels, name)
    registered = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    ours = {name for name in registered if name.startswith("hdmil::")}
    assert ours - set(work.WORK) == set(), "add formulas to hdmil_lib/kernels/work.py"
    assert set(work.WORK) - ours == set()


def test_an_operator_without_a_formula_is_named():
    with pytest.raises(ValueError, match="hdmil::unknown has no formula"):
        work.work("hdmil::unknown", torch.ones(3))


def test_attention_is_counted_by_hand():
    tiles, embed_dim, hidden, branches = 3, 4, 5, 2
    half = {"dtype": torch.float16}
    embeddings, score = torch.ones(tiles, embed_dim, **half), torch.ones(branches, hidden, **half)
    square, bias = torch.ones(hidden, embed_dim, **half), torch.ones(hidden, **half)
    arguments = (square, bias, square, bias, score, torch.ones(branches, **half), 0.0, None)
    done = work.work("hdmil::gated_attention", embeddings, *arguments)
    numbers = 12 + (20 + 5 + 20 + 5 + 10 + 2) + 6
    assert (done.bytes, done.matrix_flops, done.vector_flops) == (2 * numbers, 2 * 3 * (2 * 4 * 5 + 5 * 2), 0)
    turned = work.work("hdmil::gated_attention", torch.ones(4, 3, **half).T, *arguments)
    assert turned.bytes == done.bytes + 2 * 2 * 12  # copied to be contiguous


def test_float32_products_do_not_run_on_matrix_units():
    patches, weights = torch.zeros(7, 16, 16, 3, dtype=torch.uint8), [torch.ones(5, 3), torch.ones(3)]
    done = work.work("hdmil::lipn_forward", patches, weights)
    assert done.bytes == 7 * 768 + 4 * (15 + 3) + 7 * 3 * 4
    assert (done.matrix_flops, done.vector_flops) == (0, 2 * cost.LIPN_MULTIPLY_ADDS * 7)


def test_pooling_writes_and_reads_its_partial_sums():
    tiles, embed_dim, branches, bags = 130, 8, 2, 2
    embeddings, logits = torch.ones(tiles, embed_dim), torch.ones(tiles, branches)
    table, first_chunk = Segments((3, 127)).chunks()
    done = work.work("hdmil::segment_softmax_pool", embeddings, logits, None, table, first_chunk)
    chunks = 130 // 64 + 2
    partial_sums = chunks * branches * (embed_dim + 4)
    assert done.bytes == 4 * (130 * 8 + 130 * 2 + 2 * partial_sums + bags * branches * (embed_dim + 3))


@pytest.mark.parametrize("seed", [None, 0])
def test_our_operators_are_counted_where_they_are_entered(seed, gpu):
    logits = torch.ones(10, 2, dtype=torch.float16, device=gpu)
    recorded = counted(lambda: kernels.gumbel_mask(logits, seed=seed))
    assert recorded[-1] == ("hdmil::gumbel_mask", 2 * 40, 30 * 20)


def test_no_formula_is_below_what_the_operator_must_move():
    tiles, embed_dim, hidden, branches = 1000, 64, 32, 2
    half = {"dtype": torch.float16}
    embeddings, logits = torch.ones(tiles, embed_dim, **half), torch.ones(tiles, branches, **half)
    square, bias = torch.ones(hidden, embed_dim, **half), torch.ones(hidden, **half)
    weights = (square, bias, square, bias, torch.ones(branches, hidden, **half), torch.ones(branches, **half))
    inputs, states = torch.ones(2, 500, 32, **half), torch.ones(2, 500, 16, **half)
    scan = (inputs, inputs, torch.ones(32, 16), states, states, torch.ones(32, **half))
    least = {
        "gated_attention_pool": (
            (embeddings, *weights, None, *Segments([tiles]).chunks(), 0.0, None),
            cost.gated_attention_pool(tiles, embed_dim, hidden, branches),
        ),
        "segment_softmax_pool": (
            (embeddings, logits, logits, *Segments([tiles]).chunks()),
            cost.segment_softmax_pool(tiles, embed_dim, branches),
        ),
        "selective_scan": (scan, cost.selective_scan(2, 500, 32)),
        "chebyshev_kan": ((embeddings, torch.ones(64, 2, 13, **half)), cost.chebyshev_kan(tiles, 64, 2, 12)),
    }
    for name, (arguments, bound) in least.items():
        assert bound.fused_bytes <= work.work(f"hdmil::{name}", *arguments).bytes < bound.eager_bytes, name


# Operators of PyTorch


def test_a_matrix_product_is_counted_by_hand(gpu):
    a, b = (torch.ones(*shape, dtype=torch.float16, device=gpu) for shape in ((4, 8), (8, 2)))
    assert counted(lambda: a @ b) == [("mm", 2 * (32 + 16 + 8), 2 * 4 * 8 * 2)]


def test_views_allocations_and_the_host_count_nothing(gpu):
    a = torch.ones(4, 8, device=gpu)
    with torch.device("cpu"):
        assert counted(lambda: (a.T, a[1:], a.view(-1), torch.empty_like(a), torch.ones(3) + 1)) == []


def test_tensors_are_counted_once_and_expanded_ones_by_their_memory(gpu):
    a, row = torch.ones(4, 8, device=gpu), torch.ones(8, device=gpu)
    assert counted(lambda: a * a) == [("mul", 4 * 2 * 32, 0)]
    assert counted(lambda: a + row.expand(4, 8)) == [("add", 4 * (32 + 8 + 32), 0)]


def test_what_works_in_place_reads_unless_it_overwrites(gpu):
    a, b = torch.ones(4, 8, device=gpu), torch.ones(4, 8, device=gpu)
    assert counted(lambda: a.add_(b)) == [("add_", 4 * 3 * 32, 0)]
    assert counted(lambda: a.copy_(b)) == [("copy_", 4 * 2 * 32, 0)]
    assert counted(lambda: a.zero_()) == [("zero_", 4 * 32, 0)]


def test_what_is_taken_for_its_type_is_not_read(gpu):
    a = torch.ones(4, 8, device=gpu)
    assert counted(lambda: a.new_zeros(2)) == [("new_zeros", 4 * 2, 0)]
    assert counted(lambda: torch.ones_like(a)) == [("ones_like", 4 * 32, 0)]


def test_chosen_rows_are_counted_and_not_the_whole(gpu):
    a, rows = torch.ones(100, 8, device=gpu), torch.ones(3, dtype=torch.int64, device=gpu)
    values = torch.ones(3, 8, device=gpu)
    read, moved = 2 * 3 * 8 * 4 + 3 * 8, 3 * 8 + 3 * 8 * 4 + 3 * 8 * 4
    assert counted(lambda: a[rows]) == [("index", read, 0)]
    assert counted(lambda: a.index_put_((rows,), values)) == [("index_put_", moved, 0)]
    assert counted(lambda: a.index_put((rows,), values)) == [("index_put", moved + 2 * 4 * 800, 0)]
    assert counted(lambda: a.index_add_(0, rows, values)) == [("index_add_", moved + 3 * 8 * 4, 0)]


def test_a_fourier_transform_is_counted_by_hand(gpu):
    a = torch.ones(3, 16, device=gpu)
    assert counted(lambda: torch.fft.fft(torch.complex(a, a)))[1][2] == 3 * 5 * 16 * 4
    assert counted(lambda: torch.fft.rfft(a))[0][2] == 3 * 5 * 16 * 4 / 2


def test_a_step_has_three_phases_and_names_who_called(gpu):
    model = fake_gpu.made_on(gpu, lambda: torch.nn.Linear(8, 2))
    optimizer, recorder = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False), Recorder()
    with fake_gpu.training(recorder.enter_node), recorder:
        model(torch.ones(4, 8, device=gpu)).sum().backward()
        optimizer.step()
    assert [call.phase for call in recorder.calls if call.name.endswith(("::addmm", "::mm", "::add_"))] == [
        "forward",
        "backward",
        "update",
        "update",
    ]
    (product,) = (call for call in recorder.calls if call.name == "aten::mm")
    assert (product.where, product.result) == ("AddmmBackward0", "(2, 8) float32")


def test_only_gradients_that_nobody_has_are_filled_with_zeros(gpu):
    inputs, weights = torch.ones(4, 8, device=gpu, requires_grad=True), torch.ones(8, 2, 3, device=gpu)
    output, recorder = kernels.chebyshev_kan(inputs, weights).sum(), Recorder()
    with fake_gpu.training(recorder.enter_node), recorder:
        output.backward()
    assert [call.name for call in recorder.calls] == ["aten::ones_like", "hdmil::chebyshev_kan_backward"]


# The table


def test_what_a_step_of_dmin_must_move():
    assert cost.dmin_step(tiles=640_000, in_dim=1024, embed_dim=512) == 5_898_240_000


def test_alike_calls_share_a_row_and_the_last_rows_have_the_rest_and_all():
    def call(name: str, moved: float) -> operator_table.Call:
        return operator_table.Call(name, "forward", "f", "(2,) float32", work.Work(moved))

    calls = [call("aten::add", 1e9), call("aten::mul", 3e9), call("aten::add", 1e9), call("aten::div", 1e9)]
    rows = operator_table.breakdown(calls, top=2).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[3:7] for row in cells[:2]] == [
        ["`aten::mul`", "(2,) float32", "3.00", "50 %"],
        ["`aten::add`", "2 x (2,) float32", "2.00", "33 %"],
    ]
    assert [(row[3], row[5]) for row in cells[2:]] == [("1 more operators", "1.00"), ("**all 4**", "6.00")]
