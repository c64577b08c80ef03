"""LIPN before DMIN: masks, what is read, who pools it, and thresholds that keep a share."""

import numpy as np
import pytest
import torch
from bag_factory import DIM, make_bag, make_bags, make_data
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.batches import BagDataset
from hdmil_lib.errors import BagError
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import HDMIL, LIPN, create_model
from hdmil_lib.models.lipn import keep_mask, thresholds_for_keep_ratio


@pytest.fixture(scope="module")
def data():
    return make_data()


def small_dmin(n_classes=2, **options):
    torch.manual_seed(0)
    return create_model("dmin", DIM, n_classes, embed_dim=16, attention_dim=8, degree=4, **options)


class Brightness(torch.nn.Module):
    """Scores a patch by its brightness and by its darkness, so that thresholds can be worked out by hand."""

    n_classes = 2

    def forward(self, patches):
        score = (patches.float().mean((1, 2, 3)) + 0.5) / 256
        return torch.stack((score, 1 - score), dim=1).logit()


class NotAsked(torch.nn.Module):
    """A LIPN that may not be used."""

    n_classes = 2

    def forward(self, patches):
        raise AssertionError("LIPN was asked")


def half(batch):
    """Thresholds that keep the brighter half of the tiles for branch 0 and the darker half for branch 1."""
    return Brightness()(batch.patches).sigmoid().median(0).values.tolist()


# Masks


def test_a_mask_is_per_branch_and_never_empty():
    logits = torch.tensor([[-1.0, 0.2], [-3.0, -2.0], [0.5, -4.0]])
    one = Segments([3])
    assert keep_mask(logits, 0.5, one).tolist() == [[False, True], [False, False], [True, False]]
    assert keep_mask(logits, 0.9, one).tolist() == [[False, False], [False, False], [True, False]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    n_classes=st.integers(2, 4),
    one_threshold=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_masks_of_bags_together_are_those_of_loops_over_tiles(lengths, n_classes, one_threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(sum(lengths), n_classes, generator=generator)
    thresholds = 0.6 + 0.4 * torch.rand(n_classes, generator=generator)
    given_as = float(thresholds[0]) if one_threshold else thresholds
    mask = keep_mask(logits, given_as, Segments(lengths))
    assert mask.dtype == torch.bool
    expected = []
    for own in logits.sigmoid().split(lengths):
        rows = [[bool(s > thresholds[0 if one_threshold else c]) for c, s in enumerate(tile)] for tile in own]
        if not any(map(any, rows)):
            tile, branch = divmod(int(own.argmax()), n_classes)
            rows[tile][branch] = True
        expected += rows
    assert mask.tolist() == expected


# Thresholds


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    keep_ratio=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)
def test_thresholds_reach_the_ratio_as_closely_as_the_tiles_allow(sizes, keep_ratio, seed):
    rng = np.random.default_rng(seed)
    levels = torch.from_numpy(rng.permutation(sum(sizes)) % 256).byte()
    scores = [
        Brightness()(own[:, None, None, None].expand(-1, 16, 16, 3)).sigmoid() for own in levels.split(sizes)
    ]
    thresholds = thresholds_for_keep_ratio(scores, keep_ratio)
    kept = [float((s > thresholds).any(1).float().mean()) for s in scores]
    # One more tile of each branch would exceed the target: the gap is at most the weight of two tiles.
    assert -1e-6 <= keep_ratio - np.mean(kept) <= 2 / (min(sizes) * len(sizes)) + 1e-6


def test_every_branch_keeps_the_same_share():
    bags, _ = make_bags()
    scores = [Brightness()(torch.from_numpy(bag.patches)).sigmoid() for bag in bags.values()]
    thresholds = thresholds_for_keep_ratio(scores, 0.5)
    per_branch = (torch.cat(scores) > thresholds).sum(0)
    assert per_branch.max() - per_branch.min() <= 1  # bags of equal size: one tile, one step


def test_scores_may_come_one_slide_after_the_other():
    scores = [torch.rand(n, 2, generator=torch.Generator().manual_seed(n)) for n in (5, 1, 9)]
    once, again = (thresholds_for_keep_ratio(given, 0.4) for given in (iter(scores), scores))
    assert torch.equal(once, again)


# Two stages


def test_kept_tiles_alone_are_read(data):
    batch = data.batch(["s01"])
    features, patches = batch.features, batch.patches
    bright = Brightness()(patches)[:, 0].sigmoid()
    model = HDMIL(small_dmin(), Brightness(), thresholds=[float(bright.median()), 1.0])
    dropped = bright <= bright.median()
    poisoned = features.masked_fill(dropped[:, None], torch.nan)
    output, again = model(features, patches), model(poisoned, patches)
    assert dropped.sum() == 6
    assert output.keep_ratio.tolist() == [0.5]
    assert torch.equal(output.read, ~dropped)
    assert torch.equal(output.logits, again.logits)
    assert torch.equal(output.logits, model.dmin(features[~dropped]).logits)
    assert torch.equal(output.attention[~dropped], model.dmin(features[~dropped]).attention)
    assert output.attention[dropped].isnan().all()


@torch.inference_mode()
def test_as_published_each_branch_pools_the_tiles_that_lipn_kept_for_it(data):
    batch = data.batch(["s01"])
    features, patches = batch.features, batch.patches
    model = HDMIL(small_dmin(), Brightness(), thresholds=half(batch), pooling="lipn")
    mask = keep_mask(Brightness()(patches), model.thresholds, batch.segments)
    output = model(features, patches)
    assert torch.equal(output.mask, mask)
    for c in range(2):
        own = features[mask[:, c]]
        alone = model.dmin(own, mask=torch.ones(len(own), 2))
        torch.testing.assert_close(output.logits[:, c], alone.logits[:, c])
    dmin_pools = model.with_rules(pooling="dmin")(features, patches).logits
    assert not torch.allclose(dmin_pools, output.logits)


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["dmin", "lipn"])
@pytest.mark.parametrize("all_tiles", [False, True])
def test_bags_together_are_bags_one_by_one(pooling, all_tiles):
    bags = {f"s{i}": make_bag(f"s{i}", i % 2, n) for i, n in enumerate((7, 1, 24, 12, 3))}
    data = BagDataset(bags)
    batch = data.batch(data.slide_ids)
    model = HDMIL(small_dmin(), Brightness(), thresholds=half(batch), pooling=pooling)
    together = model(**batch.inputs_for(model), all_tiles=all_tiles)
    assert together.logits.shape == (5, 2)
    assert together.keep_ratio.shape == (5,)
    lengths = list(batch.segments.lengths)
    for i, slide_id in enumerate(data.slide_ids):
        one = data.batch([slide_id])
        alone = model(one.features, one.patches, all_tiles=all_tiles)
        torch.testing.assert_close(together.logits[i : i + 1], alone.logits)
        assert together.keep_ratio[i : i + 1].tolist() == alone.keep_ratio.tolist()
        for name in ("mask", "read"):
            assert torch.equal(getattr(together, name).split(lengths)[i], getattr(alone, name))
        own_attention = together.attention.split(lengths)[i]
        torch.testing.assert_close(own_attention, alone.attention, equal_nan=True)


