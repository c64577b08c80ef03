"""Slides are read at the right position and scale, and bad files raise one clear error."""

import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_factory import bounds_properties, find_ink, paint_disc, slide_properties, write_slide

from hdmil_lib.errors import SlideError
from hdmil_lib.slides import Slide

MPP_PROPERTIES = ("openslide.mpp-x", "openslide.mpp-y")
mpps = st.floats(0.2, 1.0)
aspects = st.floats(0.8, 1.25)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (301, 403, 3), dtype=np.uint8)


def without(*keys: str) -> dict[str, None]:
    return dict.fromkeys(keys)


# Scale


def test_mpp_comes_from_the_caller_before_the_file(tmp_path, noise):
    path = write_slide(tmp_path / "a.tif", noise, (0.25, 0.4))
    with Slide(path) as slide:
        assert slide.mpp == pytest.approx((0.25, 0.4), rel=1e-6)  # TIFF keeps float32 resolutions
    with Slide(path, mpp=0.3) as slide:
        assert slide.mpp == (0.3, 0.3)
    with Slide(path, mpp=(0.3, 0.31)) as slide:
        assert slide.mpp == (0.3, 0.31)


def test_mpp_from_tiff_resolution_then_objective_power(tmp_path, noise):
    path = write_slide(tmp_path / "a.tif", noise, (0.25, 0.4))
    with slide_properties(without(*MPP_PROPERTIES)), Slide(path) as slide:
        assert slide.mpp == pytest.approx((0.25, 0.4), rel=1e-6)
    inches = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "101600", "tiff.YResolution": "50800"}
    with slide_properties(without(*MPP_PROPERTIES) | inches), Slide(path) as slide:
        assert slide.mpp == pytest.approx((0.25, 0.5))
    power = {"tiff.ResolutionUnit": None, "openslide.objective-power": "40"}
    with slide_properties(without(*MPP_PROPERTIES) | power), Slide(path) as slide:
        assert slide.mpp == (0.25, 0.25)


def test_no_mpp_asks_for_it(tmp_path, noise):
    path = write_slide(tmp_path / "a.tif", noise, mpp=None)
    with pytest.raises(SlideError, match=r"a\.tif: .*pass mpp="):
        Slide(path)
    with Slide(path, mpp=0.5) as slide:
        assert slide.mpp == (0.5, 0.5)
    with pytest.raises(SlideError, match="must be positive"):
        Slide(path, mpp=0)


# Geometry


def test_properties_of_a_slide(tmp_path, noise):
    with Slide(write_slide(tmp_path / "case 7.tif", noise, tile=16)) as slide:
        assert (slide.name, slide.vendor) == ("case 7", "generic-tiff")
        assert slide.dimensions == (403, 301)
        assert slide.bounds == (0, 0, 403, 301)
        assert len(slide.levels) == 6
        # 403 -> 201 -> 100 loses a column at each step, but a pixel is still 2^level pixels wide.
        assert [level.downsample_x for level in slide.levels] == [1, 2, 4, 8, 16, 32]
        assert [level.downsample_y for level in slide.levels] == [1, 2, 4, 8, 16, 32]


def test_bounds_from_the_properties(tmp_path, noise):
    path = write_slide(tmp_path / "a.tif", noise, (4.0, 4.0), pyramid=False)
    with slide_properties(bounds_properties(101, 53, 200, 150)), Slide(path, mpp=4.0) as slide:
        assert slide.bounds == (101, 53, 200, 150)
        cells = noise[53:203, 101:301].reshape(75, 2, 100, 2, 3).mean((1, 3))
        assert np.abs(slide.thumbnail(8.0) - cells).max() <= 0.5  # rounding to uint8


