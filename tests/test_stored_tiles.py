"""Stored tiles have the pixels of OpenSlide, each is decoded once, and a damaged one affects no other."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_factory import write_slide

from hdmil_lib.errors import SlideError
from hdmil_lib.slides import Slide, stored_tiles
from hdmil_lib.slides.stored_tiles import StoredTiles

SIZE = (300, 420)  # not a multiple of the tile size


@pytest.fixture(scope="module")
def pixels():
    """Blobs of color, rough enough to reveal a wrong position."""
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 10, SIZE[0] // 10, 3), np.uint8)
    return cv2.resize(noise, SIZE, interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def path(tmp_path_factory, pixels):
    return write_slide(tmp_path_factory.mktemp("s") / "a.tif", pixels, compression="jpeg")


def openslide_pixels(path, level, left, top, width, height):
    """Pixels that OpenSlide reads, on white, from a position in whole level-0 pixels."""
    with openslide.OpenSlide(path) as slide:
        scale = round(slide.level_downsamples[level])
        region = np.array(slide.read_region((left * scale, top * scale), level, (width, height)))
    return np.where(region[..., 3:] == 0, 255, region[..., :3])


@settings(max_examples=200, deadline=None)
@given(
    level=st.integers(0, 2),
    left=st.integers(0, 320),
    top=st.integers(0, 440),
    width=st.integers(1, 200),
    height=st.integers(1, 200),
)
def test_every_rectangle_has_the_pixels_of_openslide(path, level, left, top, width, height):
    with openslide.OpenSlide(path) as slide:
        tiles = StoredTiles.open(path, slide.level_dimensions)
    box = (level, left, top, width, height)
    assert (tiles.read(*box) == openslide_pixels(path, *box)).all()
    tiles.close()


def test_left_of_and_above_the_slide_it_is_white(path):
    with Slide(path, reader="stored") as slide:
        inside = slide._stored.read(0, 0, 0, 50, 60)
        around = slide._stored.read(0, -10, -20, 60, 80)
    assert (around[20:, 10:] == inside).all()
    assert (around[:20] == 255).all()
    assert (around[:, :10] == 255).all()


@pytest.mark.parametrize("mpp", [0.5, 0.61, 1.0, 1.7])
def test_fields_and_thumbnails_do_not_depend_on_the_reader(path, mpp):
    with Slide(path) as stored, Slide(path, reader="openslide") as reference:
        assert stored._stored is not None
        assert reference._stored is None
        fields = [s.read_field(33.5, 71.25, (96, 80), mpp).astype(int) for s in (stored, reference)]
        # On levels of odd size OpenSlide starts up to a pixel earlier, and the filter rounds differently.
        assert np.abs(fields[0] - fields[1]).max() <= (0 if mpp < 1 else 3)
        assert np.abs(np.subtract(*[s.thumbnail(mpp).astype(int) for s in (stored, reference)])).max() <= 3


def aperio(path, pixels):
    """Write an Aperio slide with JPEG 2000 tiles in RGB."""
    tifffile.imwrite(
        path,
        pixels,
        tile=(128, 128),
        photometric="rgb",
        compression="APERIO_JP2000_RGB",
        compressionargs={"level": 40},
        description="Aperio Image Library v1\r\n300x420|AppMag = 20|MPP = 0.5",
        metadata=None,
    )
    return path


def test_jpeg_2000_of_aperio(tmp_path, pixels):
    path = aperio(tmp_path / "a.svs", pixels)
    with Slide(path, reader="stored") as slide:
        assert slide.vendor == "aperio"
        assert slide.mpp == (0.5, 0.5)
        mine = slide.read_field(37, 91, (200, 220), 0.5)
    # Two decoders of a lossy transform may round differently.
    difference = np.abs(mine.astype(int) - openslide_pixels(path, 0, 37, 91, 200, 220))
    assert difference.max() <= 2


@pytest.mark.parametrize("compression", ["packbits", "deflate"])
def test_other_files_are_left_to_openslide(tmp_path, pixels, compression):
    path = write_slide(tmp_path / "a.tif", pixels, compression=compression)
    with Slide(path) as slide:
        assert slide._stored is None
        assert (slide.read_field(0, 0, (100, 100), 0.5) == pixels[:100, :100]).all()
    with pytest.raises(SlideError, match=r"a\.tif: stores no JPEG tiles.*reader='auto'"):
        Slide(path, reader="stored")


def test_a_tile_is_decoded_once_while_its_neighbors_are_read(path, monkeypatch):
    asked = []
    decode = StoredTiles._decode
    monkeypatch.setattr(StoredTiles, "_decode", lambda self, *at: asked.append(at[:2]) or decode(self, *at))
    with Slide(path) as slide:
        for y in range(0, 420, 60):
            for x in range(0, 300, 60):
                slide.read_field(x + 0.5, y + 0.5, (60, 60), 0.5)
    assert len(asked) == len(set(asked)) == 5 * 7


def test_memory_is_bounded(path, monkeypatch):
    monkeypatch.setattr(stored_tiles, "ROWS_HELD", 1)
    monkeypatch.setattr(stored_tiles, "MOST_THREADS", 0)
    with Slide(path) as slide:
        whole = slide.read_field(0, 0, SIZE, 0.5)
        assert len(slide._stored._decoded[0]) == 5 + 1  # of 35
    assert (whole == openslide_pixels(path, 0, 0, 0, *SIZE)).all()


def test_threads_read_the_same_pixels(path, monkeypatch):
    """Few tiles are kept, so that threads drop and refill tiles that others have just decoded."""
    monkeypatch.setattr(stored_tiles, "ROWS_HELD", 1)
    monkeypatch.setattr(stored_tiles, "MOST_THREADS", 2)
    boxes = [(0, x, y, 90, 70) for x in range(0, 300, 41) for y in range(0, 420, 37)]
    with Slide(path) as slide, ThreadPoolExecutor(8) as pool:
        for box, region in zip(boxes, pool.map(lambda b: slide._stored.read(*b), boxes), strict=True):
            assert (region == openslide_pixels(path, *box)).all()


def test_a_field_is_written_to_the_given_array(path):
    box = (0, 280, 400, 90, 70)  # partly beyond the slide
    with Slide(path) as slide:
        for mpp in (0.5, 0.61):
            memory = np.full((70, 90, 3), 7, np.uint8)
            field = slide.read_field(280, 400, (90, 70), mpp, memory)
            assert field is memory
            assert (field == slide.read_field(280, 400, (90, 70), mpp)).all()
        assert (slide._stored.read(*box, np.full((70, 90, 3), 7, np.uint8)) == slide._stored.read(*box)).all()


@pytest.mark.parametrize("how", ["garbage", "cut off"])
def test_a_damaged_tile_is_named_and_affects_no_other(tmp_path, path, how):
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, size = page.dataoffsets[6], page.databytecounts[6]  # second row, second column of 64
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = (
        b"\0" * size if how == "garbage" else data[offset : offset + 30].ljust(size, b"\0")
    )
    bad = tmp_path / "bad.tif"
    bad.write_bytes(data)
    with Slide(bad) as slide:
        with pytest.raises(SlideError, match=r"bad\.tif: cannot read level 0 at its pixel \(64, 64\)"):
            slide.read_field(100, 100, (10, 10), 0.5)
        fine = slide.read_field(130, 130, (90, 90), 0.5)
    assert (fine == openslide_pixels(path, 0, 130, 130, 90, 90)).all()


def overwritten(path, tag, change):
    """The file with a tag of its first page changed."""
    with tifffile.TiffFile(path, mode="r+") as file:
        values = file.pages[0].tags[tag].value
        file.pages[0].tags[tag].overwrite(change(values))
    return path


def test_a_file_that_lacks_a_tile_is_left_to_openslide(tmp_path, pixels):
    """Scanners mean different things by it: nothing, or the pixels of a finer level."""
    path = overwritten(aperio(tmp_path / "a.svs", pixels), "TileByteCounts", lambda v: (0, *v[1:]))
    with Slide(path) as slide:
        assert slide._stored is None
        field = slide.read_field(0, 0, (256, 128), 0.5)
    assert (field == openslide_pixels(path, 0, 0, 0, 256, 128)).all()


@pytest.mark.parametrize(
    ("tag", "change"),
    [
        ("TileWidth", lambda v: 65_520),
        ("TileByteCounts", lambda v: v[:-1]),
        ("TileOffsets", lambda v: v[:1]),
    ],
)
def test_a_file_with_an_odd_directory_is_not_read_here(tmp_path, pixels, tag, change):
    path = aperio(tmp_path / "a.svs", pixels)
    sizes = [page_size(path)]
    assert StoredTiles.open(path, sizes) is not None
    assert StoredTiles.open(overwritten(path, tag, change), sizes) is None


def page_size(path):
    with tifffile.TiffFile(path) as file:
        return file.pages[0].imagewidth, file.pages[0].imagelength


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_of_a_directory_raise_nothing_foreign(tmp_path, pixels, seed):
    path = aperio(tmp_path / "a.svs", pixels)
    size, content = page_size(path), bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].offset
    rng = np.random.default_rng(seed)
    for _ in range(40):
        damaged = bytearray(content)
        damaged[start + rng.integers(0, 250)] ^= 1 << rng.integers(0, 8)
        path.write_bytes(damaged)
        if (stored := StoredTiles.open(path, [size])) is not None:
            with suppress(SlideError):
                stored.read(0, 0, 0, 64, 64)
            stored.close()


def test_the_real_slide(real_data):
    path = real_data / "cmu_small_region.svs"
    with Slide(path) as slide:
        assert slide._stored is not None
        for x, y in ((0, 0), (501, 733), (2000, 2800)):
            assert (slide._stored.read(0, x, y, 300, 200) == openslide_pixels(path, 0, x, y, 300, 200)).all()
