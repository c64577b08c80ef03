"""HDMIL as one model: what is read, that slide, bag and batch agree, and that rules travel with it."""

import math

import numpy as np
import pytest
import torch
from bag_factory import make_bag
from model_factory import INFO, ColorEncoder, make_model, write_textured_slide
from slide_factory import damage_tile, write_slide

from hdmil_lib.batches import BagDataset
from hdmil_lib.encoders.extraction import extract_slide
from hdmil_lib.errors import BagError, CheckpointError, SlideError
from hdmil_lib.inference.anytime import lipn_scores
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import DMIN, HDMIL, LIPN, hdmil
from hdmil_lib.slides import Slide, TileGrid


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return write_textured_slide(tmp_path_factory.mktemp("slides") / "slide.tif")


def spy_on_tile_reads(monkeypatch):
    """Level-0 corners of every field that is read at tile resolution."""
    read, fields = Slide.read_field, []

    def read_field(self, x, y, *rest):
        fields.append((x, y))
        return read(self, x, y, *rest)

    monkeypatch.setattr(Slide, "read_field", read_field)
    return fields


def patches_of(path):
    with Slide(path) as slide:
        return TileGrid.from_slide(slide).patches


# Slides


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_dropped_tiles_are_never_read(slide, monkeypatch, keep):
    model = make_model(slide, keep)
    fields = spy_on_tile_reads(monkeypatch)
    prediction = model.predict(slide)
    kept = set(map(tuple, prediction.coords[prediction.kept].tolist()))
    assert set(fields) == kept
    assert len(fields) == len(kept)
    assert 0 < len(kept) <= np.ceil(keep * prediction.n_tiles) < prediction.n_tiles
    assert prediction.n_read == len(kept)
    np.testing.assert_array_equal(np.isnan(prediction.attention).any(axis=1), ~prediction.kept)


def test_with_all_tiles_every_tile_is_read_and_dmin_selects(slide, monkeypatch):
    model = make_model(slide)
    fields = spy_on_tile_reads(monkeypatch)
    prediction = model.predict(slide, all_tiles=True)
    assert len(fields) == prediction.n_tiles == prediction.n_read == 35
    np.testing.assert_array_equal(prediction.mask, prediction.attention > 0)
    assert "lipn" not in prediction.seconds


@pytest.mark.parametrize("all_tiles", [False, True])
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("pooling", ["dmin", "lipn"])
def test_slide_and_stored_bag_give_the_same_prediction(slide, tmp_path, all_tiles, n_classes, pooling):
    model = make_model(slide, n_classes=n_classes).with_rules(pooling=pooling)
    bag = extract_slide(slide, ColorEncoder(), tmp_path / "slide.h5")
    from_slide = model.predict(slide, all_tiles=all_tiles)
    from_bag = model.predict(bag, all_tiles=all_tiles)
    np.testing.assert_array_equal(from_bag.mask, from_slide.mask)
    np.testing.assert_array_equal(from_bag.rowcol, from_slide.rowcol)
    np.testing.assert_array_equal(from_bag.coords, from_slide.coords)
    np.testing.assert_array_equal(from_bag.thumbnail, from_slide.thumbnail)
    assert from_bag.shape == from_slide.shape
    # bags keep features in float16: 11 bits, 5e-4 relative
    np.testing.assert_allclose(from_bag.probabilities, from_slide.probabilities, atol=2e-3)
    np.testing.assert_allclose(from_bag.attention, from_slide.attention, atol=5e-3)


def test_a_tile_of_a_bag_is_as_large_as_that_of_its_slide(tmp_path):
    """On a slide whose pixels are no squares, and whose tiles are no whole number of them."""
    pixels = np.full((1200, 900, 3), (150, 90, 170), np.uint8)
    path = write_slide(tmp_path / "s.tif", pixels, mpp=(0.37, 0.28))
    bag = extract_slide(path, ColorEncoder(), tmp_path / "s.h5")
    model = make_model()
    found = model.predict(path).tile_size_level0
    assert found == (346, 457) == model.predict(bag).tile_size_level0


