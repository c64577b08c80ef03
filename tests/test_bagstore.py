"""Bags on disk: what is written is read, and nothing damaged or mixed passes for a bag."""

import h5py
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.errors import BagError
from hdmil_lib.bags import (
    TRIDENT_ATTRS,
    Bag,
    bag_info,
    check_same_features,
    read_bag,
    read_tile_labels,
    write_bag,
)

ATTRS = {
    "encoder": "some_encoder",
    "weights_hash": "0123456789ab",
    "precision": "fp32",
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "level0_width": 10_000,
    "level0_height": 8_000,
}


def make_bag(n: int = 5, dim: int = 8, slide_id: str = "slide", **attrs) -> Bag:
    rng = np.random.default_rng(n)
    return Bag(
        slide_id,
        rng.normal(size=(n, dim)).astype(np.float16),
        rng.integers(0, 10_000, (n, 2)),
        rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8),
        ATTRS | attrs,
    )


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 40),
    dim=st.integers(1, 30),
    compress=st.booleans(),
    data=st.data(),
)
def test_a_bag_survives_the_disk(tmp_path_factory, n, dim, compress, data):
    features = data.draw(hnp.arrays(np.float16, (n, dim), elements=st.floats(-100, 100, width=16)))
    coords = data.draw(hnp.arrays(np.int64, (n, 2), elements=st.integers(0, 2**40)))
    bag = Bag("slide", features, coords, make_bag(n).patches, ATTRS)
    path = tmp_path_factory.mktemp("bags") / "slide.h5"
    write_bag(path, bag, compress=compress)
    back = read_bag(path)
    for name in ("features", "coords", "patches"):
        np.testing.assert_array_equal(getattr(back, name), getattr(bag, name))
        assert getattr(back, name).dtype == getattr(bag, name).dtype
    assert back.slide_id == "slide" and len(back) == n
    assert back.attrs.items() >= ATTRS.items()


def test_the_file_is_laid_out_as_trident_expects(tmp_path):
    write_bag(tmp_path / "slide.h5", make_bag())
    with h5py.File(tmp_path / "slide.h5") as file:
        assert file["features"].shape == (5, 8) and file["coords"].shape == (5, 2)
        assert set(file["coords"].attrs) == set(TRIDENT_ATTRS)
        assert file["coords"].attrs["name"] == "slide"
        assert {"encoder", "weights_hash", "precision", "library_version", "schema_version"} <= set(
            file.attrs
        )


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
        write_bag(tmp_path / "slide.h5", Bag("slide", features, bag.coords, bag.patches, ATTRS))
    assert not list(tmp_path.iterdir())


def test_arrays_of_different_tiles_are_refused(tmp_path):
    bag = make_bag()
    with pytest.raises(BagError, match="same tiles"):
        write_bag(tmp_path / "slide.h5", Bag("slide", bag.features[:4], bag.coords, bag.patches, ATTRS))
    with pytest.raises(BagError, match="same tiles"):
        write_bag(tmp_path / "slide.h5", bag, tile_labels=np.zeros(4))
    with pytest.raises(BagError, match="same tiles"):
        write_bag(tmp_path / "slide.h5", make_bag(0))


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
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((3, 8)), np.zeros((3, 2), int)
    with pytest.raises(BagError, match="clam.h5: lacks patches"):
        read_bag(tmp_path / "clam.h5")


def test_a_tampered_bag_is_refused(tmp_path):
    path = tmp_path / "slide.h5"
    write_bag(path, make_bag())
    with h5py.File(path, "a") as file:
        del file["coords"]
        file["coords"] = np.zeros((4, 2), int)
    with pytest.raises(BagError, match=r"same tiles.*coords \(4, 2\)"):
        read_bag(path)


def test_the_bag_of_another_encoder_is_named():
    same = [make_bag(slide_id=name) for name in "abc"]
    check_same_features(same)
    for odd in (
        make_bag(slide_id="odd", encoder="other"),
        make_bag(slide_id="odd", weights_hash="ffffffffffff"),
        make_bag(dim=9, slide_id="odd"),
    ):
        with pytest.raises(BagError, match="'odd'.*one encoder"):
            check_same_features([*same, odd])