@settings(max_examples=30, deadline=None)
@given(
    mpp_x=mpps,
    aspect=aspects,
    center=st.tuples(st.floats(50, 150), st.floats(50, 150)),
    corner=st.tuples(st.floats(-20, 20), st.floats(-20, 20)),
    odd=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    field_mpp=st.floats(0.3, 8.0),
    pyramid=st.booleans(),
)
def test_a_field_shows_a_disc_where_it_is(mpp_x, aspect, center, corner, odd, field_mpp, pyramid):
    mpp = (mpp_x, mpp_x * aspect)
    size = tuple(math.ceil(200 / m) + o for m, o in zip(mpp, odd, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = write_slide(
            Path(folder) / "disc.tif", paint_disc(size, mpp, center, 20), mpp, pyramid=pyramid, tile=16
        )
        with Slide(path, mpp=mpp) as slide:
            side = math.ceil(230 / field_mpp)
            x, y = (c / m for c, m in zip(corner, slide.mpp, strict=True))
            found = find_ink(slide.read_field(x, y, (side, side), field_mpp), field_mpp)
    # Resampling is symmetric, so the error is far below half a pixel: it comes from rounding colors to uint8.
    expected = (center[0] - corner[0], center[1] - corner[1])
    assert found == pytest.approx(expected, abs=0.05 * max(field_mpp, *mpp))


@settings(max_examples=25, deadline=None)
@given(
    mpp_x=mpps,
    aspect=aspects,
    center=st.tuples(st.floats(50, 150), st.floats(50, 150)),
    offset=st.tuples(st.integers(0, 25), st.integers(0, 25)),
    thumbnail_mpp=st.floats(1.0, 16.0),
    pyramid=st.booleans(),
)
def test_a_thumbnail_shows_a_disc_where_it_is(mpp_x, aspect, center, offset, thumbnail_mpp, pyramid):
    mpp = (mpp_x, mpp_x * aspect)
    size = tuple(math.ceil(200 / m) for m in mpp)
    bounds = (*offset, size[0] - offset[0], size[1] - offset[1])
    with tempfile.TemporaryDirectory() as folder, slide_properties(bounds_properties(*bounds)):
        path = write_slide(
            Path(folder) / "disc.tif", paint_disc(size, mpp, center, 20), mpp, pyramid=pyramid, tile=16
        )
        with Slide(path, mpp=mpp) as slide:
            thumbnail = slide.thumbnail(thumbnail_mpp)
            extent = [bounds[2] * slide.mpp[0], bounds[3] * slide.mpp[1]]
    assert thumbnail.shape[1::-1] == tuple(math.ceil(e / thumbnail_mpp - 1e-6) for e in extent)
    expected = (center[0] - offset[0] * mpp[0], center[1] - offset[1] * mpp[1])
    found = find_ink(thumbnail, thumbnail_mpp)
    assert found == pytest.approx(expected, abs=0.05 * max(thumbnail_mpp, *mpp))


# Pixels


def test_stored_pixels_come_back_untouched(tmp_path, noise):
    with Slide(write_slide(tmp_path / "a.tif", noise, (0.5, 0.5))) as slide:
        for mpp in (0.5, 0.500_001, 0.499_999):  # a millionth does not require resampling
            assert np.array_equal(slide.read_field(37, 21, (256, 200), mpp), noise[21:221, 37:293])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_power_of_two_of_pixels_is_averaged(tmp_path, noise, factor):
    path = write_slide(tmp_path / "a.tif", noise, (0.25, 0.25), pyramid=False)
    with Slide(path) as slide:
        stored = slide.read_field(12, 8, (32 * factor, 24 * factor), 0.25)
        field = slide.read_field(12, 8, (32, 24), 0.25 * factor)
        shifted = slide.read_field(12.5, 8, (32, 24), 0.25 * factor)  # is resampled
    means = stored.reshape(24, factor, 32, factor, 3).mean((1, 3))
    assert np.array_equal(field, np.floor(means + 0.5))
    assert np.abs(shifted.astype(int) - field).max() > 2


def test_outside_of_the_slide_is_white(tmp_path, noise):
    with Slide(write_slide(tmp_path / "a.tif", noise // 2, (0.5, 0.5))) as slide:
        field = slide.read_field(-10, 291, (20, 20), 0.5)
        assert field.flags.writeable  # torch.from_numpy warns otherwise
        assert np.array_equal(field[:10, 10:], noise[291:, :10] // 2)
        assert (field[:, :10] == 255).all()
        assert (field[10:] == 255).all()
        assert (slide.read_field(5000.5, -5000.5, (8, 9), 0.7) == 255).all()


def test_neighboring_fields_join_without_a_seam(tmp_path, noise):
    with Slide(write_slide(tmp_path / "a.tif", noise, (0.3, 0.37), pyramid=False)) as slide:
        whole = slide.read_field(10.3, 20.7, (160, 100), 0.5)
        right = slide.read_field(10.3 + 80 * 0.5 / slide.mpp[0], 20.7, (80, 100), 0.5)
    assert np.abs(whole[:, 80:].astype(int) - right).max() <= 1  # phases differ by float rounding


@pytest.fixture
def regions(monkeypatch) -> list[tuple[int, tuple[int, int]]]:
    """(level, size) of every region that is read from a file."""
    read = []
    read_region = openslide.OpenSlide.read_region

    def record(slide, location, level, size):
        read.append((level, size))
        return read_region(slide, location, level, size)

    monkeypatch.setattr(openslide.OpenSlide, "read_region", record)
    return read


def test_a_field_comes_from_the_coarsest_sufficient_level(tmp_path, noise, regions):
    with Slide(write_slide(tmp_path / "a.tif", noise, (0.25, 0.25), tile=16)) as slide:
        for mpp in (0.1, 0.25, 0.4, 0.499, 0.6, 1.0, 100.0):
            slide.read_field(0, 0, (2, 2), mpp)
    # 0.499 is read from 0.5: half a percent coarser is close enough.
    assert [level for level, _ in regions] == [0, 0, 0, 1, 1, 2, 5]


def test_a_thumbnail_comes_from_its_own_scale_or_twice_as_fine(tmp_path, noise, regions):
    path = write_slide(tmp_path / "a.tif", noise, tile=16)
    for mpp in (0.5, 0.499, 0.47, 0.3, 0.26, 0.25, 0.2):
        with Slide(path, mpp=mpp) as slide:
            slide.thumbnail()
    assert [level for level, _ in regions] == [4, 4, 3, 3, 3, 5, 4]


def test_a_thumbnail_without_pyramid_is_made_from_small_reads(tmp_path, regions):
    pixels = np.full((2500, 5003, 3), 200, np.uint8)
    path = write_slide(tmp_path / "flat.tif", pixels, (0.5, 0.5), pyramid=False, tile=256)
    with Slide(path) as slide:
        thumbnail = slide.thumbnail()
    assert max(width * height for _, (width, height) in regions) <= 2050**2
    assert thumbnail.shape == (157, 313, 3)
    assert (thumbnail[:156, :312] == 200).all()


def test_threads_read_the_same_pixels(tmp_path, noise):
    with Slide(write_slide(tmp_path / "a.tif", noise, (0.3, 0.37))) as slide, ThreadPoolExecutor(4) as pool:
        places = [(x, y) for x in range(0, 400, 50) for y in range(0, 300, 50)]
        fields = list(pool.map(lambda place: slide.read_field(*place, (64, 64), 0.5), places))
        for place, field in zip(places, fields, strict=True):
            assert np.array_equal(field, slide.read_field(*place, (64, 64), 0.5))


def test_real_slide(real_data):
    with Slide(real_data / "cmu_small_region.svs") as slide:
        assert (slide.vendor, slide.mpp, slide.dimensions) == ("aperio", (0.499, 0.499), (2220, 2967))
        field = slide.read_field(1000, 1000, (256, 256), 0.499)
        assert np.array_equal(
            field,
            np.asarray(openslide.OpenSlide(slide.path).read_region((1000, 1000), 0, (256, 256)))[..., :3],
        )
        assert slide.thumbnail().shape == (186, 139, 3)


# Bad files


def test_missing_file(tmp_path):
    with pytest.raises(SlideError, match=r"gone\.svs: no such file"):
        Slide(tmp_path / "gone.svs")
    with pytest.raises(SlideError, match="is a folder without slides"):
        Slide(tmp_path)


@pytest.mark.parametrize("content", [b"slide_id,label\na,1\n", b"II*\0" + b"\0" * 100])
def test_not_a_slide(tmp_path, content):
    path = tmp_path / "labels.svs"
    path.write_bytes(content)
    with pytest.raises(SlideError, match=r"labels\.svs: not a slide"):
        Slide(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_tiff(tmp_path, noise, share):
    path = write_slide(tmp_path / "cut.tif", noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(SlideError, match=r"cut\.tif: .*again"), Slide(path) as slide:
        slide.thumbnail()


def test_damaged_pixels_fail_at_every_read(tmp_path, noise):
    path = write_slide(tmp_path / "bad.tif", noise, pyramid=False, compression="deflate")
    content = bytearray(path.read_bytes())
    content[1000:60_000] = b"\xa5" * 59_000
    path.write_bytes(content)
    with Slide(path) as slide:
        for _ in range(2):
            with pytest.raises(
                SlideError, match=r"bad\.tif: cannot read level 0 .*copy or download it again"
            ):
                slide.read_field(0, 0, (256, 256), 0.5)
        with pytest.raises(SlideError, match=r"bad\.tif"):
            slide.thumbnail()


def test_a_mrxs_file_without_its_folder_says_so(tmp_path):
    (tmp_path / "a.mrxs").write_bytes(b"\xff\xd8")
    with pytest.raises(SlideError, match="its folder a/ is missing"):
        Slide(tmp_path / "a.mrxs")


@pytest.mark.parametrize(
    ("kind", "reason"), [("empty", "is empty"), ("link", "links to .*away"), ("closed", "no permission")]
)
def test_a_file_that_cannot_be_read_has_its_reason(tmp_path, monkeypatch, kind, reason):
    path = tmp_path / "a.svs"
    if kind == "link":
        path.symlink_to(tmp_path / "away.svs")
    else:
        path.write_bytes(b"" if kind == "empty" else b"II*")
    if kind == "closed":  # permissions mean nothing to root, who may run this
        monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SlideError, match=rf"a\.svs: {reason}"):
        Slide(path)
