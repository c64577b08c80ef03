"""Fast methods of others: what they read, and in which order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bag_factory import DIM, make_bags, make_split

from hdmil_lib.errors import BagError
from hdmil_lib.models import create_model
from hdmil_lib.reproduce.field import coarse, field_rows, mean_of, read_until_sure
from hdmil_lib.training.fit import TrainSettings

SHORT = TrainSettings(learning_rate=1e-3, epochs=2, min_epochs=2, seed=1)


@pytest.fixture(scope="module")
def case():
    bags, labels = make_bags()
    rng = np.random.default_rng(0)
    looks = {s: {64: rng.standard_normal(bag.features.shape).astype("f2")} for s, bag in bags.items()}
    bags = {s: replace(bag, looks=looks[s]) for s, bag in bags.items()}
    return bags, labels, make_split(list(bags))


def make_dmin():
    torch.manual_seed(0)
    return create_model("dmin", DIM, 2, embed_dim=16, attention_dim=8, degree=3).eval()


def test_three_rows_say_what_they_read(case, tmp_path):
    bags, labels, split = case
    low, top, sure = field_rows(
        make_dmin(), bags, labels, split, SHORT, out=tmp_path, n_tiles=3, embed_dim=16
    )
    for row in (low, top, sure):
        assert row.logits.shape == (len(split.test), 2)
        assert row.logits.isfinite().all()
        assert row.keep_ratio.shape == (len(split.test),)
    assert low.keep_ratio.tolist() == [0.0] * len(split.test)
    expected = [min(3 / len(bags[s]), 1) for s in split.test]
    assert top.keep_ratio.tolist() == pytest.approx(expected)
    assert ((sure.keep_ratio > 0) & (sure.keep_ratio <= 1)).all()


def test_a_mean_is_that_of_the_rows(case):
    bag = next(iter(case[0].values()))
    assert len(mean_of(bag, np.array([0, 2]))) == 1
    expected = bag.features[[0, 2]].astype("f4").mean(0)
    np.testing.assert_allclose(mean_of(bag, np.array([0, 2])).features[0], expected, atol=2e-3)  # float16


def test_reading_ends_when_the_prediction_is_confident(case):
    bags = dict(list(case[0].items())[:2])
    order, dmin = {s: np.arange(len(bag)) for s, bag in bags.items()}, make_dmin()
    _, least = read_until_sure(dmin, bags, order, confidence=0.0, block=2)
    logits, most = read_until_sure(dmin, bags, order, confidence=1.1, block=2)
    assert least.tolist() == pytest.approx([2 / len(bag) for bag in bags.values()])
    assert most.tolist() == [1.0, 1.0]
    with torch.inference_mode():
        whole = torch.cat([dmin(torch.from_numpy(bag.features).float()).logits for bag in bags.values()])
    assert torch.equal(logits, whole)


def test_bags_without_looks_are_refused(case):
    with pytest.raises(BagError, match="--look 32"):
        coarse(case[0], 32)