def test_dmin_selects_by_itself_among_the_tiles_that_lipn_keeps(slide):
    model = make_model(slide)
    prediction = model.predict(slide)
    with Slide(slide) as opened:
        grid = TileGrid.from_slide(opened)
        tiles = np.stack([grid.read_tile(opened, i) for i in np.flatnonzero(prediction.kept)])
    features = torch.from_numpy(ColorEncoder()(tiles))
    with torch.inference_mode():
        expected = model.dmin(features).logits[0].softmax(0).numpy()
    np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-5)


def test_as_published_each_branch_pools_the_tiles_that_were_kept_for_it(slide):
    model = make_model(slide).with_rules(pooling="lipn")
    prediction = model.predict(slide)
    with Slide(slide) as opened:
        grid = TileGrid.from_slide(opened)
        tiles = np.stack([grid.read_tile(opened, i) for i in np.flatnonzero(prediction.kept)])
    features, mask = torch.from_numpy(ColorEncoder()(tiles)), prediction.mask[prediction.kept]
    assert (mask.sum(axis=0) < len(mask)).any()
    with torch.inference_mode():
        expected = model.dmin(features, mask=torch.from_numpy(mask)).logits[0].softmax(0).numpy()
    np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-5)
    assert not np.allclose(expected, make_model(slide).predict(slide).probabilities, atol=1e-5)


def test_where_lipn_keeps_nothing_its_best_tile_is_read(slide):
    model = make_model().with_rules(thresholds=1.0)
    prediction = model.predict(slide)
    best = lipn_scores(model, patches_of(slide)).argmax()
    assert np.flatnonzero(prediction.kept).tolist() == [best]
    assert np.isfinite(prediction.probabilities).all()


def test_a_slide_of_one_tile_predicts(tmp_path):
    pixels = np.full((260, 260, 3), (150, 90, 170), np.uint8)
    prediction = make_model().predict(write_slide(tmp_path / "one.tif", pixels))
    assert prediction.n_tiles == 1
    assert prediction.kept.tolist() == [True]
    assert prediction.probabilities.sum() == pytest.approx(1)


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
@pytest.mark.parametrize("n_readers", [0, 2])
def test_a_damaged_tile_is_counted_and_the_others_decide(tmp_path, compression, n_readers):
    """On both readers; OpenSlide gives up a file after its first error, which must not cost other tiles."""
    whole = write_textured_slide(tmp_path / "whole.tif", compression=compression)
    columns = 7 * 4  # stored tiles of 64 in a row of tiles of 256
    bad = damage_tile(whole, tmp_path / "bad.tif", [columns * 5 + 9])  # in tile (1, 2)
    model = make_model(whole)
    expected = model.predict(whole, all_tiles=True, n_readers=n_readers)
    prediction = model.predict(bad, all_tiles=True, n_readers=n_readers)
    assert prediction.rowcol[prediction.broken].tolist() == [[1, 2]]
    assert prediction.n_read == prediction.n_tiles - 1
    others = np.delete(np.arange(35), prediction.broken)
    np.testing.assert_allclose(prediction.attention[others], expected.attention[others], rtol=1e-5, atol=1e-6)
    assert np.isfinite(prediction.probabilities).all()
    with pytest.raises(SlideError, match=r"bad\.tif: cannot read level 0"):
        model.predict(bad, all_tiles=True, strict=True, n_readers=n_readers)


def test_a_slide_without_a_tile_to_read_is_an_error(tmp_path):
    whole = write_textured_slide(tmp_path / "whole.tif", compression="jpeg")
    bad = damage_tile(whole, tmp_path / "bad.tif", range(20 * 28))
    with pytest.raises(SlideError, match=r"bad\.tif: none of the 35 tiles"):
        make_model(whole).predict(bad, all_tiles=True)


def test_prescreening_does_not_depend_on_the_batch_or_the_mode(slide, monkeypatch):
    model = make_model(slide, n_classes=3)
    patches = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (37, 16, 16, 3), dtype=np.uint8))
    with torch.inference_mode():
        scores = model.lipn_logits(patches).sigmoid()
        monkeypatch.setattr(hdmil, "PATCHES_AT_ONCE", 8)
        # sums of a batch may be ordered otherwise: float32 rounding
        np.testing.assert_allclose(model.lipn_logits(patches).sigmoid(), scores, atol=1e-6)
        mask = model.screen(patches, Segments([37]))
    np.testing.assert_array_equal(mask, scores > model.thresholds)
    expected = model.predict(slide)
    model.train()
    prediction = model.predict(slide)
    np.testing.assert_array_equal(prediction.probabilities, expected.probabilities)
    np.testing.assert_array_equal(prediction.mask, expected.mask)


