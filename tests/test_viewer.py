"""The slide viewer without a browser: messages in, JPEG out, traits, static frame, damage, and closing."""

import base64
import gc
import io
import math
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import ipywidgets
import numpy as np
import pytest
import traitlets
from model_factory import make_model, write_textured_slide
from PIL import Image, ImageColor
from slide_factory import bounds_properties, damage_tile, paint_disc, slide_properties, write_slide

from hdmil_lib.errors import SlideError
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.slides.sample import sample_slide
from hdmil_lib.viz import viewer as viewer_package
from hdmil_lib.viz.overlays import DROPPED
from hdmil_lib.viz.style import ORANGE
from hdmil_lib.viz.viewer import Overlay, SlideViewer, TileScatter, link_scatter
from hdmil_lib.viz.viewer.deepzoom import GRAY, DeepZoom
from hdmil_lib.viz.viewer.frames import bar_length

JPEG_ERROR = 8.0
"""Mean difference in gray levels that JPEG stays below on tissue."""


def decode(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


class Sent(list):
    """What a viewer sends to the browser, each message with its bytes."""

    def __init__(self, viewer: SlideViewer):
        super().__init__()
        viewer.send = lambda content, buffers=None: self.append((content, buffers))

    def wait(self, n: int) -> list:
        for _ in range(500):
            if len(self) >= n:
                return self
            time.sleep(0.01)
        raise AssertionError(f"{len(self)} of {n} messages came")


def ask(viewer: SlideViewer, level: int, x: int, y: int, kind: str = "tile") -> None:
    """Hand over a message as the comm of the widget does."""
    viewer._handle_custom_msg({"kind": kind, "level": level, "x": x, "y": y}, [])


@pytest.fixture
def slide():
    with Slide(sample_slide()) as slide:
        yield slide


@pytest.fixture
def viewer(slide):
    grid = TileGrid.from_slide(slide)
    values = np.linspace(0, 1, len(grid)) ** 2
    values[5] = np.nan
    overlays = {"attention": values, "kept": np.arange(len(grid)) % 2 == 0, "tissue": grid.tissue}
    viewer = SlideViewer(slide, grid, overlays | {"truth": Overlay(np.arange(len(grid)) / 50, "share")})
    yield viewer
    viewer.close()


# Tiles


def test_tiles_are_the_pixels_of_the_slide_at_every_level(viewer, slide):
    sent = Sent(viewer)
    tiles = viewer.tiles
    keys = []
    for level in range(8, tiles.max_level + 1):
        width, height = tiles.size(level)
        last = (math.ceil(width / 256) - 1, math.ceil(height / 256) - 1)
        keys += [(level, 0, 0), (level, *last), (level, last[0] // 2, last[1])]
    for key in keys:
        ask(viewer, *key)
    for content, (jpeg,) in sent.wait(len(keys)):
        level, x, y = (content[name] for name in ("level", "x", "y"))
        assert content["error"] == ""
        scale = 2 ** (tiles.max_level - level)
        width, height = (min(256, n - 256 * i) for n, i in zip(tiles.size(level), (x, y), strict=True))
        field = slide.read_field(256 * x * scale, 256 * y * scale, (width, height), slide.mpp[0] * scale)
        found = decode(jpeg)
        assert found.shape == field.shape
        error = np.abs(found - field).mean()
        assert error < JPEG_ERROR, (level, x, y)
        if field.std() > 25:  # there is something to be seen
            assert 2 * error < np.abs(np.roll(found, 1, axis=1) - field).mean(), (level, x, y)


def test_tiles_together_cover_the_slide_exactly(slide):
    tiles = DeepZoom(slide)
    assert (tiles.width, tiles.height) == slide.dimensions
    level = tiles.max_level - 2
    width, height = tiles.size(level)
    picture = np.zeros((height, width, 3), np.uint8)
    for y in range(math.ceil(height / 256)):
        for x in range(math.ceil(width / 256)):
            tile = tiles.pixels(level, x, y)
            picture[256 * y : 256 * y + 256, 256 * x : 256 * x + 256] = tile
    whole = slide.read_field(0, 0, (width, height), 4 * slide.mpp[0])
    np.testing.assert_array_equal(picture, whole)


@pytest.mark.parametrize("mpp", [(0.5, 0.5), (0.25, 0.5), (0.5, 0.4)])
def test_places_are_right_for_pixels_of_any_shape_and_for_bounds(tmp_path, mpp):
    pixels = paint_disc((1600, 1200), mpp, (300.0, 200.0), 20.0)
    path = write_slide(tmp_path / "disc.tif", pixels, mpp)
    with slide_properties(bounds_properties(100, 60, 1400, 1000)), Slide(path) as slide:
        tiles = DeepZoom(slide)
        for level in range(tiles.max_level - 2, tiles.max_level + 1):
            side = 256 * tiles.mpp * 2 ** (tiles.max_level - level)
            center = 300 - 100 * mpp[0], 200 - 60 * mpp[1]
            x, y = (int(place / side) for place in center)
            weight = 255.0 - tiles.pixels(level, x, y)[..., 1]
            rows, columns = np.indices(weight.shape) + 0.5
            um = side / 256
            if min(center[0] - x * side, center[1] - y * side) < 22:
                continue  # the disc reaches into the next tile
            if max(center[0] - x * side, center[1] - y * side) > side - 22:
                continue
            found = x * side + (columns * weight).sum() / weight.sum() * um
            assert found == pytest.approx(center[0], abs=0.1 * um)
            assert y * side + (rows * weight).sum() / weight.sum() * um == pytest.approx(
                center[1], abs=0.1 * um
            )


def test_coarse_tiles_of_a_slide_without_a_pyramid_come_from_its_thumbnail(tmp_path):
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 220, (12, 20, 3)).astype(np.uint8)
    path = write_slide(tmp_path / "flat.tif", coarse.repeat(256, 0).repeat(256, 1), pyramid=False, tile=256)
    with Slide(path) as slide:
        tiles = DeepZoom(slide)
        level = 8  # 32 pixels of the file per pixel
        reads = []
        slide.read_field = lambda *args: reads.append(args)
        found = tiles.pixels(level, 0, 0)
        assert reads == []
    wanted = coarse.repeat(8, 0).repeat(8, 1).astype(int)
    inner = np.s_[3::8, 3::8]
    assert found.shape == wanted.shape
    assert np.abs(found[inner] - wanted[inner]).mean() < 8


def test_a_tile_is_read_once_and_memory_is_bounded(slide):
    tiles = DeepZoom(slide, cache_bytes=60_000)
    reads = []
    read = slide.read_field
    slide.read_field = lambda *args: reads.append(args) or read(*args)
    for _ in range(2):
        first = tiles.tile(12, 3, 4)
    assert len(reads) == 1
    for y in range(8):
        tiles.tile(12, 4, y)
        assert 0 < tiles.n_bytes <= 60_000
    assert tiles.tile(12, 3, 4) == first
    assert len(reads) == 10  # it had made room and was read again
    tiles.clear()
    assert tiles.n_bytes == 0


def test_the_first_tiles_come_within_a_second(slide):
    viewer = SlideViewer(slide, TileGrid.from_slide(slide))
    sent, start = Sent(viewer), time.perf_counter()
    for x in range(3):
        for y in range(3):
            ask(viewer, 10, x, y)
    sent.wait(9)
    assert time.perf_counter() - start < 1
    viewer.close()


def test_requests_are_answered_in_order_and_dropped_ones_not_at_all(viewer):
    sent, go, reading = Sent(viewer), threading.Event(), []
    tile = viewer.tiles.tile

    def slow(level, x, y):
        reading.append(x)
        go.wait(5)
        return tile(level, x, y)

    viewer.tiles.tile = slow
    for x in range(6):
        ask(viewer, 12, x, 3)
    ask(viewer, 12, 4, 3, kind="drop")
    ask(viewer, 12, 2, 3, kind="drop")
    ask(viewer, 12, 7, 9, kind="drop")  # was never asked for
    go.set()
    sent.wait(4)
    time.sleep(0.1)
    assert sorted(content["x"] for content, _ in sent) == [0, 1, 3, 5]
    assert sorted(reading[:2]) == [0, 1]
    assert reading[2:] == [3, 5]
    assert viewer._pending == {}


# Damage


def test_a_damaged_tile_is_gray_and_says_why(tmp_path):
    whole = write_textured_slide(tmp_path / "whole.tif", compression="jpeg")
    broken = damage_tile(whole, tmp_path / "broken.tif", [0, 1, 2, 3])
    with Slide(broken) as slide:
        viewer = SlideViewer(slide)
        sent = Sent(viewer)
        ask(viewer, viewer.tiles.max_level, 0, 0)
        ask(viewer, viewer.tiles.max_level, 3, 3)
        by_x = {content["x"]: (content["error"], decode(jpeg)) for content, (jpeg,) in sent.wait(2)}
        assert "broken.tif" in by_x[0][0]
        assert np.abs(by_x[0][1] - GRAY).max() <= 1
        assert by_x[3][0] == ""
        viewer.close()


def test_a_damaged_tile_can_be_selected(tmp_path):
    whole = write_textured_slide(tmp_path / "whole.tif", compression="jpeg")
    with Slide(whole) as slide:
        grid = TileGrid.from_slide(slide)
    with Slide(damage_tile(whole, tmp_path / "broken.tif", [0])) as slide:
        viewer = SlideViewer(slide, grid, selected=0)
        assert "broken.tif" in viewer._details["error"]
        assert np.abs(decode(viewer._details["tile"]) - GRAY).max() <= 1
        viewer.close()


def test_a_tile_that_does_not_exist_is_an_answer_too(viewer):
    sent = Sent(viewer)
    ask(viewer, 99, 0, 0)
    ((content, (jpeg,)),) = sent.wait(1)
    assert "no level 99" in content["error"]
    assert decode(jpeg).shape == (256, 256, 3)


# Traits


def test_a_selected_tile_is_shown_beside_its_patch_with_values_and_ranks(viewer, slide):
    assert viewer._details == {}
    viewer.set_state({"selected": 7})  # as a click does
    details = viewer._details
    tile = viewer.grid.read_tile(slide, 7)
    assert np.abs(decode(details["tile"]) - tile).mean() < JPEG_ERROR
    np.testing.assert_array_equal(decode(details["patch"]), viewer.grid.patches[7])
    n = len(viewer.grid)
    values = {name: (value, rank) for name, value, rank in details["values"]}
    assert values["attention"] == (f"{viewer.overlays['attention'].values[7]:.3g}", f"{n - 7} of {n - 1}")
    assert values["kept"] == ("dropped", "")
    assert values["truth"] == ("14%", f"{n - 7} of {n}")
    assert "tissue" not in values
    viewer.selected = 5
    assert ("attention", "not read", "") in viewer._details["values"]
    viewer.selected = None
    assert viewer._details == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("overlay", "evidence"), ("selected", 39), ("selected", -1), ("region", [0, 39]), ("opacity", 1.5)],
)
def test_traits_refuse_what_is_not_there(viewer, name, value):
    before = getattr(viewer, name)
    with pytest.raises(traitlets.TraitError):
        setattr(viewer, name, value)
    assert getattr(viewer, name) == before


