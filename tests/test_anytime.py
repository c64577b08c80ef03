"""The running answer is that of the whole bag, whatever the order; rules stop where they say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.inference.anytime import RunningDMIN, Trajectory, lead, learn_margin, trajectory
from hdmil_lib.models import DMIN, DMINSettings


def make_dmin(n_classes=2, self_distillation=True, shift=0.0):
    torch.manual_seed(0)
    options = dict(embed_dim=12, attention_dim=6, degree=3, self_distillation=self_distillation)
    dmin = DMIN(DMINSettings(in_dim=5, n_classes=n_classes, **options)).eval()
    with torch.no_grad():
        dmin.attention.score.weight.mul_(20)
        dmin.attention.score.bias.add_(shift)
    return dmin


@settings(max_examples=60, deadline=None)
@given(
    n_tiles=st.integers(1, 90),
    block=st.integers(1, 40),
    n_classes=st.sampled_from([2, 3]),
    self_distillation=st.booleans(),
    shift=st.sampled_from([0.0, -8.0, -60.0]),  # some branches, or all, keep nothing for long
    scale=st.sampled_from([1.0, 300.0]),
)
def test_when_all_is_read_the_answer_is_that_of_the_bag(
    n_tiles, block, n_classes, self_distillation, shift, scale
):
    dmin = make_dmin(n_classes, self_distillation, shift)
    generator = torch.Generator().manual_seed(n_tiles)
    features = scale * torch.randn(n_tiles, 5, generator=generator)
    scores = torch.rand(n_tiles, generator=generator).numpy()
    grown = trajectory(dmin, features, scores, block)
    order = np.argsort(-scores, kind="stable")
    with torch.inference_mode():
        for n, answer in zip(grown.n_read, grown.probabilities, strict=True):
            expected = dmin(features[order[:n]]).logits.softmax(0).numpy()
            np.testing.assert_allclose(answer, expected, atol=1e-5)
    assert grown.n_read[-1] == n_tiles


def test_memory_does_not_grow_with_the_tiles():
    running = RunningDMIN(make_dmin())
    for _ in range(50):
        running.update(torch.randn(100, 5))
    held = [v for v in vars(running).values() if isinstance(v, torch.Tensor)]
    assert running.n_tiles == 5000 and sum(v.numel() for v in held) == 2 * 2 * 12 + 3 * 2


def test_the_lead_is_that_of_the_first_two():
    assert lead(np.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])).tolist() == pytest.approx([0.2, 1.0])


def made_up(*tumor):
    p = np.array(tumor)
    return Trajectory(np.arange(1, len(p) + 1) * 10, np.stack([1 - p, p], 1))


def test_a_rule_stops_at_the_first_sufficient_lead_or_at_the_end():
    grown = made_up(0.6, 0.8, 0.75, 0.99)
    assert [grown.stop(margin) for margin in (0.1, 0.5, 0.9, 1.0)] == [0, 1, 3, 3]


def test_the_margin_learned_is_the_smallest_certified():
    # A lead of 0.4 misleads on a tenth of the slides, one of 0.8 never does.
    steady, fickle = made_up(0.72, 0.91, 0.99), made_up(0.72, 0.2, 0.05)
    learned = learn_margin([steady] * 180 + [fickle] * 20, (1.0, 0.8, 0.4), epsilon=0.05)
    assert learned.margin == 0.8
    assert learned.control.errors.tolist() == [0, 0, 20]
    assert learned.keep_ratio == pytest.approx((180 * 2 + 20 * 3) / 3 / 200)
    assert learn_margin([steady] * 180 + [fickle] * 20, (1.0, 0.8, 0.4), epsilon=0.2).margin == 0.4


def test_too_few_slides_certify_nothing_and_everything_is_read():
    learned = learn_margin([made_up(0.7, 0.91)] * 10)
    assert (learned.margin, learned.keep_ratio, learned.control.index) == (1.0, 1.0, None)
    assert "not achievable with 10 slides" in str(learned.control)


def test_what_cannot_be_learned_from():
    with pytest.raises(ValueError, match="trajectories is empty"):
        learn_margin([])
    with pytest.raises(ValueError, match="margins must fall"):
        learn_margin([made_up(0.7)], (0.5, 0.5))


def test_the_promise_is_kept_on_new_slides():
    """Of 300 draws of 120 slides, at most delta may certify a rule that errs on more than epsilon."""
    rng = np.random.default_rng(0)
    epsilon, delta, margins = 0.1, 0.1, (1.0, 0.8, 0.6, 0.4, 0.2)
    risks = {1.0: 0.0, 0.8: 0.03, 0.6: 0.09, 0.4: 0.14, 0.2: 0.3}
    wrong = 0
    for _ in range(300):
        slides = []
        for u in rng.random(120):  # a slide errs at margins whose risk exceeds its u
            bad = [m for m in margins if risks[m] > u]
            top = max(bad, default=0.0)  # leads of the wrong class up to this margin, then the right one
            slides.append(made_up(0.5 - top / 2, 1.0) if top else made_up(1.0, 1.0))
        wrong += risks[learn_margin(slides, margins, epsilon=epsilon, delta=delta).margin] > epsilon
    # Binomial(300, 0.1) exceeds 42 with probability 0.01.
    assert wrong <= 42