def test_stages_are_timed_and_add_up(slide):
    seconds = make_model(slide).predict(slide, n_readers=0).seconds
    assert set(seconds) == {"thumbnail", "lipn", "crop", "features", "dmin", "total"}
    stages = sum(value for stage, value in seconds.items() if stage != "total")
    assert min(seconds.values()) > 0
    assert 0.5 * seconds["total"] < stages <= seconds["total"]


def test_another_encoder_is_refused_and_both_are_named(slide, tmp_path):
    model = make_model(slide)
    other = ColorEncoder()
    other.weights_hash = "c02"
    with pytest.raises(CheckpointError, match=r"color \(weights c01\).*color \(weights c02\)"):
        model.encoder = other
    assert model.encoder.weights_hash == "c01"
    bag = extract_slide(slide, other, tmp_path / "slide.h5")
    for use in (model.predict, model.trajectory):
        with pytest.raises(BagError, match="c02.*c01"):
            use(bag)


def test_a_model_that_was_not_told_its_encoder_takes_bags_of_tensors_alone(slide):
    model = HDMIL(DMIN(6, 2, embed_dim=16, attention_dim=8, degree=3), LIPN(2))
    assert model.classes == ("0", "1")
    assert model(torch.randn(5, 6), torch.zeros(5, 16, 16, 3, dtype=torch.uint8)).logits.shape == (1, 2)
    for use in (model.predict, model.stream, lambda path: model.encoder):
        with pytest.raises(CheckpointError, match="does not know its encoder and classes"):
            use(slide)


# Batches


@pytest.mark.parametrize("pooling", ["dmin", "lipn"])
@pytest.mark.parametrize("all_tiles", [False, True])
@torch.inference_mode()
def test_bags_side_by_side_are_predicted_as_alone(pooling, all_tiles):
    names = {f"s{i}": make_bag(f"s{i}", i % 2, n, dim=6) for i, n in enumerate((12, 1, 30, 5))}
    batch = BagDataset(names).batch(list(names))
    middle = make_model().lipn_logits(batch.patches).sigmoid().quantile(0.7, dim=0)
    model = make_model().with_rules(thresholds=middle, pooling=pooling)
    output = model(**batch.inputs_for(model), all_tiles=all_tiles)
    assert output.logits.shape == (4, 2)
    assert output.mask.dtype == torch.bool
    first = 0
    for i, bag in enumerate(names.values()):
        features, patches = torch.from_numpy(bag.features).float(), torch.from_numpy(bag.patches)
        alone = model(features, patches, all_tiles=all_tiles)
        rows = slice(first, first := first + len(bag))
        np.testing.assert_allclose(output.logits[i], alone.logits[0], atol=1e-5)
        np.testing.assert_allclose(output.attention[rows], alone.attention, atol=1e-5)
        np.testing.assert_array_equal(output.mask[rows], alone.mask)
        np.testing.assert_array_equal(output.read[rows], alone.read)
        assert output.keep_ratio[i] == alone.keep_ratio[0] == alone.read.float().mean()
        assert alone.read.any()
        assert torch.equal(alone.attention.isnan().any(1), ~alone.read)
        if not all_tiles:
            np.testing.assert_array_equal(alone.mask.any(1), alone.read)
    assert all_tiles or 0 < output.read.float().mean() < 1


