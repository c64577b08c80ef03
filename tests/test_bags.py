"""Bags on disk: what is written is read, and nothing damaged or mixed passes for a bag."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import h5py
import hypothesis.extra.numpy as hnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_factory import ColorEncoder, make_model, write_textured_slide

from hdmil_lib.bag_files import TRIDENT_ATTRS
from hdmil_lib.bags import (
    UNKNOWN,
    Bag,
    EncoderIdentity,
    bag_info,
    check_same_features,
    read_bag,
    read_tile_labels,
    write_bag,
)
from hdmil_lib.batches import BagDataset
from hdmil_lib.cohort import Cohort
from hdmil_lib.encoders.extraction import extract_slide
from hdmil_lib.errors import BagError

ENCODER = EncoderIdentity("some_encoder", "0123456789ab")
ATTRS = {
    "precision": "fp32",
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "level0_width": 10_000,
    "level0_height": 8_000,
}
SHAPE = (6, 50)


def make_bag(
    n: int = 5, dim: int = 8, slide_id: str = "slide", encoder: EncoderIdentity = ENCODER, **attrs
) -> Bag:
    rng = np.random.default_rng(n)
    return Bag(
        slide_id=slide_id,
        features=rng.normal(size=(n, dim)).astype(np.float16),
        coords=rng.integers(0, 10_000, (n, 2)),
        rowcol=np.stack(np.divmod(rng.choice(300, n, replace=False), 50), axis=1),
        shape=SHAPE,
        patches=rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8),
        encoder=encoder,
        attrs=ATTRS | attrs,
    )


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 40),
    dim=st.integers(1, 30),
    compress=st.booleans(),
    with_patches=st.booleans(),
    data=st.data(),
)
def test_a_bag_survives_the_disk(tmp_path_factory, n, dim, compress, with_patches, data):
    features = data.draw(hnp.arrays(np.float16, (n, dim), elements=st.floats(-100, 100, width=16)))
    coords = data.draw(hnp.arrays(np.int64, (n, 2), elements=st.integers(0, 2**40)))
    rowcol = data.draw(hnp.arrays(np.int64, (n, 2), elements=st.integers(0, 5)))
    bag = replace(make_bag(n), features=features, coords=coords, rowcol=rowcol)
    if not with_patches:
        bag = replace(bag, patches=None)
    path = tmp_path_factory.mktemp("bags") / "slide.h5"
    write_bag(path, bag, compress=compress)
    back = read_bag(path)
    for name in ("features", "coords", "rowcol", *["patches"] * with_patches):
        np.testing.assert_array_equal(getattr(back, name), getattr(bag, name))
        assert getattr(back, name).dtype == getattr(bag, name).dtype
    assert (back.patches is None) == (not with_patches)
    assert back.slide_id == "slide"
    assert len(back) == n
    assert back.shape == SHAPE
    assert back.encoder == ENCODER
    assert back.attrs.items() >= ATTRS.items()


def test_the_file_is_laid_out_as_trident_expects(tmp_path):
    write_bag(tmp_path / "slide.h5", make_bag())
    with h5py.File(tmp_path / "slide.h5") as file:
        assert file["features"].shape == (5, 8)
        assert file["coords"].shape == (5, 2)
        assert set(file["coords"].attrs) - {"sha256"} == set(TRIDENT_ATTRS)
        assert file["coords"].attrs["name"] == "slide"
        assert {"encoder", "weights_hash", "precision", "library_version", "schema_version"} <= set(
            file.attrs
        )
        assert file.attrs["schema_version"] == 3


def test_info_reads_attributes_and_sizes(tmp_path):
    write_bag(tmp_path / "slide.h5", make_bag(7, 3))
    info = bag_info(tmp_path / "slide.h5")
    assert (info["n_tiles"], info["dim"], info["encoder"]) == (7, 3, "some_encoder")


def test_tile_labels_are_kept_apart(tmp_path):
    labels = np.linspace(0, 1, 5, dtype=np.float32)
    write_bag(tmp_path / "with.h5", make_bag(), labels)
    write_bag(tmp_path / "without.h5", make_bag())
    np.testing.assert_array_equal(read_tile_labels(tmp_path / "with.h5"), labels)
    assert read_tile_labels(tmp_path / "without.h5") is None
    bag = read_bag(tmp_path / "with.h5")
    assert not any(np.array_equal(value, labels) for value in vars(bag).values())
    assert "tile_labels" not in bag.attrs


def test_compression_makes_smaller_files(tmp_path):
    bag = make_bag(50)
    bag.patches[:] = 200
    write_bag(tmp_path / "plain.h5", bag)
    write_bag(tmp_path / "small.h5", bag, compress=True)
    assert (tmp_path / "small.h5").stat().st_size < (tmp_path / "plain.h5").stat().st_size / 2


def test_a_failed_write_leaves_the_old_bag_and_no_litter(tmp_path):
    path = tmp_path / "slide.h5"
    write_bag(path, make_bag(3))
    with pytest.raises(TypeError):
        write_bag(path, make_bag(4, unwritable=object()))
    assert len(read_bag(path)) == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_features_beyond_float16_are_named_and_not_written(tmp_path, value):
    bag = make_bag()
    features = bag.features.astype(np.float32)
    features[3, 1] = value
    with pytest.raises(BagError, match="slide.h5.*1 of 5 tiles.*row 3"):
        write_bag(tmp_path / "slide.h5", replace(bag, features=features))
    assert not list(tmp_path.iterdir())


def test_arrays_of_different_tiles_are_refused(tmp_path):
    bag, path = make_bag(), tmp_path / "slide.h5"
    for name in ("features", "coords", "rowcol", "patches"):
        with pytest.raises(BagError, match="same tiles"):
            write_bag(path, replace(bag, **{name: getattr(bag, name)[:4]}))
    with pytest.raises(BagError, match="same tiles"):
        write_bag(path, bag, tile_labels=np.zeros(4))
    with pytest.raises(BagError, match="same tiles"):
        write_bag(path, make_bag(0))


@pytest.mark.parametrize("place", [(-1, 0), (6, 0), (0, 50)])
def test_a_tile_beyond_the_grid_is_refused(tmp_path, place):
    bag = make_bag()
    bag.rowcol[2] = place
    with pytest.raises(BagError, match=r"slide\.h5: rowcol reaches beyond the grid of 6 x 50"):
        write_bag(tmp_path / "slide.h5", bag)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_bag_is_named_with_the_remedy(tmp_path, keep):
    path = tmp_path / "slide.h5"
    write_bag(path, make_bag(20))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    for read in (read_bag, read_tile_labels, bag_info):
        with pytest.raises(BagError, match="slide.h5.*Delete the file and extract"):
            read(path)


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(BagError, match="absent.h5.*Extract"):
        read_bag(tmp_path / "absent.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["embeddings"], file["coords"] = np.zeros((3, 8)), np.zeros((3, 2), int)
    with pytest.raises(BagError, match="other.h5: lacks features"):
        read_bag(tmp_path / "other.h5")


def test_a_tampered_bag_is_refused(tmp_path):
    path = tmp_path / "slide.h5"
    write_bag(path, make_bag())
    with h5py.File(path, "a") as file:
        del file["coords"]
        file["coords"] = np.zeros((5, 2), int)
    with pytest.raises(BagError, match="digest of coords is missing"):
        read_bag(path)
    with h5py.File(path, "a") as file:
        del file["coords"]
        file["coords"] = np.zeros((4, 2), int)
    with pytest.raises(BagError, match=r"same tiles.*coords \(4, 2\)"):
        read_bag(path)


def test_the_bag_of_another_encoder_is_named():
    same = [make_bag(slide_id=name) for name in "abc"]
    assert check_same_features(same) == ENCODER
    for odd in (
        make_bag(slide_id="odd", encoder=EncoderIdentity("other", ENCODER.weights_hash)),
        make_bag(slide_id="odd", encoder=EncoderIdentity(ENCODER.name, "ffffffffffff")),
        make_bag(dim=9, slide_id="odd"),
    ):
        with pytest.raises(BagError, match="'odd'.*one encoder"):
            check_same_features([*same, odd])
    with pytest.raises(BagError, match="no bags; extract"):
        check_same_features([])


def test_the_thumbnail_is_put_together_from_the_patches():
    bag = make_bag()
    picture = bag.thumbnail
    assert picture.shape == (6 * 16, 50 * 16, 3)
    for (row, col), patch in zip(bag.rowcol, bag.patches, strict=True):
        np.testing.assert_array_equal(picture[16 * row :, 16 * col :][:16, :16], patch)
    assert (picture == 255).all(axis=2).sum() >= (300 - 5) * 256
    assert (replace(bag, patches=None).thumbnail == 255).all()


# Bags without grid positions: of hdmil 0.1, CLAM and TRIDENT


def write_schema_1(path: Path, features, coords, patches, **attrs) -> Path:
    """A bag as hdmil 0.1 wrote it."""
    attrs = {"encoder": "color", "weights_hash": "c01", "name": path.stem, "slide_id": path.stem} | attrs
    attrs |= {"library_version": "0.1.0", "schema_version": 1}
    with h5py.File(path, "w") as file:
        file["features"], file["coords"], file["patches"] = features.astype(np.float16), coords, patches
        for key, value in attrs.items():
            (file["coords"] if key in TRIDENT_ATTRS else file).attrs[key] = value
    return path


@pytest.mark.parametrize("mpp", [(0.5, 0.5), (0.243, 0.243), (0.2527, 0.2461), (0.9, 0.77)])
def test_a_bag_of_schema_1_gets_the_grid_positions_that_it_had(tmp_path, mpp):
    """Exactly, over 300 columns: the pitch is no whole number, and coordinates were rounded."""
    rng = np.random.default_rng(0)
    cells = np.stack(np.divmod(rng.choice(200 * 300, 2000, replace=False), 300), axis=1)
    cells = np.concatenate([cells, [[0, 299], [199, 0]]])
    pitch = 256 * 0.5 / np.array(mpp)
    coords = np.rint([123, 4567] + cells[:, ::-1] * pitch).astype(np.int64)
    patches = rng.integers(0, 256, (len(cells), 16, 16, 3), dtype=np.uint8)
    geometry = {"mpp_x": mpp[0], "mpp_y": mpp[1], "tile_mpp": 0.5, "patch_size": 256}
    rounded = {"patch_size_level0": round(pitch[0])}
    path = write_schema_1(
        tmp_path / "old.h5", rng.normal(size=(2002, 6)), coords, patches, **geometry, **rounded
    )
    bag = read_bag(path)
    np.testing.assert_array_equal(bag.rowcol, cells - cells.min(axis=0))
    assert bag.shape == tuple(np.ptp(cells, axis=0) + 1)
    assert bag.encoder == EncoderIdentity("color", "c01")
    assert bag.slide_id == "old"
    np.testing.assert_array_equal(bag.patches, patches)

    write_bag(tmp_path / "new.h5", bag)
    again = read_bag(tmp_path / "new.h5")
    np.testing.assert_array_equal(again.rowcol, bag.rowcol)
    assert (again.shape, again.encoder) == (bag.shape, bag.encoder)
    assert bag_info(tmp_path / "new.h5")["schema_version"] == 3


def test_a_bag_of_schema_1_is_predicted_as_its_slide(tmp_path):
    """The grid of an old bag starts at its first tissue; all else is the same."""
    path = write_textured_slide(tmp_path / "s.tif")
    new = extract_slide(path, ColorEncoder(), tmp_path / "s.h5")
    attrs = {key: value for key, value in new.attrs.items() if key not in ("slide_id", "name")}
    old = read_bag(write_schema_1(tmp_path / "old.h5", new.features, new.coords, new.patches, **attrs))
    np.testing.assert_array_equal(old.rowcol, new.rowcol)
    model = make_model(path)
    a, b = model.predict(old), model.predict(new)
    np.testing.assert_array_equal(a.probabilities, b.probabilities)
    np.testing.assert_array_equal(a.mask, b.mask)


def write_foreign(path: Path, coords: np.ndarray, dim: int = 6, **attrs) -> Path:
    """Features and coordinates alone, as CLAM and TRIDENT write them."""
    with h5py.File(path, "w") as file:
        file["features"] = np.random.default_rng(0).normal(size=(len(coords), dim)).astype(np.float32)
        file["coords"] = coords
        file["coords"].attrs.update(attrs)
    return path


FOREIGN = {
    "TRIDENT": {
        "patch_size": 256,
        "patch_size_level0": 512,
        "target_magnification": 20,
        "level0_magnification": 40,
        "overlap": 0,
        "name": "slide",
    },
    "CLAM": {"patch_size": 512, "patch_level": 0, "downsample": [1.0, 1.0], "name": "slide"},
    "bare": {},
}


@pytest.mark.parametrize("tool", FOREIGN)
def test_a_bag_of_another_tool_reads_without_patches(tmp_path, tool):
    cells = np.array([[0, 0], [0, 1], [3, 1], [2, 7]])
    path = write_foreign(tmp_path / "slide.h5", 100 + cells[:, ::-1] * 512, **FOREIGN[tool])
    bag = read_bag(path)
    np.testing.assert_array_equal(bag.rowcol, cells)
    assert bag.patches is None
    assert bag.shape == (4, 8)
    assert bag.encoder == UNKNOWN
    assert bag.slide_id == "slide"
    assert bag.thumbnail.shape == (64, 128, 3)

    model = make_model()
    with pytest.raises(BagError) as caught:
        model.predict(bag)
    assert len(str(caught.value).splitlines()) == 1
    assert "unknown" in str(caught.value)

    known = replace(bag, encoder=EncoderIdentity("color", "c01"))
    with pytest.raises(BagError, match="slide has no patches for LIPN; use all tiles") as caught:
        model.predict(known)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(BagError, match="no patches"):
        model.trajectory(known)
    prediction = model.predict(known, all_tiles=True)
    assert prediction.n_read == 4
    assert prediction.probabilities.sum() == pytest.approx(1)
    np.testing.assert_array_equal(prediction.rowcol, cells)


def test_clams_pieces_of_tissue_have_lattices_of_their_own(tmp_path):
    first = np.stack(np.divmod(np.arange(40), 8), axis=1)[:, ::-1] * 512
    second = first + [6003, 20_001]  # no multiple of the tile size away
    bag = read_bag(write_foreign(tmp_path / "slide.h5", np.concatenate([first, second])))
    assert bag.shape == (39 + 5, 12 + 8)
    np.testing.assert_array_equal(bag.rowcol[:40], first[:, ::-1] // 512)
    np.testing.assert_array_equal(bag.rowcol[40:] - bag.rowcol[40], first[:, ::-1] // 512)


def test_tiles_that_overlap_lie_at_their_distance(tmp_path):
    cells = np.stack(np.divmod(np.arange(12), 4), axis=1)
    attrs = FOREIGN["TRIDENT"] | {"overlap": 64}
    bag = read_bag(write_foreign(tmp_path / "slide.h5", cells[:, ::-1] * 384, **attrs))
    np.testing.assert_array_equal(bag.rowcol, cells)


def test_a_single_tile_has_a_grid_of_one(tmp_path):
    assert read_bag(write_foreign(tmp_path / "slide.h5", np.array([[3, 4]]))).shape == (1, 1)


def test_a_grid_that_no_slide_has_is_refused(tmp_path):
    """It would be drawn: 768 bytes per tile of the grid."""
    far = np.array([[0, 0], [0, 512], [2**40, 0]])
    with pytest.raises(BagError, match=r"slide\.h5: no slide has a grid of"):
        read_bag(write_foreign(tmp_path / "slide.h5", far))


def test_bags_of_another_tool_train_what_needs_no_patches(tmp_path):
    bags = {}
    for name in "ab":
        cells = np.array([[0, 0], [1, 1]])
        bags[name] = read_bag(write_foreign(tmp_path / f"{name}.h5", 512 * cells, **FOREIGN["TRIDENT"]))
    data = BagDataset(bags, {"a": 0, "b": 1})
    batch = data.batch(["a", "b"])
    model = make_model()
    assert model.dmin(**batch.inputs_for(model.dmin)).logits.shape == (2, 2)
    with pytest.raises(BagError, match="no patches, which this model needs"):
        batch.inputs_for(model)


# Hostile and damaged files


def test_links_and_other_files_are_not_followed(tmp_path):
    write_bag(tmp_path / "a.h5", make_bag())
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["values"] = np.zeros((5, 8), np.float16)
    (tmp_path / "raw.bin").write_bytes(bytes(80))
    for name in ("external", "soft", "storage"):
        path = tmp_path / f"{name}.h5"
        path.write_bytes((tmp_path / "a.h5").read_bytes())
        with h5py.File(path, "r+") as file:
            del file["features"]
            if name == "external":
                file["features"] = h5py.ExternalLink("secret.h5", "values")
            elif name == "soft":
                file["features"] = h5py.SoftLink("/coords")
            else:
                where = [(str(tmp_path / "raw.bin"), 0, 80)]
                file.create_dataset("features", (5, 8), np.float16, external=where)
        with pytest.raises(BagError, match=r"not followed|not read"):
            read_bag(path)


def test_an_array_that_is_larger_than_its_file_is_refused(tmp_path):
    write_bag(tmp_path / "a.h5", make_bag())
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["features"]
        file.create_dataset("features", (3_000_000, 320), np.float16, chunks=(1000, 320))
    with pytest.raises(BagError, match="the file does not have"):
        read_bag(tmp_path / "a.h5")


@pytest.mark.parametrize("change", ["group", "text", "look", "shape"])
def test_what_is_no_bag_is_one_clear_error(tmp_path, change):
    path = tmp_path / "a.h5"
    write_bag(path, make_bag())
    with h5py.File(path, "r+") as file:
        if change == "shape":
            file.attrs["shape"] = "abc"
        elif change == "look":
            file["look_x"] = np.zeros((5, 8))
        else:
            del file["features"]
            if change == "group":
                file.create_group("features")
            else:
                file["features"] = ["a"] * 5
    with pytest.raises(BagError, match=r"no array of numbers|no look|was changed"):
        read_bag(path)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_raise_nothing_foreign(tmp_path, seed):
    path = tmp_path / "a.h5"
    write_bag(path, make_bag())
    content, rng = path.read_bytes(), np.random.default_rng(seed)
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(content), 6000), 3):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        for read in (read_bag, bag_info, read_tile_labels):
            with suppress(BagError):
                read(path)


def test_a_bag_of_another_slide_is_noticed(tmp_path):
    for name in ("a", "b"):
        write_bag(tmp_path / f"{name}.h5", make_bag(slide_id="a"))
    table = pd.DataFrame({"slide_id": ["a", "b"], "case_id": ["a", "b"], "label": ["x", "y"]})
    with pytest.raises(BagError, match=r"b\.h5: says that it is the bag of slide 'a'"):
        Cohort(table, ("x", "y"), tmp_path, tmp_path).load_bags()


# Digests


def full_bag(path: Path) -> Path:
    """A bag with all kinds of data sets."""
    write_bag(path, replace(make_bag(), looks={64: np.ones((5, 3), np.float16)}), np.zeros(5))
    return path


@pytest.mark.parametrize("name", ["features", "coords", "rowcol", "patches", "look_64", "tile_labels"])
def test_a_changed_value_of_any_data_set_is_noticed(tmp_path, name):
    path = full_bag(tmp_path / "a.h5")
    read = read_tile_labels if name == "tile_labels" else read_bag
    read(path)
    with h5py.File(path, "r+") as file:
        file[name][(0,) * file[name].ndim] = file[name][(0,) * file[name].ndim] == 0
    with pytest.raises(BagError, match=f"{name} was changed or damaged.*Delete the file and extract"):
        read(path)


@pytest.mark.parametrize("change", ["value", "new", "gone", "data set", "digest", "all digests"])
def test_changed_attributes_and_missing_parts_are_noticed(tmp_path, change):
    path = full_bag(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        if change == "value":
            file.attrs["slide_id"] = "another"
        elif change == "new":
            file["coords"].attrs["overlap"] = 3
        elif change == "gone":
            del file.attrs["encoder"]
        elif change == "data set":
            del file["patches"]
        elif change == "digest":
            del file["patches"].attrs["sha256"]
        else:
            del file.attrs["attrs_sha256"]
    for read in (read_bag, bag_info):
        with pytest.raises(BagError, match=r"changed or damaged|digest of .* is missing"):
            read(path)


def test_single_bits_flipped_are_refused_or_change_nothing(tmp_path):
    path = full_bag(tmp_path / "a.h5")
    content, whole = path.read_bytes(), read_bag(path)
    rng, n_refused = np.random.default_rng(0), 0
    for place in rng.choice(8 * len(content), 300, replace=False):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            bag = read_bag(path)
        except BagError:
            n_refused += 1
            continue
        for name in ("features", "coords", "rowcol", "patches"):
            np.testing.assert_array_equal(getattr(bag, name), getattr(whole, name))
        assert (bag.slide_id, bag.shape, bag.encoder) == (whole.slide_id, whole.shape, whole.encoder)
        np.testing.assert_array_equal(bag.looks[64], whole.looks[64])
    assert n_refused > 50


def test_another_attribute_of_the_users_is_read_as_written(tmp_path):
    odd = {
        "a": [1, 2],
        "b": "text",
        "c": np.float32(0.5),
        "d": np.nan,
        "e": True,
        "f": np.array(["x", "y"], "S"),
    }
    write_bag(tmp_path / "a.h5", make_bag(**odd))
    bag = read_bag(tmp_path / "a.h5")
    write_bag(tmp_path / "b.h5", bag)
    again = read_bag(tmp_path / "b.h5")
    assert list(again.attrs) == list(bag.attrs)
    assert not {"sha256", "attrs_sha256"} & set(bag.attrs)
