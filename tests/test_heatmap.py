"""Heatmaps as OME-TIFF: each pixel has the value of the tile over which it lies, at every level."""

import dataclasses
import json

import numpy as np
import pytest
from model_factory import make_model, write_textured_slide
from slide_factory import bounds_properties, slide_properties
from tifffile import TiffFile

from hdmil_lib.encoders.extraction import extract_slide
from hdmil_lib.errors import BagError
from hdmil_lib.inference.prediction import Prediction
from hdmil_lib.slides import Slide


def drawn(rows: int, cols: int, pitch: float, origin: tuple[int, int], seed: int = 0) -> Prediction:
    """A made-up prediction of some tiles of a grid whose tiles are `pitch` level-0 pixels wide."""
    rng = np.random.default_rng(seed)
    rowcol = np.argwhere(rng.random((rows, cols)) < 0.6)
    attention = rng.normal(size=(len(rowcol), 2)).astype("f4")
    attention[rng.random(len(rowcol)) < 0.3] = np.nan
    return Prediction(
        slide_id="s",
        classes=("a", "b"),
        probabilities=np.array([0.4, 0.6]),
        coords=np.rint(np.array(origin) + rowcol[:, ::-1] * pitch).astype(np.int64),
        tile_size_level0=(round(pitch), round(pitch)),
        shape=(rows, cols),
        rowcol=rowcol,
        attention=attention,
        mask=rng.random((len(rowcol), 2)) < 0.5,
        seconds={"total": 1.0},
        thumbnail=np.zeros((rows * 16, cols * 16, 3), np.uint8),
        slide_size=(int(origin[0] + cols * pitch) + 77, int(origin[1] + rows * pitch) + 300),
    )


@pytest.mark.parametrize(
    ("rows", "cols", "pitch", "origin"),
    [(40, 70, 256.0, (0, 0)), (9, 12, 509.37, (1000, 37)), (3, 1, 100.0, (5, 5))],
)
def test_each_pixel_has_the_value_of_its_tile(tmp_path, rows, cols, pitch, origin):
    prediction = drawn(rows, cols, pitch, origin)
    prediction.to_ome_tiff(tmp_path / "map.ome.tif")
    with TiffFile(tmp_path / "map.ome.tif") as file:
        series = file.series[0]
        levels = [level.asarray() for level in series.levels]
        description = file.ome_metadata
    factor = int(pitch) // 16
    width, height = (-(-side // factor) for side in prediction.slide_size)
    assert levels[0].shape == (3, height, width)
    assert max(levels[-1].shape) <= 512 * 1.01 + 1
    um = 128 / round(pitch) * factor
    assert f'PhysicalSizeX="{um}"'[:22] in description
    assert "attention for b" in description
    read = prediction.read
    for level, image in enumerate(levels):
        centers = (prediction.coords + pitch / 2) / (factor * 2**level)
        x, y = np.floor(centers).astype(int).T
        kept = image[2, y, x]
        np.testing.assert_array_equal(kept == 255, prediction.kept)
        np.testing.assert_array_equal(kept == 128, ~prediction.kept)
        for c in range(2):
            values = image[c, y, x]
            np.testing.assert_array_equal(values > 0, read)
            order = prediction.attention[read, c].argsort()
            assert (np.diff(values[read][order].astype(int)) >= 0).all()
    at_full = levels[0][2]
    assert (at_full > 0).sum() == pytest.approx(len(read) * (pitch / factor) ** 2, rel=0.05)
    outside = at_full[:, : max(0, int(origin[0] / factor) - 1)]
    assert not outside.any()


def test_a_predicted_slide_is_covered_and_a_bag_that_does_not_know_its_slide_is_refused(tmp_path):
    path = write_textured_slide(tmp_path / "s.tif", 5, 6)
    model = make_model(path)
    prediction = model.predict(path, device="cpu")
    prediction.to_ome_tiff(tmp_path / "map.ome.tif")
    with Slide(path) as slide, TiffFile(tmp_path / "map.ome.tif") as file:
        size = tuple(-(-side // 16) for side in slide.dimensions)
        assert file.series[0].shape == (3, size[1], size[0])
    prediction = drawn(3, 3, 256.0, (0, 0))
    object.__setattr__(prediction, "slide_size", None)
    with pytest.raises(BagError, match="does not say how large its slide is"):
        prediction.to_ome_tiff(tmp_path / "other.ome.tif")
    assert not (tmp_path / "other.ome.tif").exists()


def test_of_a_slide_with_bounds_the_scanned_part_is_drawn_as_qupath_shows_it(tmp_path):
    """QuPath counts pixels from the corner of the scanned part: so do map and GeoJSON, of slide and bag."""
    path = write_textured_slide(tmp_path / "s.tif", 6, 8)
    with slide_properties(bounds_properties(512, 256, 1280, 1024)):
        model = make_model(path)
        slide = model.predict(path)
        bag = model.predict(extract_slide(path, model.encoder, tmp_path / "s.h5"))
    whole = dataclasses.replace(slide, bounds=None)
    assert slide.coords.min(0).tolist() == [512, 256]
    np.testing.assert_array_equal(slide.coords, bag.coords)
    maps = {}
    for name, prediction in (("slide", slide), ("bag", bag), ("whole", whole)):
        prediction.to_ome_tiff(tmp_path / f"{name}.ome.tif")
        prediction.to_geojson(tmp_path / f"{name}.geojson", kept_only=False)
        with TiffFile(tmp_path / f"{name}.ome.tif") as file:
            kept = file.series[0].levels[0].asarray()[-1]
        features = json.loads((tmp_path / f"{name}.geojson").read_text())["features"]
        maps[name] = kept, np.array([feature["geometry"]["coordinates"][0][0] for feature in features])
    for name in ("slide", "bag"):
        np.testing.assert_array_equal(maps[name][0], maps["whole"][0][16:80, 32:112])
        np.testing.assert_array_equal(maps[name][1], maps["whole"][1] - [512, 256])