def test_networks_and_rules_that_do_not_fit_are_refused():
    dmin, lipn = DMIN(6, 2, embed_dim=16, attention_dim=8, degree=3), LIPN(2)
    for options, message in [
        ({"lipn": LIPN(3)}, "dmin has 2 classes, lipn has 3"),
        ({"info": INFO.model_copy(update={"classes": ("a", "b", "c")})}, "info names 3 classes"),
        ({"thresholds": (0.1, 0.2, 0.3)}, r"thresholds have shape \(3,\)"),
        ({"thresholds": 1.5}, "numbers from 0 to 1"),
        ({"thresholds": (0.5, math.nan)}, "numbers from 0 to 1"),
        ({"trained_thresholds": -0.1}, "numbers from 0 to 1"),
        ({"margin": 0.0}, "margin is 0.0, expected more than 0"),
        ({"margin": math.nan}, "margin is nan"),
        ({"pooling": "max"}, "pooling is 'max'"),
    ]:
        with pytest.raises(ValueError, match=message):
            HDMIL(**{"dmin": dmin, "lipn": lipn} | options)


# LIPN on a GPU: the packed network, made once


def test_a_network_is_packed_once_and_again_when_a_number_changes():
    model, other = make_model(), LIPN().eval()
    with torch.inference_mode():
        first = model.packed_lipn()
        assert model.packed_lipn() is first
        assert make_model().packed_lipn() is not first
        model.eval()
        assert model.packed_lipn() is first  # `predict` makes sure of the mode before every slide
    with torch.no_grad():
        model.lipn.classifier.bias += 1
    assert model.packed_lipn() is not first
    torch.testing.assert_close(model.packed_lipn()[-1], first[-1] + 1)
    second = model.packed_lipn()
    model.lipn.load_state_dict(other.state_dict())
    third = model.packed_lipn()
    assert third is not second
    model.to(torch.float64)
    assert model.packed_lipn() is not third


@pytest.mark.gpu
def test_scores_of_a_gpu_are_those_of_a_cpu_in_16_bits():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    model = make_model()
    patches = np.random.default_rng(0).integers(0, 256, (5000, 16, 16, 3), dtype=np.uint8)
    expected = lipn_scores(model, patches)
    np.testing.assert_allclose(lipn_scores(model.cuda(), patches), expected, atol=1e-2)  # 11 bits per layer


@pytest.mark.gpu
@pytest.mark.parametrize("all_tiles", [False, True])
def test_a_slide_is_predicted_on_a_gpu_as_on_a_cpu(slide, tmp_path, all_tiles):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    bag = extract_slide(slide, ColorEncoder(), tmp_path / "slide.h5")
    model = make_model(slide)
    expected = model.predict(bag, all_tiles=all_tiles), model.trajectory(bag)
    packed = model.cuda().packed_lipn()
    for source in (bag, slide):
        prediction = model.predict(source, all_tiles=all_tiles)
        differing = (prediction.mask != expected[0].mask).sum()
        assert differing <= 1  # a score next to its threshold
        if not differing:
            np.testing.assert_allclose(prediction.probabilities, expected[0].probabilities, atol=5e-3)
    assert model.packed_lipn() is packed
    np.testing.assert_allclose(
        model.trajectory(bag).probabilities[-1], expected[1].probabilities[-1], atol=5e-3
    )
    *_, last = model.stream(slide)
    np.testing.assert_allclose(last.probabilities, expected[1].probabilities[-1], atol=5e-3)


# Anytime


