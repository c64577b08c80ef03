"""The second look: what it keeps, how it learns, where it is stored, and prediction of slides with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bag_factory import DIM, make_bag, make_bags, make_split
from model_factory import ColorEncoder, make_model, write_textured_slide
from torch.nn.functional import softplus

from hdmil_lib.bags import bag_info, read_bag, write_bag
from hdmil_lib.batches import BagDataset
from hdmil_lib.encoders.extraction import extract
from hdmil_lib.encoders.loading import load_encoder
from hdmil_lib.encoders.networks import build_network
from hdmil_lib.errors import BagError, CheckpointError, HDMILError
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models import HDMIL, LIPN, SecondLook, create_model
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.training.fit import TrainSettings, fit
from hdmil_lib.training.look import fit_look, rank_loss

SIDE = 64
SHORT = TrainSettings(learning_rate=1e-2, epochs=6, min_epochs=6, batch_size=4)


class LookingEncoder(ColorEncoder):
    """A color encoder that says which images it saw."""

    def __init__(self):
        self.seen = []

    def __call__(self, tiles):
        self.seen.append(tiles.shape[:2])
        return super().__call__(tiles)


def with_look(model, share=0.5, seed=0):
    """The same model with an untrained second look."""
    torch.manual_seed(seed)
    look = SecondLook(model.dmin.in_dim, SIDE).eval()
    other = HDMIL(
        model.dmin,
        model.lipn,
        thresholds=model.thresholds,
        look=look,
        look_share=share,
        info=model.info,
    )
    other.encoder = LookingEncoder()
    return other


def looked_at(bags):
    """The bags with a look whose features are those of the tiles."""
    return {slide_id: replace(bag, looks={SIDE: bag.features}) for slide_id, bag in bags.items()}


def test_only_tiles_of_lipn_pass_and_every_bag_keeps_one():
    model, segments = with_look(make_model()), Segments([4, 3, 2])
    mask = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [1, 0]]).bool()
    scores = torch.tensor([2.0, -1.0, 1.0, 9.0, -3.0, -2.0, -4.0, -1.0, 0.5])
    kept = model.look_again(scores, mask, segments)
    wanted = torch.zeros_like(mask)
    for tile in (0, 2, 4, 5, 8):  # the best 2 of 4, 2 of 3 and 1 of 2; tile 3 was not kept by LIPN
        wanted[tile] = mask[tile]
    assert torch.equal(kept, wanted)
    few = model.with_rules(look_share=0.01).look_again(scores, mask, segments)
    assert few.any(1).nonzero()[:, 0].tolist() == [0, 5, 8]


def test_at_the_ends_of_the_threshold_the_look_keeps_all_or_one():
    bag = make_bag("a", 1)
    dmin, lipn = create_model("dmin", DIM, 2, embed_dim=16, attention_dim=8).eval(), LIPN(2).eval()
    features, patches = torch.from_numpy(bag.features).float(), torch.from_numpy(bag.patches)
    plain = HDMIL(dmin, lipn)(features, patches)
    for share, n_read in ((1.0, int(plain.read.sum())), (0.01, 1)):
        model = HDMIL(dmin, lipn, look=SecondLook(DIM, SIDE).eval(), look_share=share)
        output = model(features, patches, looks=features)
        assert int(output.read.sum()) == n_read
        assert (output.mask <= plain.mask).all()


def test_a_model_with_a_look_asks_for_it(tmp_path):
    model = with_look(make_model())
    features, patches = torch.zeros(3, 6), torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(
        BagError, match="0 looks of 64 pixels for 3 tiles; extract the slide with `--look 64`"
    ):
        model(features, patches)
    with pytest.raises(BagError, match=r"looks have shape \(3, 5\), expected \(n_tiles, 6\)"):
        model(features, patches, looks=torch.zeros(3, 5))
    data = BagDataset({"a": make_bag("a", 0)})
    with pytest.raises(BagError, match="bag a has no look of 64 pixels"):
        data.batch(["a"]).inputs_for(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"look_share": 0}, "look_share is 0"),
        ({"look": SecondLook(5)}, "look takes 5 features, dmin 6"),
    ],
)
def test_settings_out_of_bounds(options, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        HDMIL(model.dmin, model.lipn, **options)


def test_the_look_is_saved_with_the_model(tmp_path):
    model = with_look(make_model(), share=0.25)
    model.save_pretrained(tmp_path / "model")
    loaded = HDMIL.from_pretrained(tmp_path / "model")
    assert loaded.look.settings == model.look.settings
    assert float(loaded.look_share) == 0.25
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert "64 px per tile, 25% of the tiles pass" in (tmp_path / "model" / "README.md").read_text()
    changed = loaded.with_rules(look_share=0.75)
    assert (float(changed.look_share), float(loaded.look_share)) == (0.75, 0.25)
    assert torch.equal(changed.thresholds, loaded.thresholds)


def test_weights_without_the_look_that_the_configuration_names_are_refused(tmp_path):
    with_look(make_model()).save_pretrained(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "plain")
    (tmp_path / "model" / "config.json").replace(tmp_path / "plain" / "config.json")
    with pytest.raises(CheckpointError, match="damaged, or of another model"):
        HDMIL.from_pretrained(tmp_path / "plain")


def test_a_slide_and_its_bag_get_the_same_answer(tmp_path):
    slide = write_textured_slide(tmp_path / "s.tif")
    model = with_look(make_model(slide, keep=0.6))
    encoder = model.encoder
    extract(slide, encoder, tmp_path / "bags", looks=(SIDE,), progress=False)
    bag = read_bag(tmp_path / "bags" / "s.h5")
    model = model.with_rules(look_share=0.3)
    encoder.seen.clear()
    of_slide, of_bag = model.predict(slide), model.predict(bag)
    assert np.array_equal(of_slide.mask, of_bag.mask)
    np.testing.assert_allclose(of_slide.probabilities, of_bag.probabilities, atol=2e-3)
    assert "look" in of_slide.seconds
    sides = {side: sum(n for n, s in encoder.seen if s == side) for side in (SIDE, 256)}
    shown = int(model.screen(torch.from_numpy(bag.patches), Segments([len(bag)])).any(1).sum())
    assert sides == {SIDE: shown, 256: of_slide.n_read}
    assert of_slide.n_read < shown


def test_a_stream_reads_the_tiles_that_the_look_scores_highest_first(tmp_path):
    slide = write_textured_slide(tmp_path / "s.tif")
    model = with_look(make_model(slide, keep=0.6))
    extract(slide, model.encoder, tmp_path / "bags", looks=(SIDE,), progress=False)
    bag = read_bag(tmp_path / "bags" / "s.h5")
    steps = list(model.stream(slide, block=1, margin=float("inf")))
    assert steps[-1].end == "all tiles"
    assert "look" in steps[-1].seconds
    shown = model.screen(torch.from_numpy(bag.patches), Segments([len(bag)])).any(1).numpy()
    order = steps[-1].rows
    assert shown[order].tolist() == sorted(shown.tolist(), reverse=True)
    with torch.no_grad():
        scores = model.look(torch.from_numpy(bag.looks[SIDE]).float()).numpy()
    assert (np.diff(scores[order[: shown.sum()]]) < 2e-2).all()  # features in float16
    path = model.trajectory(bag, block=8)
    assert path.n_read.tolist() == [8, 16, 24, 32, 35]
    np.testing.assert_allclose(path.probabilities[-1], steps[-1].probabilities, atol=2e-3)
    with pytest.raises(BagError, match="bag s has no look of 64 pixels"):
        model.trajectory(replace(bag, looks={}))


def test_looks_are_read_at_their_scale_and_stored(tmp_path):
    path = write_textured_slide(tmp_path / "s.tif")
    encoder = ColorEncoder()
    extract(path, encoder, tmp_path / "bags", looks=(32, 64), progress=False)
    bag = read_bag(tmp_path / "bags" / "s.h5")
    with Slide(path) as slide:
        grid = TileGrid.from_slide(slide)
        for side in (32, 64):
            fields = [slide.read_field(*xy, (side, side), 128 / side) for xy in grid.coords.tolist()]
            np.testing.assert_allclose(bag.looks[side], encoder(np.stack(fields)), rtol=2e-3)
    assert sorted(bag_info(tmp_path / "bags" / "s.h5")["looks"]) == [32, 64]
    report = extract(path, encoder, tmp_path / "bags", looks=(64,), progress=False)
    assert report["status"].tolist() == ["skipped"]
    report = extract(path, encoder, tmp_path / "bags", looks=(16,), progress=False)
    assert "without a look of 16 pixels" in report["error"][0]


def test_looks_must_fit_the_tiles(tmp_path):
    bag = replace(make_bag("a", 0), looks={SIDE: np.zeros((3, DIM))})
    with pytest.raises(BagError, match="do not describe the same tiles"):
        write_bag(tmp_path / "a.h5", bag)


def test_bags_without_a_look_leave_it_out_of_the_data_set():
    bags, labels = make_bags(4)
    some = looked_at(bags) | {"s00": bags["s00"]}
    with pytest.raises(BagError, match="no look of 64 pixels"):
        BagDataset(some, labels).batch(["s01"]).look(SIDE)
    batch = BagDataset(looked_at(bags), labels).batch(["s01", "s00"])
    assert torch.equal(batch.look(SIDE), batch.features)


def test_it_learns_which_tiles_are_evidence(tmp_path):
    bags, labels = make_bags(32)
    data, split = BagDataset(looked_at(bags), labels), make_split(bags)
    torch.manual_seed(0)
    dmin = create_model("dmin", DIM, 2, embed_dim=16, attention_dim=8, degree=4)
    fit(dmin, data, split, SHORT, out=tmp_path / "dmin")
    torch.manual_seed(0)
    look = SecondLook(DIM, SIDE, dropout=0.1)
    history = fit_look(look, dmin, data, split, SHORT, out=tmp_path / "look")
    assert len(history) == 6
    with torch.inference_mode():
        scores = [look(data.batch([s]).look(SIDE)) for s in split.test if labels[s]]
    assert all(score[:4].min() > score[4:].median() for score in scores)  # the first third is tumor
    again = SecondLook(DIM, SIDE, dropout=0.1)
    torch.manual_seed(0)
    again.load_state_dict(SecondLook(DIM, SIDE, dropout=0.1).state_dict())
    fit_look(again, dmin, data, split, SHORT, out=tmp_path / "look")  # a finished run is loaded
    for ours, theirs in zip(again.state_dict().values(), look.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_rank_loss_is_the_mean_over_pairs_of_a_slide():
    """Oracle: all pairs of each slide, each with the chance at which it is drawn."""
    generator = torch.Generator().manual_seed(0)
    segments, pairs = Segments([5, 1, 9]), 20_000
    scores, evidence = torch.randn(15, generator=generator), torch.rand(15, generator=generator)
    total, weight = 0.0, 0.0
    for start, end in ((0, 5), (5, 6), (6, 15)):
        s, e = scores[start:end].double(), evidence[start:end].double()
        difference = e[:, None] - e
        chance = 1 / len(s)  # of one of the other tiles, this one included
        total += (softplus(-difference.sign() * (s[:, None] - s)) * difference.abs()).sum() * chance
        weight += difference.abs().sum() * chance
    torch.manual_seed(0)
    found = rank_loss(scores, evidence, segments, pairs)
    assert float(found) == pytest.approx(float(total / weight), rel=0.02)  # 300,000 draws: sd below 0.4 %


def test_the_rank_loss_asks_for_the_order_alone():
    segments, evidence = Segments([4, 3]), torch.tensor([0.1, 0.9, 0.4, 0.4, 0.0, 1.0, 0.5])
    places = evidence.argsort().argsort().float() * 50
    torch.manual_seed(0)
    assert float(rank_loss(places, evidence, segments)) < 1e-6
    shifted = places + torch.tensor([7.0, 7, 7, 7, -300, -300, -300])  # slides are not compared
    torch.manual_seed(0)
    assert float(rank_loss(shifted, evidence, segments)) < 1e-6
    torch.manual_seed(0)
    assert float(rank_loss(-places, evidence, segments)) > 10
    scores = torch.zeros(7, requires_grad=True)
    rank_loss(scores, torch.full((7,), 0.3), segments).backward()  # no pair differs
    assert torch.equal(scores.grad, torch.zeros(7))


def test_an_encoder_takes_images_of_another_side():
    encoder = load_encoder("efficientnet_lite0_random", engine="torch", precision="fp32")
    network = build_network(encoder.spec)
    small = encoder.at(64)
    assert small is encoder.at(64)
    assert encoder.at(256) is encoder
    assert (small.weights_hash, small.dim) == (encoder.weights_hash, encoder.dim)
    tiles = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    with torch.inference_mode():
        wanted = network(torch.from_numpy(tiles)).numpy()
    np.testing.assert_allclose(small(tiles), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(HDMILError, match="takes images of 256 pixels only"):
        load_encoder("color").at(64)
