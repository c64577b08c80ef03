"""Answers that settle: the relation is fitted, interpolated, saved, and exact at the end."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bag_factory import make_bag
from hypothesis import given
from hypothesis import strategies as st
from model_factory import make_model

from hdmil_lib.bags import EncoderIdentity
from hdmil_lib.inference.anytime import RunningDMIN, Trajectory, may_stop
from hdmil_lib.models import HDMIL, SecondLook
from hdmil_lib.models.settling import SHARES, centered, expected, fit_settling, neutral


def probabilities_of(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@given(st.integers(2, 5), st.floats(0, 1), st.integers(0, 99))
def test_without_knowledge_the_answer_stays(n_classes, share, seed):
    answer = np.random.default_rng(seed).dirichlet(np.ones(n_classes)).astype("f4")
    found = expected(neutral(n_classes), answer, share)
    np.testing.assert_allclose(found.probabilities, answer, atol=1e-5)
    assert found.spread == pytest.approx(1 - share, abs=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_known_relation_is_found(n_classes):
    """Scores of all tiles are made from those of a share: half of them, and a summand, with noise."""
    rng = np.random.default_rng(0)
    n_slides, slope, sigma = 20_000, 0.5, 0.3
    bias = np.linspace(-1, 1, n_classes)
    some = rng.normal(0, 2, (n_slides, n_classes))
    some -= some.mean(1, keepdims=True)
    noise = rng.normal(0, sigma, (n_slides, n_classes))
    final = slope * some + bias + noise - noise.mean(1, keepdims=True)
    table = fit_settling(np.repeat(some[:, None], len(SHARES), 1), final)
    middle = table[SHARES.index(0.1)].numpy()
    assert middle[0] == pytest.approx(slope, abs=0.01)
    assert middle[1] == pytest.approx(np.sqrt(2) * sigma, rel=0.03)  # of a difference between two classes
    np.testing.assert_allclose(middle[2:], bias, atol=0.02)
    answer = expected(table, probabilities_of(some[0]), 0.1).probabilities
    np.testing.assert_allclose(answer, probabilities_of(slope * some[0] + bias), atol=0.02)
    assert table[-1].tolist() == neutral(n_classes)[-1].tolist()


def test_centered_scores_are_log_odds():
    assert np.diff(centered(np.array([0.2, 0.8])))[0] == pytest.approx(np.log(4))
    assert centered(np.array([[1.0, 0.0]])).sum() == pytest.approx(0)


def test_the_margin_multiplies_the_spread():
    sure, unsure = np.array([0.01, 0.99]), np.array([0.4, 0.6])
    assert may_stop(sure, 1.0, 4.0)
    assert not may_stop(unsure, 1.0, 4.0)
    assert may_stop(unsure, 0.05, 4.0)
    assert may_stop(unsure, 0.0, np.inf)
    grown = Trajectory(np.array([1, 2, 4]), np.stack([unsure, unsure, sure]), np.array([1.0, 0.05, 0.0]))
    assert grown.stop(4.0) == 1
    assert replace(grown, spread=None).stop(4.0) == 2


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = make_model()
    table = neutral(2)
    table[1:-1, 0], table[1:-1, 2], table[1:-1, 3] = 0.5, -1.0, 1.0
    look = SecondLook(6, 64, hidden=8)
    return HDMIL(base.dmin, base.lipn, thresholds=0.0, look=look, settling=table, info=base.info)


@pytest.fixture
def bag():
    bag = make_bag("a", 0, 40, dim=6)
    looks = np.random.default_rng(1).standard_normal((40, 6)).astype("f2")
    return replace(bag, encoder=EncoderIdentity("color", "c01"), looks={64: looks})


def test_a_trajectory_is_expected_and_ends_with_the_answer_of_all_tiles(model, bag):
    grown = model.trajectory(bag, block=8)
    assert grown.spread[-1] == 0
    assert (np.diff(grown.spread) < 0).all()
    running = RunningDMIN(model.dmin)
    whole = running.update(torch.from_numpy(bag.features).float()).numpy()
    np.testing.assert_allclose(grown.probabilities[-1], whole, atol=1e-5)
    raw = HDMIL(model.dmin, model.lipn, thresholds=0.0, look=model.look, info=model.info).trajectory(
        bag, block=8
    )
    assert np.abs(raw.probabilities[0] - grown.probabilities[0]).max() > 0.1
    np.testing.assert_allclose(raw.probabilities[-1], grown.probabilities[-1])


def test_what_is_known_of_answers_is_saved(model, bag, tmp_path):
    model.save_pretrained(tmp_path)
    read = HDMIL.from_pretrained(tmp_path)
    assert torch.equal(read.settling, model.settling)
    assert torch.equal(model.with_rules(margin=3.0).settling, model.settling)
    np.testing.assert_array_equal(read.trajectory(bag).probabilities, model.trajectory(bag).probabilities)
