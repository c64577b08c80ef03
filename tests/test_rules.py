"""Rules learned on held-out slides: what is certified, what is not, and that the promise is kept."""

import math

import numpy as np
import pytest
import torch
from bag_factory import make_bag
from model_factory import made_up, make_model

from hdmil_lib.inference.rules import learn_margin, learn_thresholds, threshold_ladder


def test_the_margin_learned_is_the_smallest_certified():
    # With a margin of 1 the first answer is taken, of 3 the second, beyond 7 the last; one of 1 misleads on a
    # tenth of the slides.
    steady, fickle = made_up(0.72, 0.8, 0.99), made_up(0.72, 0.2, 0.05)
    slides, margins = [steady] * 180 + [fickle] * 20, (math.inf, 3, 1)
    learned = learn_margin(slides, margins, epsilon=0.05)
    assert learned.value == 3
    assert learned.control.errors.tolist() == [0, 0, 20]
    assert learned.keep_ratio == pytest.approx(2 / 3)
    assert learn_margin(slides, margins, epsilon=0.2).value == 1


def test_too_few_slides_certify_nothing_and_everything_is_read():
    learned = learn_margin([made_up(0.7, 0.91)] * 10)
    assert (learned.value, learned.keep_ratio, learned.control.index) == (math.inf, 1.0, None)
    assert "not achievable with 10 slides" in str(learned.control)


def test_what_cannot_be_learned_from():
    with pytest.raises(ValueError, match="trajectories is empty"):
        learn_margin([])
    with pytest.raises(ValueError, match="margins must fall"):
        learn_margin([made_up(0.7)], (0.5, 0.5))


def test_the_promise_is_kept_on_new_slides():
    """Of 300 draws of 120 slides, at most delta may certify a rule that errs on more than epsilon."""
    rng = np.random.default_rng(0)
    epsilon, delta, margins = 0.1, 0.1, (math.inf, 8, 6, 4, 2)
    risks = {math.inf: 0.0, 8: 0.03, 6: 0.09, 4: 0.14, 2: 0.3}
    wrong = 0
    for _ in range(300):
        slides = []
        for u in rng.random(120):  # a slide errs at margins whose risk exceeds its u
            top = max((m for m in margins if risks[m] > u), default=0)
            # Half is read: log odds of top / 2 for the wrong class stop at margins up to top.
            first = 1 / (1 + np.exp(top / 2 + 1e-9)) if top else 1.0
            slides.append(made_up(first, 1.0))
        wrong += risks[learn_margin(slides, margins, epsilon=epsilon, delta=delta).value] > epsilon
    # Binomial(300, 0.1) exceeds 42 with probability 0.01.
    assert wrong <= 42


# Thresholds


def test_the_ladder_goes_from_all_tiles_to_few():
    ladder = threshold_ladder((0.5, 0.9))
    assert ladder[0] == (0.0, 0.0)
    assert (0.5, 0.9) in [tuple(np.round(t, 12)) for t in ladder]
    assert (np.diff(np.array(ladder), axis=0) > 0).all()
    assert np.array(ladder).max() < 1
    assert threshold_ladder((0.0, 1.0))[-1] == (0.0, 1.0)  # there is nowhere to go


@pytest.fixture(scope="module")
def model():
    """DMIN has either class on half of the bags, so that what is read matters."""
    model = make_model()
    with torch.inference_mode():
        leads = [model.dmin(features_of(bag)).logits[0].diff() for bag in bags_of(40)]
    with torch.no_grad():
        constant = model.dmin.heads[1].coefficients[:, 0, 0]  # of T_0 = 1
        constant -= torch.cat(leads).median() / len(constant)
    return model


def bags_of(n, n_tiles=24):
    return [make_bag(f"s{i}", i % 2, n_tiles, dim=6) for i in range(n)]


def features_of(bag):
    return torch.from_numpy(bag.features).float()


def test_thresholds_are_judged_by_what_the_two_stages_say(model):
    bags, candidates = bags_of(20), threshold_ladder((0.5, 0.5))
    learned = learn_thresholds(model, bags, candidates, epsilon=0.2, delta=0.2)
    errors, kept = np.zeros(len(candidates), int), np.zeros(len(candidates))
    with torch.inference_mode():
        for bag in bags:
            features, patches = features_of(bag), torch.from_numpy(bag.patches)
            dagger = model.dmin(features).logits.argmax()
            for j, thresholds in enumerate(candidates):
                output = model.with_rules(thresholds=thresholds)(features, patches)
                errors[j] += output.logits.argmax() != dagger
                kept[j] += output.keep_ratio / 20
    assert learned.control.errors.tolist() == errors.tolist()
    assert errors.max() > 0
    np.testing.assert_allclose(learned.control.costs, kept, rtol=1e-6)
    assert learned.keep_ratio == pytest.approx(kept[learned.control.certified].min())
    assert learned.value == candidates[int(kept[: learned.control.certified.sum()].argmin())]


def test_candidates_start_from_the_thresholds_that_training_chose(model):
    """So that rules learned twice on the same slides are the same, and their guarantee holds."""
    bags, trained = bags_of(30), model.trained_thresholds.tolist()
    options = {"epsilon": 0.6, "delta": 0.5}
    first = learn_thresholds(model, bags, **options)
    assert first.value != (0.0, 0.0)
    assert first.value != tuple(trained)
    assert len(first.control.errors) == len(threshold_ladder(trained))
    for thresholds in (first.value, 0.99):
        second = learn_thresholds(model.with_rules(thresholds=thresholds), bags, **options)
        assert second.value == first.value
        np.testing.assert_array_equal(second.control.errors, first.control.errors)
        np.testing.assert_array_equal(second.control.costs, first.control.costs)
    given = learn_thresholds(model, bags, threshold_ladder(trained), **options)
    assert given.value == first.value


def test_the_truth_can_be_the_reference(model):
    bags = bags_of(60)
    with torch.inference_mode():
        said = [int(model.dmin(features_of(bag)).logits.argmax()) for bag in bags]
    wrong = [1 - label for label in said]
    all_tiles = [(0.0, 0.0)]
    same = learn_thresholds(model, bags, all_tiles, labels=said)
    assert same.control.errors.tolist() == [0]
    assert same.keep_ratio == 1.0
    never = learn_thresholds(model, bags, all_tiles, labels=wrong)
    assert never.control.errors.tolist() == [60]
    assert never.value == (0.0, 0.0)
    with pytest.raises(ValueError, match="3 labels for 60 slides"):
        learn_thresholds(model, bags, all_tiles, labels=[0, 1, 1])
    for nothing in ({"bags": []}, {"candidates": []}):
        with pytest.raises(ValueError, match="bags or candidates are empty"):
            learn_thresholds(model, **{"bags": bags, "candidates": all_tiles} | nothing)


def test_missed_positives_can_be_the_risk_of_a_margin():
    sure, fickle = made_up(0.97, 0.99), made_up(0.2, 0.9)  # the second is missed where reading stops early
    slides = [sure] * 55 + [fickle] * 5
    learned = learn_margin(slides, (math.inf, 5, 2), labels=[1] * 60, epsilon=0.1)
    assert learned.control.errors.tolist() == [0, 0, 5]
    assert learned.value == 5
