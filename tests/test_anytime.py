"""The running answer is that of the whole bag, whatever the order; rules stop where they say."""

import math
from dataclasses import replace

import numpy as np
import torch
from bag_factory import ENCODER, make_bag
from hypothesis import given, settings
from hypothesis import strategies as st
from model_factory import made_up

from hdmil_lib.inference.anytime import RunningDMIN, lead, lipn_scores, trajectory
from hdmil_lib.models import DMIN, HDMIL, LIPN, ModelInfo


def make_dmin(n_classes=2, self_distillation=True, shift=0.0):
    torch.manual_seed(0)
    options = dict(embed_dim=12, attention_dim=6, degree=3, self_distillation=self_distillation)
    dmin = DMIN(5, n_classes, **options).eval()
    with torch.no_grad():
        dmin.attention.score.weight.mul_(20)
        dmin.attention.score.bias.add_(shift)
    return dmin


def make_lipn(n_classes):
    """An untrained network says nearly the same of all patches; this one ranks them."""
    torch.manual_seed(0)
    lipn = LIPN(n_classes).eval()
    with torch.no_grad():
        logits = lipn(torch.from_numpy(make_bag("s", 1, 90).patches))
        lipn.classifier.weight /= logits.std(dim=0)[:, None]
        lipn.classifier.bias.sub_(logits.mean(dim=0)).div_(logits.std(dim=0))
    return lipn


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
    info = ModelInfo(
        classes=tuple("abc"[:n_classes]), encoder=ENCODER.name, encoder_weights=ENCODER.weights_hash
    )
    model = HDMIL(dmin, make_lipn(n_classes), info=info)
    generator = torch.Generator().manual_seed(n_tiles)
    features = (scale * torch.randn(n_tiles, 5, generator=generator)).half()
    bag = replace(make_bag("s", 1, n_tiles), features=features.numpy())
    grown = trajectory(model, bag, block)
    order = np.argsort(-lipn_scores(model, bag.patches), kind="stable")
    assert n_tiles < 10 or (order != np.arange(n_tiles)).any()
    with torch.inference_mode():
        for n, answer in zip(grown.n_read, grown.probabilities, strict=True):
            expected = dmin(features[order[:n]].float()).logits[0].softmax(0).numpy()
            np.testing.assert_allclose(answer, expected, atol=1e-5)
    assert grown.n_read[-1] == n_tiles
    assert len(grown.n_read) == -(-n_tiles // block)


def test_memory_does_not_grow_with_the_tiles():
    running = RunningDMIN(make_dmin())
    for _ in range(50):
        running.update(torch.randn(100, 5))
    held = [v for v in vars(running).values() if isinstance(v, torch.Tensor)]
    assert running.n_tiles == 5000
    assert sum(v.numel() for v in held) == 2 * 2 * 12 + 3 * 2


def test_the_lead_is_that_of_the_first_two():
    found = lead(np.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
    np.testing.assert_allclose(found, [np.log(5 / 3), 37 * np.log(10), 0], atol=1e-12)


def test_the_answer_must_be_the_surer_the_more_is_unread():
    grown = made_up(0.6, 0.8, 0.75, 0.51)  # log odds 0.41, 1.39, 1.10, 0.04 with 3/4, 1/2, 1/4, 0 left
    stops = {0.5: 0, 0.6: 1, 2.7: 1, 2.8: 2, 4.3: 2, 4.5: 3, math.inf: 3}
    assert {margin: grown.stop(margin) for margin in stops} == stops


@settings(max_examples=100, deadline=None)
@given(
    tumor=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    margins=st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)),
)
def test_a_larger_margin_never_stops_earlier_and_all_stop_at_the_end(tumor, margins):
    grown = made_up(*tumor)
    low, high = sorted(margins)
    assert grown.stop(low) <= grown.stop(high) <= grown.stop(math.inf) == len(tumor) - 1
