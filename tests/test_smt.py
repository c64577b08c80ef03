"""SMT opens what it promises, lets nothing else decide, and learns at every magnification."""

import math

import numpy as np
import pytest
import torch
from bag_factory import DIM, make_bag, make_data, make_split
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.errors import BagError
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.smt import SMT, best_share, regions
from hdmil_lib.training.fit import TrainSettings, fit


def small_smt(n_classes=2, seed=0, **options):
    torch.manual_seed(seed)
    return SMT(DIM, n_classes, embed_dim=16, image_dim=16, **options)


def random_bag(n_tiles, seed=0, side=12, first=(7, 3)):
    """Features in float64, patches, and random places on a grid whose first tissue is not in its corner."""
    rng = np.random.default_rng(seed)
    rowcol = np.stack(np.divmod(rng.permutation(side * side)[:n_tiles], side), axis=1) + first
    patches = rng.integers(0, 256, (n_tiles, 16, 16, 3), dtype=np.uint8)
    return [torch.from_numpy(a) for a in (rng.normal(size=(n_tiles, DIM)), patches, rowcol)]


def ask(model, features, patches, rowcol, segments=None):
    return model(features, segments, patches=patches, rowcol=rowcol)


def loss(model, output, *labels):
    return sum(model.loss(output, torch.tensor(labels)).values())


