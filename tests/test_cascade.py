"""The cascade: rules are chosen on validation slides, and it is not used where random tiles are as good."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bag_factory import DIM, make_bags, make_cohort, make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from model_factory import make_model
from torch.nn.functional import cross_entropy

from hdmil_lib.batches import BagDataset
from hdmil_lib.errors import BagError, CheckpointError
from hdmil_lib.inference.rules import learn_thresholds
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import HDMIL, LIPN, SecondLook, create_model
from hdmil_lib.models.ragged import random_tiles
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.training.cascade import (
    CascadeSettings,
    calibrate,
    choose_rules,
    fit_cascade,
    judgments,
    load_cascade,
)
from hdmil_lib.training.crossval import cross_validate
from hdmil_lib.training.fit import TrainSettings, fit

SHORT = TrainSettings(learning_rate=1e-2, epochs=6, min_epochs=6, batch_size=4)
SMALL = {"embed_dim": 16, "attention_dim": 8, "degree": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Bags of 30 tiles whose looks are their features, and a DMIN that was trained on them."""
    bags, labels = make_bags(32, n_tiles=30)
    bags = {slide_id: replace(bag, looks={64: bag.features}) for slide_id, bag in bags.items()}
    data, split = BagDataset(bags, labels), make_split(bags)
    torch.manual_seed(0)
    dmin = create_model("dmin", DIM, 2, **SMALL)
    fit(dmin, data, split, SHORT, out=tmp_path_factory.mktemp("dmin"))
    return bags, labels, data, split, dmin


def planted(sign):
    """A look that scores a tile by the shift of tumor tiles, or by its opposite."""
    look = SecondLook(DIM, hidden=1).eval()
    with torch.no_grad():
        look.head[1].weight.fill_(0)
        look.head[1].weight[0, : DIM // 2] = 0.1
        look.head[1].bias.fill_(10.0)  # above 0 for all tiles, so that the ReLU changes nothing
        look.head[4].weight.fill_(sign)
        look.head[4].bias.fill_(0)
    return look


def blind_lipn():
    """A LIPN that knows nothing, whose normalizations have seen patches, so that its scores differ."""
    torch.manual_seed(5)
    lipn = LIPN(2).train()
    with torch.no_grad():
        for _ in range(30):
            lipn(torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8))
    return lipn.eval()


@settings(max_examples=20, deadline=None)
@given(slope=st.floats(0.3, 3), bias=st.floats(-1, 1), seed=st.integers(0, 20))
def test_calibration_finds_the_slope_and_bias_of_the_scores(slope, bias, seed):
    rng = torch.Generator().manual_seed(seed)
    true = torch.randn(4000, 2, generator=rng)
    labels = torch.multinomial(true.softmax(1), 1, generator=rng)[:, 0]
    shift = torch.tensor([bias, -bias])
    found_slope, found_bias = calibrate((true - shift) / slope, labels, weight=1e-9)
    assert found_bias.sum().abs() < 1e-5
    ours = cross_entropy((true - shift) / slope * found_slope + found_bias, labels)
    assert ours <= cross_entropy(true, labels) + 1e-6  # the truth is one of the candidates
    assert found_slope == pytest.approx(slope, rel=0.25)


def test_calibration_of_slides_that_are_told_apart_without_error_is_finite():
    logits = torch.tensor([[3.0, -3.0], [-3.0, 3.0]])
    slope, bias = calibrate(logits, torch.tensor([0, 1]))
    assert 1 < slope < 10
    assert bias.abs().max() < 1e-4


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    share=st.floats(0.01, 1),
)
def test_random_tiles_are_the_same_whatever_bags_are_beside(lengths, share):
    chosen = random_tiles(Segments(lengths), share).split(lengths)
    for length, tiles in zip(lengths, chosen, strict=True):
        assert int(tiles.sum()) == max(1, round(share * length))
        assert torch.equal(tiles, random_tiles(Segments([length]), share))


@pytest.mark.parametrize("options", [{"keep_ratio": 0.7}, {"keep_ratio": 0}, {"first": 1.2}])
def test_a_cascade_narrows(options):
    with pytest.raises(ValueError, match="the cascade narrows"):
        CascadeSettings(**options)