def test_traits_link_with_other_widgets(viewer):
    slider = ipywidgets.FloatSlider(0.2, min=0, max=1)
    link = traitlets.link((slider, "value"), (viewer, "opacity"))
    assert viewer.opacity == 0.2
    viewer.set_state({"opacity": 0.7})
    assert slider.value == 0.7
    link.unlink()


# Overlays


def test_an_overlay_has_a_pixel_per_tile_where_the_tile_is(viewer):
    layers = {layer["name"]: layer for layer in viewer._layers}
    picture = np.array(Image.open(io.BytesIO(layers["kept"]["png"])))
    grid, kept = viewer.grid, viewer.overlays["kept"].values
    assert picture.shape == (*grid.shape, 4)
    shown = picture[grid.rowcol[:, 0], grid.rowcol[:, 1], 3]
    np.testing.assert_array_equal(shown == 255, ~kept)
    assert picture[..., 3].sum() == 255 * (~kept).sum()
    attention = np.array(Image.open(io.BytesIO(layers["attention"]["png"])))
    assert attention[tuple(grid.rowcol[5])][3] == 0  # not read
    assert attention[tuple(grid.rowcol[38])].tolist() == [253, 231, 37, 255]  # the highest, viridis' yellow
    # the overlay ends where the last tile of its row does, to half a pixel
    width, height = layers["kept"]["size"]
    pitch = 128 / viewer.slide.mpp[0]
    assert width == pytest.approx(grid.shape[1] * pitch, abs=1)
    assert height == pytest.approx(grid.shape[0] * pitch, abs=1)
    tissue = Image.open(io.BytesIO(layers["tissue"]["png"]))
    assert tissue.size == grid.tissue.shape[::-1]
    assert layers["tissue"]["size"][0] / tissue.width == pytest.approx(8 / viewer.slide.mpp[0], rel=1e-3)