def test_regions_are_the_tiles_patches_four_times_coarser_side_by_side():
    bags = [random_bag(30, seed=1), random_bag(9, seed=2)]
    patches, rowcol = (torch.cat([bag[i] for bag in bags]) for i in (1, 2))
    images, region, slide_regions = regions(patches, rowcol, Segments([30, 9]))
    expected = {}
    bag = np.repeat([0, 1], [30, 9])
    places = [place for _, _, own in bags for place in (own - own.amin(0)).tolist()]
    for i, (row, column) in enumerate(places):
        key = bag[i], row // 4, column // 4
        image = expected.setdefault(key, np.full((16, 16, 3), 0.5))
        for y in range(4):
            for x in range(4):
                block = patches[i].numpy()[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].astype(float)
                image[4 * (row % 4) + y, 4 * (column % 4) + x] = block.mean((0, 1)) / 255 - 0.5
    keys = sorted(expected)
    np.testing.assert_allclose(images, np.stack([expected[key] for key in keys]), atol=1e-6)  # float32
    own = [keys.index((bag[i], row // 4, column // 4)) for i, (row, column) in enumerate(places)]
    assert region.tolist() == own
    assert slide_regions.offsets.tolist() == [0, sum(key[0] == 0 for key in keys), len(keys)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    share=st.sampled_from([0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_best_share_is_the_highest_scores_rounded_up(lengths, share, seed):
    scores = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))
    kept = best_share(scores, Segments(lengths), share)
    for values, chosen in zip(scores.split(lengths), kept.split(lengths), strict=True):
        n = math.ceil(round(len(values) * share, 6))
        assert set(chosen.nonzero()[:, 0].tolist()) == set(values.topk(n).indices.tolist())


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.3, 0.1), (1.0, 0.25), (0.25, 1.0), (1.0, 1.0)])
def test_as_many_tiles_are_read_as_promised_and_they_lie_in_as_many_regions(shares):
    model = small_smt(region_share=shares[0], patch_share=shares[1]).double().eval()
    features, patches, rowcol = random_bag(100)
    output = ask(model, features, patches, rowcol)
    _, region, slide_regions = regions(patches, rowcol, Segments([100]))
    n_opened = math.ceil(round(shares[0] * slide_regions.n_tiles, 6))
    read = output.attention[:, 0].isfinite()
    assert output.keep_ratio.item() == pytest.approx(read.double().mean().item())
    assert len(region[read].unique()) <= n_opened
    sizes = region.bincount().sort().values
    fewest, most = (
        math.ceil(round(shares[1] * int(part.sum()), 6)) for part in (sizes[:n_opened], sizes[-n_opened:])
    )
    assert fewest <= read.sum() <= most
    if shares == (1.0, 0.25):
        assert read.sum() == 25


def test_only_the_features_of_opened_tiles_decide():
    model = small_smt().double().eval()
    features, patches, rowcol = random_bag(80)
    output = ask(model, features, patches, rowcol)
    read = output.attention[:, 0].isfinite()
    poisoned = features.masked_fill(~read[:, None], torch.nan)
    again = ask(model, poisoned, patches, rowcol)
    assert 0.2 < output.keep_ratio < 0.35
    assert torch.equal(output.logits, again.logits)
    assert torch.equal(output.attention.nan_to_num(), again.attention.nan_to_num())
    changed = features.clone()
    changed[read.nonzero()[0]] += 1
    assert not torch.equal(output.logits, ask(model, changed, patches, rowcol).logits)


def test_tiles_that_no_region_opened_are_not_even_seen_as_patches():
    """With everything read of what is opened, a change that a region's blurred image hides has no effect."""
    model = small_smt(patch_share=1.0).double().eval()
    features, patches, rowcol = random_bag(80)
    output = ask(model, features, patches, rowcol)
    closed = output.attention[:, 0].isnan()
    blurred = patches.unflatten(2, (4, 4)).unflatten(1, (4, 4))
    turned = blurred.flip(2).flatten(1, 2).flatten(2, 3)  # rows within each 4x4 block: the same mean

    def with_turned(tiles):
        return ask(model, features, torch.where(tiles[:, None, None, None], turned, patches), rowcol).logits

    assert closed.any()
    # the mean of a block in float32 depends on the order of its pixels in the last bit
    torch.testing.assert_close(with_turned(closed), output.logits, rtol=0, atol=1e-7)
    assert (with_turned(~closed) - output.logits).abs().max() > 1e-5


def test_the_order_of_tiles_does_not_matter():
    model = small_smt().double().eval()
    bag = random_bag(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    straight, shuffled = ask(model, *bag), ask(model, *(rows[order] for rows in bag))
    torch.testing.assert_close(shuffled.logits, straight.logits)
    torch.testing.assert_close(shuffled.attention, straight.attention[order], equal_nan=True)


def test_where_on_the_grid_the_tissue_lies_does_not_matter():
    model = small_smt().double().eval()
    features, patches, rowcol = random_bag(60)
    expected = ask(model, features, patches, rowcol).logits
    for same in (rowcol - rowcol.amin(0), rowcol + 10_001):
        assert torch.equal(ask(model, features, patches, same).logits, expected)


def test_bags_together_are_bags_one_by_one():
    model = small_smt().double().eval()
    bags = [random_bag(n, seed=n, first=(n % 7, n)) for n in (50, 1, 17, 100, 2)]
    lengths = [len(bag[0]) for bag in bags]
    together = ask(model, *(torch.cat(rows) for rows in zip(*bags, strict=True)), Segments(lengths))
    assert together.logits.shape == together.region_logits.shape == together.patch_logits.shape == (5, 2)
    for i, bag in enumerate(bags):
        alone = ask(model, *bag)
        for name in ("logits", "region_logits", "patch_logits", "keep_ratio"):
            torch.testing.assert_close(getattr(together, name)[i : i + 1], getattr(alone, name))
        attention = together.attention.split(lengths)[i]
        torch.testing.assert_close(attention, alone.attention, equal_nan=True)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_bag_of_one_tile_trains_and_predicts(n_classes):
    model = small_smt(n_classes)
    features, patches, rowcol = random_bag(1)
    output = ask(model, features.float(), patches, rowcol)
    terms = model.loss(output, torch.tensor([n_classes - 1]))
    total = sum(terms.values())
    total.backward()
    assert output.logits.shape == (1, n_classes)
    assert output.keep_ratio.tolist() == [1]
    assert set(terms) == {"bag", "region", "patch"}
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_final_cross_entropy_alone_reaches_every_stage():
    model = small_smt(auxiliary=0.0).eval()
    features, patches, rowcol = random_bag(100)
    loss(model, ask(model, features.float(), patches, rowcol), 1).backward()
    for stage in (model.regions, model.patches, model.tiles):
        for part in (stage.embedding, stage.attention):
            assert max(p.grad.abs().max() for p in part.parameters()) > 0


def test_the_loss_is_three_cross_entropies():
    model = small_smt(auxiliary=0.3).double().eval()
    output = ask(model, *random_bag(40))
    logits = (output.logits, output.region_logits, output.patch_logits)
    final, region, patch = (-each.log_softmax(1)[0, 1] for each in logits)
    terms = model.loss(output, torch.tensor([1]))
    for name, expected in (("bag", final), ("region", 0.3 * region), ("patch", 0.3 * patch)):
        torch.testing.assert_close(terms[name], expected)
    torch.testing.assert_close(sum(terms.values()), final + 0.3 * (region + patch))


def test_it_learns_a_small_cohort_and_opens_the_tumor(tmp_path):
    """Tumor is dark on the thumbnail and shifted in the features: every magnification can tell."""
    data = make_data(24, n_tiles=36)
    split = make_split(data.slide_ids)
    model = small_smt()
    training = TrainSettings(learning_rate=2e-3, epochs=15, min_epochs=15, batch_size=2)
    history = fit(model, data, split, training, out=tmp_path)
    assert history["val_auc"].max() == 1.0
    read = []
    for slide_id in (s for s in split.test if data.labels[s]):
        output = model(**data.batch([slide_id]).inputs_for(model))
        read.append(output.attention[:12, 0].isfinite().sum() / output.attention.isfinite().sum())
    assert np.mean(read) > 0.6  # a third of the tiles are tumor


@pytest.mark.parametrize("options", [{"region_share": 0}, {"patch_share": 1.5}, {"image_dim": 10}])
def test_settings_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SMT(DIM, 2, **options)


def test_rows_that_do_not_belong_together_are_refused_by_name():
    model = small_smt()
    bag = make_bag("s01", 1)
    features, patches, rowcol = (torch.from_numpy(a) for a in (bag.features, bag.patches, bag.rowcol))
    with pytest.raises(BagError, match="patches are"):
        ask(model, features.float(), patches[1:], rowcol)
    with pytest.raises(BagError, match="patches are torch.float32"):
        ask(model, features.float(), patches.float(), rowcol)
    with pytest.raises(BagError, match=r"rowcol is int64 of shape \(12, 1\), expected integers \(12, 2\)"):
        ask(model, features.float(), patches, rowcol[:, :1])
    with pytest.raises(BagError, match="rowcol is float32"):
        ask(model, features.float(), patches, rowcol.float())