def test_rules_keep_the_share_and_a_good_cascade_is_used(trained):
    *_, data, split, dmin = trained
    wanted = CascadeSettings(first=0.8, keep_ratio=0.05)
    networks = HDMIL(dmin, blind_lipn(), look=planted(1.0))
    model, judged = choose_rules(networks, data, split.val, wanted)
    assert model.screening == "networks"
    assert judged["gain"] > 0
    assert judged["keep_ratio"] == pytest.approx(0.05, abs=0.02)
    assert model.slope > 0
    batch = data.batch([split.test[1]])
    output = model(**batch.inputs_for(model))
    with pytest.raises(ValueError, match="the model has a second look"):
        learn_thresholds(model, list(trained[0].values()))
    whole = model(**batch.inputs_for(model), all_tiles=True)
    assert (output.read <= model.screen(batch.patches, batch.segments).any(1)).all()
    assert torch.equal(whole.logits, dmin(batch.features).logits)  # all tiles need no calibration


def test_a_cascade_that_is_worse_than_chance_is_not_used(trained, tmp_path):
    *_, data, split, dmin = trained
    wanted = CascadeSettings(first=0.9, keep_ratio=0.1)
    networks = HDMIL(dmin, blind_lipn(), look=planted(-1.0))
    model, judged = choose_rules(networks, data, split.val, wanted)
    assert judged["gain"] < 0
    assert model.screening == "random"
    batch = data.batch([split.test[0], split.test[1]])
    inputs = batch.inputs_for(model)
    output = model(**inputs)
    assert torch.equal(output.read, random_tiles(batch.segments, 0.1))
    rows, kept = batch.segments.select(output.read)
    assert torch.equal(output.logits, dmin(batch.features[rows], kept).logits)
    model.info = make_model().info
    model.save_pretrained(tmp_path / "model")
    loaded = HDMIL.from_pretrained(tmp_path / "model")
    assert (loaded.screening, loaded.random_share) == ("random", 0.1)
    assert torch.equal(loaded(**inputs).logits, output.logits)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "10% at random: the networks chose no better than chance" in card


def test_a_cascade_resumes_and_is_loaded(trained, tmp_path):
    *_, data, split, dmin = trained
    lipn, wanted = blind_lipn(), CascadeSettings(first=0.9, keep_ratio=0.2)
    model = fit_cascade(dmin, lipn, data, split, wanted, SHORT, out=tmp_path)
    written = (tmp_path / "config.json").stat().st_mtime_ns
    again = fit_cascade(dmin, lipn, data, split, wanted, SHORT, out=tmp_path)
    assert (tmp_path / "config.json").stat().st_mtime_ns == written
    for other in (again, load_cascade(dmin, lipn, tmp_path)):
        assert other.screening == model.screening
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], tensor)
    table = judgments([tmp_path])
    assert (table.loc[0, "gain"] > 0) == (model.screening == "networks")
    changed = fit_cascade(dmin, lipn, data, split, replace(wanted, keep_ratio=0.4), SHORT, out=tmp_path)
    inputs = [data.batch([slide_id]).inputs_for(model) for slide_id in split.val]
    shares = [np.mean([float(m(**each).keep_ratio) for each in inputs]) for m in (model, changed)]
    assert shares == pytest.approx([0.2, 0.4], abs=0.03)
    with pytest.raises(CheckpointError):
        fit_cascade(dmin, lipn, data, split, wanted, replace(SHORT, seed=1), out=tmp_path)


def test_cross_validation_of_a_cascade(trained, tmp_path):
    bags, labels, *_ = trained
    cohort = make_cohort(tmp_path / "cohort", bags, labels)
    recipe = RECIPES["camelyon-mini"].shorter(4)
    made = {"folds": 3, "recipe": recipe, "workers": 1, "progress": False, "out": tmp_path / "cv"}
    cv = cross_validate(cohort, ["hdmil_cascade"], bags=bags, **made)
    model = cv.hdmil(0, "hdmil_cascade")
    assert model.look.side == 64
    assert model.info.classes == cv.classes
    share = cv.predictions["keep_ratio"].mean()
    assert 1 / 30 <= share <= 0.3
    assert 0 <= cv.best_fold("hdmil_cascade") < 3
    plain = {slide_id: replace(bag, looks={}) for slide_id, bag in bags.items()}
    with pytest.raises(BagError, match="has no look of 64 pixels"):
        cross_validate(cohort, ["hdmil_cascade"], bags=plain, **made | {"out": tmp_path / "other"})