@pytest.mark.parametrize("n_readers", [0, 2])
@pytest.mark.parametrize("block", [1, 8, 100])
def test_a_stream_ends_with_the_answer_from_all_tiles(slide, block, n_readers):
    model = make_model(slide)
    steps = list(model.stream(slide, block=block, n_readers=n_readers))
    whole = model.predict(slide, all_tiles=True)
    assert len(steps) == -(-35 // block)
    np.testing.assert_allclose(steps[-1].probabilities, whole.probabilities, atol=1e-5)
    assert sorted(steps[-1].rows) == list(range(35))
    assert steps[-1].n_tiles == 35
    assert [step.end for step in steps] == [None] * (len(steps) - 1) + ["all tiles"]
    assert np.all(np.diff([step.seconds["total"] for step in steps]) > 0)
    stages = steps[-1].seconds
    assert set(stages) == {"thumbnail", "lipn", "crop", "features", "dmin", "total"}
    if n_readers == 0:
        assert sum(stages.values()) - stages["total"] <= stages["total"]


def test_a_stream_reads_what_lipn_ranks_highest_and_no_more(slide, monkeypatch):
    model = make_model(slide)
    best = np.argsort(-lipn_scores(model, patches_of(slide)), kind="stable")
    fields = spy_on_tile_reads(monkeypatch)
    *_, last = model.stream(slide, max_tiles=11, block=4)
    assert last.end == "max_tiles"
    assert set(last.rows) == set(best[:11])
    assert len(fields) == 11


def test_a_stream_stops_at_the_margin_at_the_time_or_with_its_loop(slide, monkeypatch):
    model = make_model(slide)
    fields = spy_on_tile_reads(monkeypatch)
    steps = list(model.stream(slide, margin=1e-6, block=4, n_readers=0))
    assert [step.end for step in steps] == ["margin"]
    assert len(fields) == 4
    steps = list(model.stream(slide, max_seconds=1e-6, block=4, n_readers=0))
    assert [step.end for step in steps] == ["max_seconds"]
    assert len(fields) == 8
    for _ in model.stream(slide, block=1, n_readers=2):
        break
    assert len(fields) <= 8 + 1 + 3  # the block of the answer and those read ahead


def test_a_stream_leaves_out_damaged_tiles(tmp_path):
    whole = write_textured_slide(tmp_path / "whole.tif", compression="jpeg")
    bad = damage_tile(whole, tmp_path / "bad.tif", [28 * 5 + 9])
    model = make_model(whole)
    *_, last = model.stream(bad, block=1)
    expected = model.predict(bad, all_tiles=True)
    np.testing.assert_allclose(last.probabilities, expected.probabilities, atol=1e-5)
    assert last.broken.tolist() == expected.broken.tolist()
    assert len(last.broken) == 1
    with pytest.raises(SlideError, match="none of the 35 tiles"):
        list(model.stream(damage_tile(whole, tmp_path / "worse.tif", range(20 * 28))))


def test_a_stored_bag_foretells_how_a_stream_goes(slide, tmp_path):
    model = make_model(slide)
    bag = extract_slide(slide, model.encoder, tmp_path / "bag.h5")
    steps = list(model.stream(slide))
    grown = model.trajectory(bag)
    assert grown.n_read.tolist() == [len(step.rows) for step in steps] == [32, 35]
    expected = [step.probabilities for step in steps]
    np.testing.assert_allclose(grown.probabilities, expected, atol=2e-3)  # bags hold 16 bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"max_seconds": 0.0}, "max_seconds is 0"),
        ({"margin": 0.0}, "margin is 0"),
        ({"margin": float("nan")}, "margin is nan"),
    ],
)
def test_a_stream_refuses_empty_budgets_at_once(slide, options, message):
    with pytest.raises(ValueError, match=message):
        make_model(slide).stream(slide, **options)


# Rules


def test_rules_travel_with_the_model(slide, tmp_path):
    model = make_model(slide)
    trained = model.thresholds.tolist()
    changed = model.with_rules(thresholds=0.0, margin=1e-6)
    assert changed.thresholds.tolist() == [0.0, 0.0]
    assert changed.trained_thresholds.tolist() == trained
    assert model.thresholds.tolist() == trained
    assert model.margin.isinf()
    changed.save_pretrained(tmp_path / "model")
    again = HDMIL.from_pretrained(tmp_path / "model")
    again.encoder = ColorEncoder()
    assert again.thresholds.tolist() == [0.0, 0.0]
    assert again.trained_thresholds.tolist() == trained
    assert float(again.margin) == np.float32(1e-6)
    assert again.predict(slide).n_read == 35
    assert [step.end for step in again.stream(slide, block=4)] == ["margin"]
    same = again.with_rules()
    for name in ("thresholds", "trained_thresholds", "margin"):
        assert torch.equal(getattr(same, name), getattr(again, name))
    assert (same.pooling, same.info, same.encoder) == (again.pooling, again.info, again.encoder)
    assert again.with_rules(margin=math.inf).margin.isinf()
    each = again.with_rules(thresholds=(0.1, 0.2), pooling="lipn")
    np.testing.assert_allclose(each.thresholds, (0.1, 0.2), rtol=1e-6)
    assert each.pooling == "lipn"
    with pytest.raises(ValueError, match="margin is 0"):
        again.with_rules(margin=0.0)
