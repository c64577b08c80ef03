"""LIPN before DMIN: masks, what is read, who pools it, and thresholds that keep a share."""

import numpy as np
import pytest
import torch
from bag_factory import DIM, make_bag, make_bags
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.models import build_model
from hdmil_lib.training.two_stage import calibrate_thresholds, lipn_mask, two_stage


@pytest.fixture(scope="module")
def bags():
    return make_bags()[0]


def patches_of(bags):
    return [torch.from_numpy(bag.patches) for bag in bags.values()]


def small_dmin():
    torch.manual_seed(0)
    return build_model("dmin", DIM, 2, embed_dim=16, attention_dim=8, degree=4).eval()


class Brightness(torch.nn.Module):
    """Scores a patch by its brightness and by its darkness, so that thresholds can be worked out by hand."""

    def forward(self, patches):
        score = (patches.float().mean((1, 2, 3)) + 0.5) / 256
        return torch.stack((score, 1 - score), dim=1).logit()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    keep_ratio=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)
def test_calibration_reaches_the_ratio_as_closely_as_the_tiles_allow(sizes, keep_ratio, seed):
    rng = np.random.default_rng(seed)
    bags, total = {}, sum(sizes)
    levels = iter(rng.permutation(total) % 256)
    for i, size in enumerate(sizes):
        bags[str(i)] = make_bag(str(i), 0, size)
        bags[str(i)].patches[:] = np.array([next(levels) for _ in range(size)])[:, None, None, None]
    thresholds = calibrate_thresholds(Brightness(), patches_of(bags), keep_ratio)
    scores = [Brightness()(torch.from_numpy(b.patches)).sigmoid() for b in bags.values()]
    kept = [float((s > torch.tensor(thresholds)).any(1).float().mean()) for s in scores]
    # One more tile of each branch would exceed the target: the gap is at most the weight of two tiles.
    assert -1e-6 <= keep_ratio - np.mean(kept) <= 2 / (min(sizes) * len(sizes)) + 1e-6


def test_a_mask_is_per_branch_and_never_empty():
    logits = torch.tensor([[-1.0, 0.2], [-3.0, -2.0], [0.5, -4.0]])
    assert lipn_mask(logits, 0.5).tolist() == [[False, True], [False, False], [True, False]]
    assert lipn_mask(logits, 0.9).tolist() == [[False, False], [False, False], [True, False]]


def test_two_stage_reads_kept_tiles_alone(bags):
    dmin = small_dmin()
    features = torch.from_numpy(bags["s01"].features).float()
    patches = torch.from_numpy(bags["s01"].patches)
    threshold = [float(Brightness()(patches)[:, 0].sigmoid().median()), 1.0]
    dropped = Brightness()(patches)[:, 0].sigmoid() <= threshold[0]
    poisoned = features.masked_fill(dropped[:, None], torch.nan)
    output, kept = two_stage(dmin, Brightness(), features, patches, threshold)
    again, _ = two_stage(dmin, Brightness(), poisoned, patches, threshold)
    assert dropped.sum() == 6 and kept == 0.5
    assert torch.equal(output.logits, again.logits)


def test_as_published_each_branch_pools_the_tiles_that_lipn_kept_for_it(bags):
    dmin, lipn = small_dmin(), Brightness()
    features = torch.from_numpy(bags["s01"].features).float()
    patches = torch.from_numpy(bags["s01"].patches)
    with torch.inference_mode():
        thresholds = lipn(patches).sigmoid().median(0).values.tolist()
        mask = lipn_mask(lipn(patches), thresholds)
        output, _ = two_stage(dmin, lipn, features, patches, thresholds, lipn_pools=True)
        for c in range(2):
            own = features[mask[:, c]]
            alone = dmin(own, mask=torch.ones(len(own), 2))
            torch.testing.assert_close(output.logits[c], alone.logits[c])


def test_every_branch_keeps_the_same_share_after_calibration(bags):
    lipn = Brightness()
    thresholds = torch.tensor(calibrate_thresholds(lipn, patches_of(bags), 0.5))
    with torch.inference_mode():
        scores = torch.cat([lipn(torch.from_numpy(b.patches)).sigmoid() for b in bags.values()])
    per_branch = (scores > thresholds).sum(0)
    assert per_branch.max() - per_branch.min() <= 1  # bags of equal size: one tile, one step
