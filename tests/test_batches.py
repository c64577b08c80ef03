"""Bags in memory: what a batch holds, in which order, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bag_factory import DIM, ENCODER, make_bag, make_bags, make_data
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib import devices
from hdmil_lib.bags import EncoderIdentity
from hdmil_lib.batches import MAX_TILES, BagDataset
from hdmil_lib.errors import BagError, CohortError
from hdmil_lib.models import ABMIL, DSMIL, HDMIL, LIPN, SMT, create_model

SIZES = (5, 1, 9, 12)


@pytest.fixture
def bags():
    """Bags of different sizes whose rows all differ."""
    bags = {f"s{i}": make_bag(f"s{i}", i % 2, n) for i, n in enumerate(SIZES)}
    for i, bag in enumerate(bags.values()):
        bag.rowcol[:] += 100 * i
    return bags


LABELS = {"s0": 0, "s1": 1, "s2": 2, "s3": 0}


def without_patches(bag):
    return replace(bag, patches=None)


@pytest.mark.parametrize("slide_ids", [["s0", "s1", "s2", "s3"], ["s3", "s1"], ["s2"], ["s1", "s0", "s1"]])
def test_a_batch_holds_the_bags_in_the_order_asked_for(bags, slide_ids):
    batch = BagDataset(bags, LABELS).batch(slide_ids)
    lengths = [len(bags[s]) for s in slide_ids]
    assert batch.slide_ids == tuple(slide_ids)
    assert batch.segments.lengths == tuple(lengths)
    assert batch.labels.tolist() == [LABELS[s] for s in slide_ids]
    assert batch.labels.dtype == torch.int64
    assert (batch.features.dtype, batch.patches.dtype) == (torch.float32, torch.uint8)
    assert batch.rowcol.dtype == torch.int64
    for field in ("features", "patches", "rowcol"):
        for slide_id, rows in zip(slide_ids, getattr(batch, field).split(lengths), strict=True):
            np.testing.assert_array_equal(rows, getattr(bags[slide_id], field), err_msg=field)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.floats(0.01, 1), st.integers(0, 99))
def test_a_sample_has_tiles_of_each_bag_in_their_order(sizes, share, seed):
    bags = {f"s{i}": make_bag(f"s{i}", 0, n) for i, n in enumerate(sizes)}
    batch = BagDataset(bags).batch(list(bags))
    torch.manual_seed(seed)
    sampled = batch.sample(share)
    assert sampled.segments.lengths == tuple(max(1, round(share * n)) for n in sizes)
    assert sampled.slide_ids == batch.slide_ids
    parts = zip(sampled.rowcol.split(sampled.segments.lengths), batch.rowcol.split(sizes), strict=True)
    for some, every in parts:
        places = [every.tolist().index(tile) for tile in some.tolist()]
        assert places == sorted(set(places))


def test_a_sample_takes_the_same_tiles_of_every_field(bags):
    batch = BagDataset(bags, LABELS).batch(["s3", "s2"])
    torch.manual_seed(1)
    sampled = batch.sample(0.5)
    first_features = {tuple(row.tolist()): i for i, row in enumerate(batch.features)}
    rows = [first_features[tuple(row.tolist())] for row in sampled.features]
    assert torch.equal(sampled.patches, batch.patches[rows])
    assert torch.equal(sampled.rowcol, batch.rowcol[rows])
    assert sampled.labels.tolist() == [LABELS["s3"], LABELS["s2"]]
    assert sampled.rows is None


def test_a_data_set_says_what_it_holds(bags):
    data = BagDataset(bags, LABELS)
    assert data.slide_ids == tuple(bags)
    assert len(data) == 4
    assert data.labels == LABELS
    assert data.dim == DIM
    assert data.encoder == ENCODER
    assert data.device == torch.device("cpu")
    assert [data.length(s) for s in bags] == list(SIZES)


def test_a_batch_on_another_device_has_there_what_networks_take(bags, monkeypatch):
    """The device "meta" stands for a GPU."""
    monkeypatch.setattr(devices, "resolve", torch.device)
    here = BagDataset(bags, LABELS)
    data = here.to("meta")
    assert data.to("meta") is data
    assert here.device == here.batch(["s0"]).features.device == torch.device("cpu")
    batch = data.batch(["s2", "s0"])
    assert all(tensor.is_meta for tensor in (batch.features, batch.patches, batch.segments.offsets))
    assert all(tensor.device.type == "cpu" for tensor in (batch.rowcol, batch.labels))
    assert batch.segments.lengths == (9, 5)
    model = create_model("mean", DIM, 2).to("meta")
    assert model(**batch.inputs_for(model)).logits.shape == (2, 2)


def test_features_changed_in_a_batch_are_not_changed_in_the_data(bags):
    data = BagDataset(bags, LABELS)
    data.batch(["s0", "s2"]).features.fill_(7)
    data.batch(["s0"]).features.fill_(7)
    np.testing.assert_array_equal(data.batch(["s0"]).features, bags["s0"].features)


def test_labels_are_given_where_all_are_known(bags):
    data = BagDataset(bags, {"s0": 1, "s2": 0})
    assert data.batch(["s2", "s0"]).labels.tolist() == [0, 1]
    assert data.batch(["s0", "s1"]).labels is None
    assert BagDataset(bags).batch(["s0"]).labels is None


def test_inputs_are_those_that_the_model_takes(bags):
    batch = BagDataset(bags, LABELS).batch(["s1", "s2"])
    for model, names in (
        (ABMIL, {"features", "rows"}),
        (DSMIL, {"features"}),
        (SMT, {"features", "patches", "rowcol"}),
        (HDMIL, {"features", "rows", "patches"}),
    ):
        inputs = batch.inputs_for(model)
        assert set(inputs) == names | {"segments"}
        assert all(inputs[name] is getattr(batch, name) for name in inputs)


def test_bags_without_patches_serve_models_that_need_none(bags):
    data = BagDataset({s: without_patches(bag) for s, bag in bags.items()}, LABELS)
    batch = data.batch(["s2", "s0"])
    assert batch.patches is None
    dmin = create_model("dmin", DIM, 2)
    assert dmin(**batch.inputs_for(dmin)).logits.shape == (2, 2)
    for model in (create_model("smt", DIM, 2), HDMIL(dmin, LIPN(2))):
        with pytest.raises(BagError, match="bag s2 has no patches, which this model needs; fill them in"):
            batch.inputs_for(model)


def test_one_bag_without_patches_leaves_none_to_all(bags):
    """A model must not see patches of some bags alone."""
    data = BagDataset(bags | {"s1": without_patches(bags["s1"])}, LABELS)
    assert data.batch(["s0"]).patches is None


# Batches


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=10), max_tiles=st.integers(1, 30))
def test_batches_hold_as_many_bags_as_fit_in_order(lengths, max_tiles):
    bags = {f"s{i}": make_bag(f"s{i}", 0, n, dim=2) for i, n in enumerate(lengths)}
    slide_ids = list(bags)[::-1]
    batches = list(BagDataset(bags).batches(slide_ids, max_tiles))
    assert [s for batch in batches for s in batch.slide_ids] == slide_ids
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert batch.segments.n_tiles <= max_tiles or batch.segments.n_bags == 1
        if following is not None:
            assert batch.segments.n_tiles + following.segments.lengths[0] > max_tiles


def test_no_slides_make_no_batches():
    assert list(make_data(4).batches([])) == []


def test_rows_point_to_the_tiles_of_a_cohort_that_lies_on_a_gpu(bags):
    data = BagDataset(bags, LABELS)
    assert data.batch(["s1"]).rows is None
    data.resident["features"] = data.batch(list(bags)).features  # as on a GPU
    batch = data.batch(["s2", "s0", "s2"])
    assert torch.equal(batch.cohort[batch.rows], batch.features)
    inputs = batch.inputs_for(ABMIL)
    assert inputs["features"] is batch.cohort
    assert inputs["rows"] is batch.rows
    model = create_model("abmil", batch.features.shape[1], 2).eval()
    wanted = model(batch.features, batch.segments).logits
    assert torch.equal(model(**inputs).logits, wanted)
    assert batch.inputs_for(DSMIL)["features"] is batch.features


def test_one_batch_holds_a_small_cohort():
    data = make_data(4)
    (batch,) = data.batches(data.slide_ids)
    assert batch.segments.n_tiles == 48 < MAX_TILES


# Digests


def test_a_digest_tells_features_and_their_order_apart(bags):
    data = BagDataset(bags)
    digest = data.digest(["s0", "s2"])
    assert digest == BagDataset(dict(reversed(bags.items()))).digest(["s0", "s2"])
    assert digest == BagDataset({s: bags[s] for s in ("s0", "s2")}).digest(["s0", "s2"])
    assert digest != data.digest(["s2", "s0"])
    assert digest != data.digest(["s0"])
    bags["s2"].features[8, 3] += 1
    changed = BagDataset(bags)
    assert digest != changed.digest(["s0", "s2"])
    assert data.digest(["s0", "s1"]) == changed.digest(["s0", "s1"])


# What is refused


def test_no_bags_are_refused():
    with pytest.raises(BagError, match="there are no bags"):
        BagDataset({})


def test_bags_of_several_encoders_are_refused_by_name(bags):
    other = replace(bags["s2"], encoder=EncoderIdentity("test", "ffff"))
    message = r"Bag 's2' .*test \(weights ffff\).*3 of 4 bags.*test \(weights 0123abcd\)"
    with pytest.raises(BagError, match=message):
        BagDataset(bags | {"s2": other})
    narrow = make_bag("s2", 1, dim=8)
    with pytest.raises(BagError, match=r"Bag 's2' .*width 8.*width 16"):
        BagDataset(bags | {"s2": narrow})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_name_the_bag(bags, value):
    bags["s3"].features[2, 5] = value
    with pytest.raises(BagError, match="bag 's3': features with nan or infinite values"):
        BagDataset(bags)


def test_a_bag_without_tiles_is_named(bags):
    empty = make_bag("s1", 0, 1)
    rows = ("features", "coords", "rowcol", "patches")
    empty = replace(empty, **{name: getattr(empty, name)[:0] for name in rows})
    with pytest.raises(BagError, match="bag 's1': no tiles"):
        BagDataset(bags | {"s1": empty})


def test_a_slide_without_a_bag_is_named(bags):
    data = BagDataset(bags, LABELS)
    for ask in (data.batch, data.digest, lambda ids: list(data.batches(ids))):
        with pytest.raises(BagError, match="slide 'x' .* has no bag"):
            ask(["s0", "x"])
    with pytest.raises(BagError, match="slide 'x' .* has no bag"):
        data.length("x")


def test_bags_of_the_factory_are_as_a_cohort_reads_them():
    bags, labels = make_bags(6)
    data = BagDataset(bags, labels)
    assert data.batch(list(labels)).labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_labels_that_are_not_known_are_asked_for_in_one_line():
    bags, labels = make_bags(4)
    assert BagDataset(bags, labels).batch(["s01"]).known_labels.tolist() == [1]
    with pytest.raises(CohortError, match="label"):
        _ = BagDataset(bags).batch(["s01"]).known_labels
