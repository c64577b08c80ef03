"""SMT opens what it promises, lets nothing else decide, and learns at every magnification."""

import math

import numpy as np
import pytest
import torch
from bag_factory import DIM, make_bag, make_bags, make_split
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.errors import BagError
from hdmil_lib.models.ragged import cumulative
from hdmil_lib.models.smt import SMT, best_share, grid_positions, regions
from hdmil_lib.training.losses import bag_loss
from hdmil_lib.training.fit import TrainSettings, train_model


def small_smt(n_classes=2, seed=0, **options):
    torch.manual_seed(seed)
    return SMT(DIM, n_classes, embed_dim=16, image_dim=16, **options)


def random_bag(n_tiles, seed=0, side=12, pitch=511.7):
    """Features in float64, patches, and coordinates of random places on a grid, rounded to pixels."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.divmod(rng.permutation(side * side)[:n_tiles], side)[::-1], axis=1)
    coords = np.rint(places * pitch + (1234.4, 99.9)).astype(np.int64)
    patches = rng.integers(0, 256, (n_tiles, 16, 16, 3), dtype=np.uint8)
    return [torch.from_numpy(a) for a in (rng.normal(size=(n_tiles, DIM)), patches, coords)]


def ask(model, features, patches, coords, cu_seqlens=None):
    return model(features, cu_seqlens, patches=patches, coords=coords)


@settings(max_examples=60, deadline=None)
@given(
    columns=st.integers(1, 300),
    rows=st.integers(1, 300),
    pitch=st.floats(200, 1100),
    n_tiles=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_places_on_the_grid_survive_a_pitch_that_is_no_whole_number(columns, rows, pitch, n_tiles, seed):
    rng = np.random.default_rng(seed)
    places = np.stack((rng.integers(columns, size=n_tiles), rng.integers(rows, size=n_tiles)), axis=1)
    places = np.concatenate((places, [places[0] + (0, 1)]))  # two tiles at least touch, as tissue's do
    coords = np.rint(places * pitch + rng.uniform(0, 5000, 2)).astype(np.int64)
    found = grid_positions(torch.from_numpy(coords), cumulative([len(coords)]))
    np.testing.assert_array_equal(found, places - places.min(0))


@pytest.mark.parametrize("axis", [0, 1])
def test_one_row_or_one_column_of_tiles_is_a_grid(axis):
    coords = torch.full((5, 2), 700)
    coords[:, axis] = torch.tensor([1024, 0, 512, 2048, 4096])
    expected = torch.zeros(5, 2, dtype=torch.int64)
    expected[:, axis] = torch.tensor([2, 0, 1, 4, 8])
    assert torch.equal(grid_positions(coords, cumulative([5])), expected)


def test_bags_of_different_pitch_have_their_own_grids():
    bags = [random_bag(n, seed=n, pitch=pitch)[2] for n, pitch in ((40, 512.0), (1, 300.0), (25, 255.3))]
    together = grid_positions(torch.cat(bags), cumulative([40, 1, 25]))
    alone = [grid_positions(coords, cumulative([len(coords)])) for coords in bags]
    assert torch.equal(together, torch.cat(alone))


def test_regions_are_the_tiles_patches_four_times_coarser_side_by_side():
    bags = [random_bag(30, seed=1), random_bag(9, seed=2)]
    patches, coords = (torch.cat([bag[i] for bag in bags]) for i in (1, 2))
    cu_seqlens = cumulative([30, 9])
    images, region, region_cu = regions(patches, coords, cu_seqlens)
    expected = {}
    bag = np.repeat([0, 1], [30, 9])
    places = grid_positions(coords, cu_seqlens).tolist()
    for i, (column, row) in enumerate(places):
        key = bag[i], row // 4, column // 4
        image = expected.setdefault(key, np.full((16, 16, 3), 0.5))
        for y in range(4):
            for x in range(4):
                block = patches[i].numpy()[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].astype(float)
                image[4 * (row % 4) + y, 4 * (column % 4) + x] = block.mean((0, 1)) / 255 - 0.5
    keys = sorted(expected)
    np.testing.assert_allclose(images, np.stack([expected[key] for key in keys]), atol=1e-6)  # float32
    own = [keys.index((bag[i], row // 4, column // 4)) for i, (column, row) in enumerate(places)]
    assert region.tolist() == own
    assert region_cu.tolist() == [0, sum(key[0] == 0 for key in keys), len(keys)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    share=st.sampled_from([0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_best_share_is_the_highest_scores_rounded_up(lengths, share, seed):
    scores = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))
    kept = best_share(scores, cumulative(lengths), share)
    for values, chosen in zip(scores.split(lengths), kept.split(lengths), strict=True):
        n = math.ceil(round(len(values) * share, 6))
        assert set(chosen.nonzero()[:, 0].tolist()) == set(values.topk(n).indices.tolist())


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.3, 0.1), (1.0, 0.25), (0.25, 1.0), (1.0, 1.0)])
def test_as_many_tiles_are_read_as_promised_and_they_lie_in_as_many_regions(shares):
    model = small_smt(region_share=shares[0], patch_share=shares[1]).double().eval()
    features, patches, coords = random_bag(100)
    output = ask(model, features, patches, coords)
    _, region, region_cu = regions(patches, coords, cumulative([100]))
    n_opened = math.ceil(round(shares[0] * int(region_cu[-1]), 6))
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
    features, patches, coords = random_bag(80)
    output = ask(model, features, patches, coords)
    read = output.attention[:, 0].isfinite()
    poisoned = features.masked_fill(~read[:, None], torch.nan)
    again = ask(model, poisoned, patches, coords)
    assert 0.2 < output.keep_ratio < 0.35
    assert torch.equal(output.logits, again.logits)
    assert torch.equal(output.attention.nan_to_num(), again.attention.nan_to_num())
    changed = features.clone()
    changed[read.nonzero()[0]] += 1
    assert not torch.equal(output.logits, ask(model, changed, patches, coords).logits)


def test_tiles_that_no_region_opened_are_not_even_seen_as_patches():
    """With everything read of what is opened, a change that a region's blurred image hides has no effect."""
    model = small_smt(patch_share=1.0).double().eval()
    features, patches, coords = random_bag(80)
    output = ask(model, features, patches, coords)
    closed = output.attention[:, 0].isnan()
    blurred = patches.unflatten(2, (4, 4)).unflatten(1, (4, 4))
    turned = blurred.flip(2).flatten(1, 2).flatten(2, 3)  # rows within each 4x4 block: the same mean

    def with_turned(tiles):
        return ask(model, features, torch.where(tiles[:, None, None, None], turned, patches), coords).logits

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