def test_tiles_of_other_sizes_are_drawn_and_shown_where_they_are(slide):
    grid = TileGrid.from_slide(slide, tile_size=512, mpp=0.5)
    viewer = SlideViewer(slide, grid, {"rank": np.arange(len(grid)), "tissue": grid.tissue}, selected=2)
    sizes = {layer["name"]: layer["size"] for layer in viewer._layers}
    assert sizes["rank"][0] == pytest.approx(grid.shape[1] * 256 / slide.mpp[0])
    assert sizes["tissue"][0] == pytest.approx(grid.tissue.shape[1] * 16 / slide.mpp[0])
    wanted = grid.at(256).read_tile(slide, 2)
    assert np.abs(decode(viewer._details["tile"]) - wanted).mean() < JPEG_ERROR
    np.testing.assert_array_equal(decode(viewer._details["patch"]), grid.patches[2])
    viewer.close()


def test_values_are_colored_by_size_or_by_rank():
    values = np.array([0.0, 1.0, 100.0])
    by_rank, by_size = (Overlay(values, kind).colors() for kind in ("rank", "value"))
    np.testing.assert_array_equal(by_rank[[0, 2]], by_size[[0, 2]])
    assert not np.array_equal(by_rank[1], by_size[1])
    assert Overlay(np.full(3, 2.0), "value").colors().shape == (3, 4)
    assert Overlay(np.full(3, np.nan)).colors()[:, 3].tolist() == [0, 0, 0]
    share = Overlay(np.array([0.0, 0.5, 1.0]), "share").colors()
    assert share[0, 3] == 0 < share[1, 3] < share[2, 3] == 255


