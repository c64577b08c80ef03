"""Two-stage inference: what is read, that slide and bag agree, and model folders."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from model_factory import CONFIG, ColorEncoder, make_predictor, write_textured_slide
from slide_factory import damage_tile, write_slide

from hdmil_lib.errors import BagError, CheckpointError, SlideError
from hdmil_lib.encoders.extraction import extract_slide
from hdmil_lib.inference import Predictor, prescreen
from hdmil_lib.models import LIPN
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


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_dropped_tiles_are_never_read(slide, monkeypatch, keep):
    predictor = make_predictor(slide, keep)
    fields = spy_on_tile_reads(monkeypatch)
    prediction = predictor.predict(slide)
    kept = set(map(tuple, prediction.coords[prediction.kept].tolist()))
    assert set(fields) == kept and len(fields) == len(kept)
    assert 0 < len(kept) <= np.ceil(keep * prediction.n_tiles) < prediction.n_tiles
    assert prediction.n_read == len(kept)
    np.testing.assert_array_equal(np.isnan(prediction.attention).any(axis=1), ~prediction.kept)


def test_without_prescreening_every_tile_is_read_and_dmin_selects(slide, monkeypatch):
    predictor = make_predictor(slide)
    fields = spy_on_tile_reads(monkeypatch)
    prediction = predictor.predict(slide, prescreen=False)
    assert len(fields) == prediction.n_tiles == prediction.n_read == 35
    np.testing.assert_array_equal(prediction.mask, prediction.attention > 0)
    assert "lipn" not in prediction.seconds


@pytest.mark.parametrize("screened", [True, False])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_slide_and_stored_bag_give_the_same_prediction(slide, tmp_path, screened, n_classes):
    predictor = make_predictor(slide, n_classes=n_classes)
    bag = extract_slide(slide, ColorEncoder(), tmp_path / "slide.h5")
    from_slide, from_bag = predictor.predict(slide, prescreen=screened), None
    from_bag = predictor.predict_bag(bag, prescreen=screened)
    np.testing.assert_array_equal(from_bag.mask, from_slide.mask)
    np.testing.assert_array_equal(from_bag.rowcol, from_slide.rowcol)
    np.testing.assert_array_equal(from_bag.thumbnail, from_slide.thumbnail)
    # bags keep features in float16: 11 bits, 5e-4 relative
    np.testing.assert_allclose(from_bag.probabilities, from_slide.probabilities, atol=2e-3)
    np.testing.assert_allclose(from_bag.attention, from_slide.attention, atol=5e-3)


def test_dmin_selects_by_itself_among_the_tiles_that_lipn_keeps(slide):
    predictor = make_predictor(slide)
    prediction = predictor.predict(slide)
    with Slide(slide) as opened:
        grid = TileGrid.from_slide(opened)
        tiles = np.stack([grid.read_tile(opened, i) for i in np.flatnonzero(prediction.kept)])
    features = torch.from_numpy(ColorEncoder()(tiles))
    with torch.inference_mode():
        expected = predictor.dmin(features).logits.softmax(0).numpy()
    np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-5)


def test_where_lipn_keeps_nothing_its_best_tile_is_read(slide, monkeypatch):
    predictor = make_predictor()
    predictor.config = replace(CONFIG, thresholds=(1.0, 1.0))
    prediction = predictor.predict(slide)
    with Slide(slide) as opened:
        scores = prescreen(predictor.lipn, TileGrid.from_slide(opened).patches, 0.5)[1]
    assert np.flatnonzero(prediction.kept).tolist() == [scores.max(axis=1).argmax()]
    assert np.isfinite(prediction.probabilities).all()


def test_a_slide_of_one_tile_predicts(tmp_path):
    pixels = np.full((260, 260, 3), (150, 90, 170), np.uint8)
    prediction = make_predictor().predict(write_slide(tmp_path / "one.tif", pixels))
    assert prediction.n_tiles == 1 and prediction.kept.tolist() == [True]
    assert prediction.probabilities.sum() == pytest.approx(1)


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
@pytest.mark.parametrize("n_readers", [0, 2])
def test_a_damaged_tile_is_counted_and_the_others_decide(tmp_path, compression, n_readers):
    """On both readers; OpenSlide gives up a file after its first error, which must not cost other tiles."""
    whole = write_textured_slide(tmp_path / "whole.tif", compression=compression)
    columns = 7 * 4  # stored tiles of 64 in a row of tiles of 256
    bad = damage_tile(whole, tmp_path / "bad.tif", [columns * 5 + 9])  # in tile (1, 2)
    predictor = make_predictor(whole)
    expected = predictor.predict(whole, prescreen=False, n_readers=n_readers)
    prediction = predictor.predict(bad, prescreen=False, n_readers=n_readers)
    assert prediction.rowcol[prediction.broken].tolist() == [[1, 2]]
    assert prediction.n_read == prediction.n_tiles - 1
    others = np.delete(np.arange(35), prediction.broken)
    np.testing.assert_allclose(prediction.attention[others], expected.attention[others], rtol=1e-5, atol=1e-6)
    assert np.isfinite(prediction.probabilities).all()
    with pytest.raises(SlideError, match=r"bad\.tif: cannot read level 0"):
        predictor.predict(bad, prescreen=False, strict=True, n_readers=n_readers)


def test_a_slide_without_a_tile_to_read_is_an_error(tmp_path):
    whole = write_textured_slide(tmp_path / "whole.tif", compression="jpeg")
    bad = damage_tile(whole, tmp_path / "bad.tif", range(20 * 28))
    with pytest.raises(SlideError, match=r"bad\.tif: none of the 35 tiles"):
        make_predictor(whole).predict(bad, prescreen=False)


def test_prescreening_does_not_depend_on_the_batch_or_the_mode():
    torch.manual_seed(0)
    lipn = LIPN(3).train()
    patches = np.random.default_rng(0).integers(0, 256, (37, 16, 16, 3), dtype=np.uint8)
    mask, scores = prescreen(lipn, patches, 0.5, batch=8)
    assert lipn.training
    # sums of a batch may be ordered otherwise: float32 rounding
    np.testing.assert_allclose(prescreen(lipn.eval(), patches, 0.5)[1], scores, atol=1e-6)
    np.testing.assert_array_equal(mask, scores > 0.5)


def test_stages_are_timed_and_add_up(slide):
    seconds = make_predictor(slide).predict(slide, n_readers=0).seconds
    assert set(seconds) == {"thumbnail", "lipn", "crop", "features", "dmin", "total"}
    stages = sum(value for stage, value in seconds.items() if stage != "total")
    assert min(seconds.values()) > 0 and 0.5 * seconds["total"] < stages <= seconds["total"]


def test_a_model_folder_gives_back_the_same_predictions(slide, tmp_path):
    predictor = make_predictor(slide)
    predictor.save(tmp_path / "model")
    loaded = Predictor.load(tmp_path / "model", encoder=ColorEncoder())
    assert loaded.config == predictor.config
    a, b = predictor.predict(slide), loaded.predict(slide)
    np.testing.assert_array_equal(a.probabilities, b.probabilities)
    np.testing.assert_array_equal(a.mask, b.mask)


def test_a_model_without_lipn_reads_all_tiles_or_says_so(slide, tmp_path):
    predictor = make_predictor(slide)
    predictor.save(tmp_path / "model")
    Predictor(predictor.dmin, None, predictor.config).save(tmp_path / "model")
    loaded = Predictor.load(tmp_path / "model", encoder=ColorEncoder())
    assert not (tmp_path / "model" / "lipn.safetensors").exists()
    assert loaded.predict(slide, prescreen=False).n_read == 35
    with pytest.raises(CheckpointError, match="all tiles"):
        loaded.predict(slide)


def test_another_encoder_is_refused_and_both_are_named(slide, tmp_path):
    predictor = make_predictor(slide)
    predictor.save(tmp_path / "model")
    other = ColorEncoder()
    other.weights_hash = "c02"
    with pytest.raises(CheckpointError, match=r"color \(weights c01\).*color \(weights c02\)"):
        Predictor.load(tmp_path / "model", encoder=other)
    bag = extract_slide(slide, other, tmp_path / "slide.h5")
    with pytest.raises(BagError, match="c02.*c01"):
        predictor.predict_bag(bag)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dmin"] |= {key: value for key, value in changes.items() if key in config["dmin"]}
    path.write_text(json.dumps(config | {k: v for k, v in changes.items() if k not in config["dmin"]}))


def damage(folder, case, tmp_path):
    """Break a model folder in one of the ways that happen."""
    if case == "no folder":
        shutil.rmtree(folder)
    elif case == "weights missing":
        (folder / "dmin.safetensors").unlink()
    elif case == "weights cut off":
        path = folder / "lipn.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif case == "configuration cut off":
        path = folder / "config.json"
        path.write_text(path.read_text()[:40])
    elif case == "another configuration":
        edit_config(folder, embed_dim=32)
    elif case == "unknown setting":
        edit_config(folder, colour="red")
    elif case == "weights of another model":
        other = make_predictor()
        with torch.no_grad():
            other.lipn.classifier.bias += 1
        other.save(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "lipn.safetensors", folder)


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("no folder", "config.json"),
        ("weights missing", "dmin.safetensors"),
        ("weights cut off", "lipn.safetensors"),
        ("configuration cut off", "config.json"),
        ("another configuration", "dmin.safetensors"),
        ("unknown setting", "colour"),
        ("weights of another model", "lipn.safetensors"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(slide, tmp_path, case, named):
    folder = tmp_path / "model"
    make_predictor(slide).save(folder)
    damage(folder, case, tmp_path)
    with pytest.raises(CheckpointError, match=named) as caught:
        Predictor.load(folder)
    assert any(word in str(caught.value) for word in ("train", "copy"))


def test_saving_that_fails_leaves_no_model_behind(slide, tmp_path, monkeypatch):
    predictor = make_predictor(slide)
    predictor.save(tmp_path / "model")
    monkeypatch.setattr("hdmil_lib.inference.checkpoint.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predictor.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="config.json"):
        Predictor.load(tmp_path / "model")


# Anytime


@pytest.mark.parametrize("n_readers", [0, 2])
@pytest.mark.parametrize("block", [1, 8, 100])
def test_anytime_ends_with_the_answer_from_all_tiles(slide, block, n_readers):
    predictor = make_predictor(slide)
    steps = list(predictor.anytime(slide, block=block, n_readers=n_readers))
    whole = predictor.predict(slide, prescreen=False)
    assert len(steps) == -(-35 // block)
    np.testing.assert_allclose(steps[-1].probabilities, whole.probabilities, atol=1e-5)
    assert sorted(steps[-1].rows) == list(range(35)) and steps[-1].n_tiles == 35
    assert [step.end for step in steps] == [None] * (len(steps) - 1) + ["all tiles"]
    assert np.all(np.diff([step.seconds["total"] for step in steps]) > 0)
    stages = steps[-1].seconds
    assert set(stages) == {"thumbnail", "lipn", "crop", "features", "dmin", "total"}
    if n_readers == 0:
        assert sum(stages.values()) - stages["total"] <= stages["total"]


def test_anytime_reads_what_lipn_ranks_highest_and_no_more(slide, monkeypatch):
    predictor = make_predictor(slide)
    with Slide(slide) as opened:
        patches = TileGrid.from_slide(opened).patches
    best = np.argsort(-prescreen(predictor.lipn, patches)[1].max(axis=1), kind="stable")
    fields = spy_on_tile_reads(monkeypatch)
    *_, last = predictor.anytime(slide, max_tiles=11, block=4)
    assert last.end == "max_tiles" and set(last.rows) == set(best[:11])
    assert len(fields) == 11


def test_anytime_stops_at_the_margin_at_the_time_or_with_its_loop(slide, monkeypatch):
    predictor = make_predictor(slide)
    fields = spy_on_tile_reads(monkeypatch)
    steps = list(predictor.anytime(slide, margin=1e-6, block=4, n_readers=0))
    assert [step.end for step in steps] == ["margin"] and len(fields) == 4
    steps = list(predictor.anytime(slide, max_seconds=1e-6, block=4, n_readers=0))
    assert [step.end for step in steps] == ["max_seconds"] and len(fields) == 8
    for _ in predictor.anytime(slide, block=1, n_readers=2):
        break
    assert len(fields) <= 8 + 1 + 3  # the block of the answer and those read ahead


def test_anytime_leaves_out_damaged_tiles(tmp_path):
    whole = write_textured_slide(tmp_path / "whole.tif", compression="jpeg")
    bad = damage_tile(whole, tmp_path / "bad.tif", [28 * 5 + 9])
    predictor = make_predictor(whole)
    *_, last = predictor.anytime(bad, block=1)
    expected = predictor.predict(bad, prescreen=False).probabilities
    np.testing.assert_allclose(last.probabilities, expected, atol=1e-5)
    with pytest.raises(SlideError, match="none of the 35 tiles"):
        list(predictor.anytime(damage_tile(whole, tmp_path / "worse.tif", range(20 * 28))))


def test_a_stored_bag_foretells_how_anytime_goes(slide, tmp_path):
    predictor = make_predictor(slide)
    bag = extract_slide(slide, predictor.encoder, tmp_path / "bag.h5")
    steps = list(predictor.anytime(slide))
    grown = predictor.trajectory(bag)
    assert grown.n_read.tolist() == [len(step.rows) for step in steps] == [32, 35]
    expected = [step.probabilities for step in steps]
    np.testing.assert_allclose(grown.probabilities, expected, atol=2e-3)  # bags hold 16 bits
    with pytest.raises(CheckpointError, match="no lipn"):
        Predictor(predictor.dmin, None, CONFIG, encoder=ColorEncoder()).trajectory(bag)


def test_rules_are_kept_with_the_model(slide, tmp_path):
    predictor = make_predictor(slide).with_rules(thresholds=0.0, margin=1e-6)
    predictor.save(tmp_path / "model")
    again = Predictor.load(tmp_path / "model", ColorEncoder())
    assert again.config.thresholds == (0.0, 0.0) and again.config.margin == 1e-6
    assert again.predict(slide).n_read == 35
    assert [step.end for step in again.anytime(slide, block=4)] == ["margin"]
    assert again.with_rules().config == again.config
    assert again.with_rules(margin=float("inf")).config.margin is None
    assert again.with_rules(thresholds=(0.1, 0.2)).config.thresholds == (0.1, 0.2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"max_seconds": 0.0}, "max_seconds is 0"),
        ({"margin": 0.0}, "margin is 0"),
        ({"margin": float("nan")}, "margin is nan"),
    ],
)
def test_anytime_refuses_empty_budgets_at_once(slide, options, message):
    with pytest.raises(ValueError, match=message):
        make_predictor(slide).anytime(slide, **options)
    with pytest.raises(CheckpointError, match="no lipn"):
        Predictor(make_predictor().dmin, None, CONFIG, encoder=ColorEncoder()).anytime(slide)