def test_grid_indices_or_a_shifted_slide_give_the_same_answer():
    model = small_smt().double().eval()
    features, patches, coords = random_bag(60)
    expected = ask(model, features, patches, coords).logits
    for same in (grid_positions(coords, cumulative([60])), coords + 10_000):
        assert torch.equal(ask(model, features, patches, same).logits, expected)


def test_bags_together_are_bags_one_by_one():
    model = small_smt().double().eval()
    bags = [random_bag(n, seed=n, pitch=200.0 + n) for n in (50, 1, 17, 100, 2)]
    lengths = [len(bag[0]) for bag in bags]
    together = ask(model, *(torch.cat(rows) for rows in zip(*bags, strict=True)), cumulative(lengths))
    assert together.logits.shape == together.region_logits.shape == together.patch_logits.shape == (5, 2)
    for i, bag in enumerate(bags):
        alone = ask(model, *bag)
        for name in together.PER_BAG:
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name))
        attention = together.attention.split(lengths)[i]
        torch.testing.assert_close(attention, alone.attention, equal_nan=True)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_bag_of_one_tile_trains_and_predicts(n_classes):
    model = small_smt(n_classes)
    features, patches, coords = random_bag(1)
    output = ask(model, features.float(), patches, coords)
    total, terms = bag_loss(model, output, n_classes - 1)
    total.backward()
    assert output.logits.shape == (n_classes,) and output.keep_ratio == 1
    assert set(terms) == {"bag", "region", "patch"} and total.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_final_cross_entropy_alone_reaches_every_stage():
    model = small_smt(auxiliary=0.0).eval()
    features, patches, coords = random_bag(100)
    bag_loss(model, ask(model, features.float(), patches, coords), 1)[0].backward()
    for stage in (model.regions, model.patches, model.tiles):
        for part in (stage.embedding, stage.attention):
            assert max(p.grad.abs().max() for p in part.parameters()) > 0


def test_the_loss_is_three_cross_entropies():
    model = small_smt(auxiliary=0.3).double().eval()
    output = ask(model, *random_bag(40))
    logits = (output.logits, output.region_logits, output.patch_logits)
    final, region, patch = (-each.log_softmax(0)[1] for each in logits)
    total, _ = bag_loss(model, output, 1)
    torch.testing.assert_close(total, final + 0.3 * (region + patch))


def test_it_learns_a_small_cohort_and_opens_the_tumor(tmp_path):
    """Tumor is dark on the thumbnail and shifted in the features: every magnification can tell."""
    bags, labels = make_bags(24, n_tiles=36)
    split = make_split(bags)
    model = small_smt()
    training = TrainSettings(learning_rate=2e-3, epochs=15, min_epochs=15, batch_size=2)
    history = train_model(model, bags, split, labels, training, tmp_path)
    assert history["val_auc"].max() == 1.0
    read = []
    for slide_id in (s for s in split.test if labels[s]):
        bag = bags[slide_id]
        features = torch.from_numpy(bag.features).float()
        output = ask(model, features, *(torch.from_numpy(a) for a in (bag.patches, bag.coords)))
        read.append(output.attention[:12, 0].isfinite().sum() / output.attention.isfinite().sum())
    assert np.mean(read) > 0.6  # a third of the tiles are tumor


@pytest.mark.parametrize("options", [{"region_share": 0}, {"patch_share": 1.5}, {"image_dim": 10}])
def test_settings_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SMT(DIM, 2, **options)


def test_rows_that_do_not_belong_together_are_refused_by_name():
    model = small_smt()
    bag = make_bag("s01", 1)
    features, patches, coords = (torch.from_numpy(a) for a in (bag.features, bag.patches, bag.coords))
    with pytest.raises(BagError, match="patches are"):
        ask(model, features.float(), patches[1:], coords)
    with pytest.raises(BagError, match="patches are torch.float32"):
        ask(model, features.float(), patches.float(), coords)
    with pytest.raises(BagError, match="coords have shape"):
        ask(model, features.float(), patches, coords[:, :1])