def test_overlays_of_the_wrong_size_are_refused(slide):
    grid = TileGrid.from_slide(slide)
    with pytest.raises(ValueError, match=r"shape \(3,\), but \(39,\)"):
        SlideViewer(slide, grid, {"wrong": np.zeros(3)})
    with pytest.raises(ValueError, match="need the grid"):
        SlideViewer(slide, overlays={"alone": np.zeros(39)})
    with pytest.raises(SlideError):
        SlideViewer("absent.svs")


def test_an_overlay_can_be_added_changed_and_removed(viewer):
    n = len(viewer.grid)
    viewer.selected = 2
    viewer.set_overlay("evidence", np.arange(n))
    viewer.overlay = "evidence"
    before = viewer._layers[-1]["png"]
    assert ("evidence", "2", f"{n - 2} of {n}") in viewer._details["values"]
    viewer.set_overlay("evidence", -np.arange(n))
    assert viewer._layers[-1]["png"] != before
    assert [layer["name"] for layer in viewer._layers] == list(viewer.overlays)
    with pytest.raises(ValueError, match="is needed"):
        viewer.set_overlay("evidence", np.arange(3))
    assert len(viewer.overlays["evidence"].values) == n
    viewer.drop_overlay("evidence")
    assert viewer.overlay == ""
    assert "evidence" not in [layer["name"] for layer in viewer._layers]


def test_an_overlay_of_many_tiles_changes_fast(tmp_path):
    """A slider that moves a threshold has 200 ms per step, also on a slide of 20,000 tiles."""
    rowcol = np.argwhere(np.ones((125, 160)))
    tiles = SimpleNamespace(
        rowcol=rowcol,
        coords=rowcol[:, ::-1] * 256,
        shape=(125, 160),
        thumbnail=np.full((2000, 2560, 3), 255, np.uint8),
        tile_um=128.0,
    )
    with Slide(write_textured_slide(tmp_path / "slide.tif")) as slide:
        viewer = SlideViewer(slide, tiles)
        scores = np.random.default_rng(0).normal(size=20_000)
        start = time.perf_counter()
        for threshold in (0.0, 0.5, 1.0):
            viewer.set_overlay("kept", scores > threshold)
        assert (time.perf_counter() - start) / 3 < 0.2
        viewer.close()


