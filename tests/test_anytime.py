"""The running answer is that of the whole bag, whatever the order; rules stop where they say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predictor_factory import made_up

from hdmil_lib.inference.anytime import RunningDMIN, lead, trajectory
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


def test_a_rule_stops_at_the_first_sufficient_lead_or_at_the_end():
    grown = made_up(0.6, 0.8, 0.75, 0.99)
    assert [grown.stop(margin) for margin in (0.1, 0.5, 0.9, 1.0)] == [0, 1, 3, 3]