@torch.inference_mode()
def test_reading_all_tiles_is_dmin_alone(data):
    """HDMIL† in the paper."""
    batch = data.batch(["s01", "s02"])
    model = HDMIL(small_dmin(), NotAsked())
    output = model(batch.features, batch.patches, batch.segments, all_tiles=True)
    expected = model.dmin(batch.features, batch.segments)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.attention, expected.attention)
    assert torch.equal(output.mask, expected.mask.bool())
    assert output.keep_ratio.tolist() == [1, 1]
    assert output.read.all()
    plain = HDMIL(small_dmin(self_distillation=False), NotAsked())
    assert plain(batch.features, batch.patches, batch.segments, all_tiles=True).mask.all()
    with pytest.raises(AssertionError, match="LIPN was asked"):
        model(batch.features, batch.patches, batch.segments)


def test_a_slide_of_which_nothing_is_kept_is_answered_from_its_best_tile(data):
    batch = data.batch(["s01", "s02"])
    model = HDMIL(small_dmin(), Brightness(), thresholds=1.0)
    output = model(batch.features, batch.patches, batch.segments)
    assert output.read.view(2, 12).sum(1).tolist() == [1, 1]
    torch.testing.assert_close(output.keep_ratio, torch.full((2,), 1 / 12))
    assert output.logits.isfinite().all()


def test_a_model_starts_in_evaluation_mode_at_the_threshold_of_its_dmin():
    model = HDMIL(small_dmin(threshold=0.7).train(), LIPN(2).train())
    assert not model.dmin.training
    assert not model.lipn.training
    torch.testing.assert_close(model.thresholds, torch.full((2,), 0.7))
    torch.testing.assert_close(model.trained_thresholds, torch.full((2,), 0.7))
    assert model.margin == torch.inf


# What does not fit


def test_rows_and_bags_that_do_not_belong_together_are_refused(data):
    batch = data.batch(["s01", "s02"])
    features, patches, model = batch.features, batch.patches, HDMIL(small_dmin(), LIPN(2))
    with pytest.raises(BagError, match="23 patches and 24 rows of features"):
        model(features, patches[1:], batch.segments)
    with pytest.raises(BagError, match=r"expected \(n_tiles, 16\)"):
        model(features[:, 1:], patches, batch.segments)
    with pytest.raises(BagError, match=r"expected torch.uint8 of shape \(n_tiles, 16, 16, 3\)"):
        model(features, patches.float(), batch.segments)
    with pytest.raises(ValueError, match="segments covers 20 tiles"):
        model(features, patches, Segments([12, 8]))
    with pytest.raises(ValueError, match="segments is a Tensor, expected a Segments"):
        model(features, patches, torch.tensor([0, 12, 24]))
    for all_tiles in (False, True):
        with pytest.raises(BagError, match="no tiles"):
            model(features, patches, Segments([12, 0, 12]), all_tiles=all_tiles)
        with pytest.raises(BagError, match="no tiles"):
            model(features[:0], patches[:0], all_tiles=all_tiles)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": [0.5]}, r"thresholds have shape \(1,\), expected one number, or one for each of 2"),
        ({"thresholds": [0.1, 0.2, 0.3]}, r"thresholds have shape \(3,\)"),
        ({"thresholds": [[0.1, 0.2]]}, r"thresholds have shape \(1, 2\)"),
        ({"thresholds": 1.5}, "thresholds are .*, expected numbers from 0 to 1"),
        ({"thresholds": float("nan")}, "thresholds are nan, expected numbers from 0 to 1"),
        ({"trained_thresholds": -1.0}, "thresholds are -1.0, expected numbers from 0 to 1"),
        ({"margin": 0.0}, "margin is 0.0, expected more than 0"),
        ({"margin": float("nan")}, "margin is nan, expected more than 0"),
        ({"pooling": "both"}, "pooling is 'both', expected 'dmin' or 'lipn'"),
    ],
)
def test_rules_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HDMIL(small_dmin(), LIPN(2), **options)


def test_networks_of_different_classes_are_refused():
    with pytest.raises(ValueError, match="dmin has 3 classes, lipn has 2"):
        HDMIL(small_dmin(3), LIPN(2))