def test_a_point_and_its_tile_are_selected_together(viewer):
    n = len(viewer.grid)
    box = link_scatter(viewer, np.random.default_rng(0).normal(size=(n, 2)), np.arange(n))
    scatter = box.children[1]
    assert isinstance(scatter, TileScatter)
    scatter.set_state({"selected": 12})  # as a click on a point does
    assert viewer._details["title"].startswith("tile 12 of")
    viewer.region = [1, 2]
    assert scatter.region == [1, 2]
    points = np.frombuffer(scatter._points, "<f4").reshape(n, 2)
    assert points.min() == 0
    assert points.max() == 1
    with pytest.raises(ValueError, match="3 points, but the viewer has 39"):
        link_scatter(viewer, np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        TileScatter(np.zeros((3, 3)))
    assert len(np.frombuffer(TileScatter(np.zeros((4, 2)))._points, "<f4")) == 8


def test_a_linked_scatter_leaves_a_picture(viewer):
    n = len(viewer.grid)
    points = np.zeros((n, 2))
    points[7] = 1  # alone in the upper right corner
    box = link_scatter(viewer, points)
    viewer.selected = 7
    picture = decode(box.frame(200))
    assert picture.shape[0] == 200
    center = picture.shape[1] - 12
    ring = np.flatnonzero((picture[12] == ImageColor.getrgb(ORANGE)).all(1))
    assert center - 9 <= ring.min() < ring.max() <= center + 9
    assert {"image/png", "text/plain"} <= set(box._repr_mimebundle_())


def test_a_prediction_shows_its_attention_and_kept_tiles(tmp_path):
    path = write_textured_slide(tmp_path / "slide.tif")
    model = make_model(path)
    prediction = model.predict(path)
    viewer = prediction.view(path, {"truth": Overlay(np.ones(prediction.n_tiles), "share")})
    best = f"attention, {prediction.label}"
    assert list(viewer.overlays)[0] == best == viewer.overlay
    assert set(viewer.overlays) == {"attention, class 0", "attention, class 1", "kept tiles", "truth"}
    row = int(np.flatnonzero(prediction.read)[0])
    viewer.selected = row
    assert viewer._details["values"][0][1] == f"{prediction.attention[row, viewer_class(prediction)]:.3g}"
    viewer.close()


def viewer_class(prediction) -> int:
    return prediction.classes.index(prediction.label)


# What stands where no widget can


def test_the_static_frame_shows_slide_overlay_and_marks(viewer):
    viewer.overlay = ""
    bare = decode(viewer.frame(320))
    assert max(bare.shape) == 320
    assert bare.shape[1] / bare.shape[0] == pytest.approx(2220 / 2967, abs=0.005)
    viewer.overlay, viewer.opacity = "kept", 1.0
    covered = decode(viewer.frame(320))
    scale = 320 / 2967
    row, column = viewer.grid.rowcol[1]  # dropped
    y, x = (int((n + 0.5) * viewer._pitch() * scale) for n in (row, column))
    assert covered[y, x].tolist() == [round(255 * level) for level in DROPPED[:3]]
    row, column = viewer.grid.rowcol[0]
    y, x = (int((n + 0.5) * viewer._pitch() * scale) for n in (row, column))
    np.testing.assert_array_equal(covered[y, x], bare[y, x])
    viewer.selected, viewer.region = 10, [2, 3]
    marked = decode(viewer.frame(320))
    yellow = (marked == (240, 228, 66)).all(axis=-1)
    assert yellow.sum() > 200
    assert not (covered == (240, 228, 66)).all(axis=-1).any()


def test_the_frame_travels_beside_the_widget(viewer):
    data, _ = viewer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert base64.b64decode(data["image/png"]) == viewer.frame()
    assert "CMU-1-Small-Region" in data["text/plain"] or "cmu_small_region" in data["text/plain"]


@pytest.mark.parametrize(("mpp", "length"), [(0.25, 20), (0.5, 50), (1.0, 100), (8.0, 500), (100, 10_000)])
def test_the_scale_bar_has_a_round_length(mpp, length):
    assert bar_length(mpp) == length


# Closing


def test_closing_ends_the_threads_and_frees_everything():
    slide = Slide(sample_slide())
    viewer = SlideViewer(slide, TileGrid.from_slide(slide), selected=3)
    ask(viewer, 10, 0, 0)
    viewer._repr_mimebundle_()
    before = {thread for thread in threading.enumerate() if thread.name.startswith("slide-viewer")}
    viewer.close()
    viewer.close()  # twice does no harm
    assert not any(thread.is_alive() for thread in before)
    assert viewer.tiles.n_bytes == 0
    assert slide.read_field(0, 0, (4, 4), 0.5).shape == (4, 4, 3)  # the caller's, and still open
    gone = [weakref.ref(one) for one in (viewer, viewer.tiles, viewer.grid, slide)]
    slide.close()
    del viewer, slide
    gc.collect()
    assert [one() for one in gone] == [None] * 4


def test_closing_closes_a_slide_that_the_viewer_opened():
    viewer, closed = SlideViewer(sample_slide()), []
    close = viewer.slide.close
    viewer.slide.close = lambda: closed.append(close())
    viewer.close()
    viewer.close()
    assert closed == [None]


def test_a_request_after_closing_is_not_an_error(viewer):
    viewer.close()
    ask(viewer, 10, 0, 0)


def test_the_front_end_and_its_license_are_packed():
    folder = Path(viewer_package.__file__).parent
    assert "OpenSeadragon contributors" in (folder / "openseadragon.LICENSE.txt").read_text()
    assert "export default" in SlideViewer._esm
