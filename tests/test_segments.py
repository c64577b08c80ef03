"""Where bags lie among the tiles, against loops over bags and tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.kernels import segment_softmax_pool
from hdmil_lib.kernels.segments import Segments, check_segments, chunks
from hdmil_lib.models import create_model
from hdmil_lib.models.ragged import bag_argmax, bag_mean, pad, unpad

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS)
def test_all_that_segments_say_agrees_with_loops(lengths):
    segments = Segments(lengths)
    offsets, bag, place = [0], [], []
    for number, length in enumerate(lengths):
        offsets.append(offsets[-1] + length)
        bag += [number] * length
        place += range(length)
    assert segments.lengths == tuple(lengths)
    assert segments.offsets.tolist() == offsets
    assert segments.sizes.tolist() == lengths
    assert segments.bag.tolist() == bag
    assert segments.place.tolist() == place
    assert segments.n_tiles == len(bag)
    assert segments.n_bags == len(segments) == len(lengths)
    assert segments.longest == max(lengths)
    vectors = (segments.offsets, segments.sizes, segments.bag, segments.place)
    assert all(v.dtype == torch.int64 and v.ndim == 1 for v in vectors)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, dtype=st.sampled_from([torch.int32, torch.int64]))
def test_segments_from_offsets_are_those_from_lengths(lengths, dtype):
    expected = Segments(lengths)
    segments = Segments.from_offsets(expected.offsets.to(dtype))
    assert segments.lengths == expected.lengths
    assert segments.offsets.dtype == torch.int64
    assert torch.equal(segments.offsets, expected.offsets)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 7))
def test_chunks_cut_every_bag_by_itself(lengths, size):
    segments = Segments(lengths)
    table, first_chunk = chunks(segments.offsets, segments.n_tiles, size)
    expected, firsts, start = [], [0], 0
    for number, length in enumerate(lengths):
        end = start + length
        expected += [[number, at, min(at + size, end)] for at in range(start, end, size)]
        firsts.append(len(expected))
        start = end
    assert table[: len(expected)].tolist() == expected
    assert first_chunk.tolist() == firsts
    assert table.shape == (segments.n_tiles // size + len(lengths), 3)
    surplus = table[len(expected) :]
    assert torch.equal(surplus[:, 1], surplus[:, 2])
    assert table.dtype == first_chunk.dtype == torch.int32


def test_lengths_may_be_any_integers():
    assert Segments(torch.tensor([2, 3]).tolist()).lengths == (2, 3)
    assert Segments(torch.tensor([2, 3])).lengths == (2, 3)
    assert Segments(length for length in (1, 2)).lengths == (1, 2)


def test_it_says_what_it_is():
    assert repr(Segments([3, 0, 4])) == "Segments(3 bags, 7 tiles, cpu)"


@pytest.mark.parametrize("lengths", [[], [3, -1]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match=r"lengths is .*, expected one bag or more, of 0 or more tiles each"):
        Segments(lengths)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0.0, 4.0]), "offsets is torch.float32 of shape"),
        (torch.tensor([[0, 4]]), r"offsets is torch.int64 of shape \(1, 2\), expected integers \(B \+ 1,\)"),
        (torch.tensor([0]), r"shape \(1,\)"),
        (torch.tensor(0), r"shape \(\)"),
        (torch.tensor([True, False]), "offsets is torch.bool"),
        (torch.tensor([1, 4]), "offsets starts at 1, expected 0"),
        (torch.tensor([0, 4, 3]), r"lengths is \(4, -1\), expected one bag or more, of 0 or more tiles each"),
    ],
)
def test_impossible_offsets_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        Segments.from_offsets(offsets)


def test_segments_are_held_to_the_tensors_they_come_with():
    cpu = torch.device("cpu")
    check_segments(None, 5, cpu)
    check_segments(Segments([2, 3]), 5, cpu)
    with pytest.raises(ValueError, match="segments covers 5 tiles, embeddings has 6"):
        check_segments(Segments([2, 3]), 6, cpu)
    with pytest.raises(ValueError, match="segments is on cpu, but embeddings is on meta"):
        check_segments(Segments([2, 3]), 5, torch.device("meta"))
    for wrong in (torch.tensor([0, 5]), [2, 3]):
        with pytest.raises(ValueError, match=f"segments is a {type(wrong).__name__}, expected a Segments"):
            check_segments(wrong, 5, cpu)


def test_on_another_device_no_number_is_read_back():
    """A meta tensor has no numbers: whatever reads one fails."""
    segments = Segments([2, 0, 3], "meta")
    for tensor, length in (
        (segments.offsets, 4),
        (segments.sizes, 3),
        (segments.bag, 5),
        (segments.place, 5),
    ):
        assert tensor.is_meta
        assert tensor.shape == (length,)
    assert (segments.n_tiles, segments.longest, segments.n_bags) == (5, 3, 3)
    check_segments(segments, 5, torch.device("meta"))
    table, first_chunk = chunks(segments.offsets, 5, 2)
    assert table.shape == (5, 3)
    assert first_chunk.shape == (4,)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_a_choice_without_waiting_describes_the_same_bags(lengths, seed):
    """What a GPU gets, whose host does not know the lengths, against what a CPU gets, on the same tiles."""
    rng = torch.Generator().manual_seed(seed)
    segments = Segments(lengths)
    kept = torch.rand(segments.n_tiles, generator=rng) < 0.5
    values = torch.randn(segments.n_tiles, 3, generator=rng)
    rows, exact = segments.select(kept)
    all_rows, open_ended = segments.select(kept, wait=False)
    assert rows.tolist() == kept.nonzero()[:, 0].tolist() == all_rows[: len(rows)].tolist()
    assert sorted(all_rows.tolist()) == list(range(segments.n_tiles))
    assert (exact.exact, exact.n_tiles) == (True, len(rows))
    assert (open_ended.exact, open_ended.n_tiles) == (False, len(kept))
    assert open_ended.read_lengths() == exact.read_lengths() == list(exact.lengths)
    assert torch.equal(open_ended.bag[: len(rows)], exact.bag)
    assert torch.equal(open_ended.place[: len(rows)], exact.place)
    assert (open_ended.bag[len(rows) :] == len(lengths)).all()
    assert open_ended.inside.tolist() == [True] * len(rows) + [False] * (len(kept) - len(rows))
    assert open_ended.covering.tolist() == [*exact.offsets.tolist(), len(kept)]
    logits = values[:, :2]
    torch.testing.assert_close(
        segment_softmax_pool(values[all_rows], logits[all_rows], None, open_ended),
        segment_softmax_pool(values[rows], logits[rows], None, exact),
    )
    if min(exact.lengths) > 0:
        torch.testing.assert_close(  # one bag whose length is known is added in another order
            bag_mean(values[all_rows], open_ended), bag_mean(values[rows], exact)
        )
        longest = exact.longest
        padded = pad(values[all_rows], open_ended, -1.0)
        assert torch.equal(padded[:, :longest], pad(values[rows], exact, -1.0))
        assert (padded[:, longest:] == -1).all()
        assert torch.equal(unpad(padded, open_ended)[: len(rows)], values[rows])
        assert torch.equal(bag_argmax(values[all_rows], open_ended), bag_argmax(values[rows], exact))
    again_rows, again = open_ended.select(kept[all_rows] & (values[all_rows, 0] > 0), wait=False)
    assert again.read_lengths() == segments.select(kept & (values[:, 0] > 0))[1].read_lengths()
    assert (again_rows[: sum(again.read_lengths())] < len(rows)).all()


def test_dmin_on_chosen_tiles_is_the_same_with_and_without_waiting():
    torch.manual_seed(0)
    model = create_model("dmin", 6, 2, embed_dim=16, attention_dim=8, dropout=0.0, degree=3).double()
    features, segments = torch.randn(40, 6).double(), Segments([25, 15])
    kept, labels, results = torch.rand(40) < 0.6, torch.tensor([0, 1]), []
    for wait in (True, False):
        rows, bags = segments.select(kept, wait=wait)
        output = model.eval()(features[rows], bags)
        terms = model.loss(output, labels)
        grads = torch.autograd.grad(sum(terms.values()), model.parameters())
        results.append((output.logits, output.keep_ratio, *terms.values(), *grads))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
