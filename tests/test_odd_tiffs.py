"""TIFF files with the marks and oddities of scanners have OpenSlide's pixels, whatever reads them.

Where the tiles of a file are not simply side by side, the own reader must leave it to OpenSlide.
"""

import numpy as np
import openslide
import pytest
import tifffile
from vendor_factory import (
    APERIO_RGB,
    APERIO_YCBCR,
    Directory,
    aperio,
    blobs,
    hamamatsu,
    leica,
    philips,
    set_tag,
    shrunk,
    trestle,
    ventana,
    write_tiff,
)

from hdmil_lib.errors import SlideError
from hdmil_lib.slides import Slide, TileSettings
from hdmil_lib.slides.listing import list_slides

W, H = 300, 420  # not a multiple of the tiles' side


def pyramid(width=W, height=H, sizes=((150, 210),), **options):
    """Directories of a picture and of its reductions to these sizes."""
    pixels = blobs(width, height)
    return [Directory(pixels, **options), *(Directory(shrunk(pixels, *s), **options) for s in sizes)]


def with_empty(directories, empty):
    """The directories, of which those with these indices lack these tiles."""
    for index, tiles in empty.items():
        directories[index].empty = tiles
    return directories


def other(width, height, **options):
    """A directory with another picture."""
    return Directory(blobs(width, height, seed=9), options=options)


KINDS_OF_JPEG = {
    "chroma_422": {"subsampling": "4:2:2"},
    "chroma_420": {"subsampling": "4:2:0"},
    "chroma_444": {"subsampling": "4:4:4"},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 1},
    "rotated_by_exif": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\3\0\0\0\0\0\0"},
    "profile": {"icc_profile": b"no profile"},
}
"""Ways in which JPEG tiles can be written."""

STORED = {
    "aperio.svs": lambda p: aperio(p, pyramid()),
    "aperio_rgb.svs": lambda p: aperio(p, pyramid(colors="rgb", photometric="rgb")),
    "aperio_jfif_called_rgb.svs": lambda p: aperio(p, pyramid(photometric="rgb")),
    "aperio_rgb_called_ycbcr.svs": lambda p: aperio(p, pyramid(colors="rgb")),
    "aperio_jpeg2000_rgb.svs": lambda p: aperio(p, pyramid(compression=APERIO_RGB)),
    "aperio_middle_level_missing.svs": lambda p: aperio(p, pyramid(sizes=((150, 210), (37, 52)))),
    "aperio_odd_downsamples.svs": lambda p: aperio(p, pyramid(sizes=((97, 131), (41, 59)))),
    "aperio_one_pixel_over_tiles.svs": lambda p: aperio(p, pyramid(257, 385, ((129, 193), (65, 97)))),
    "aperio_large_tiles.svs": lambda p: aperio(p, pyramid(tile=512)),
    "aperio_tiles_of_other_sizes.svs": lambda p: aperio(
        p, [Directory(blobs(W, H), tile=128), Directory(shrunk(blobs(W, H), 150, 210), tile=48)]
    ),
    "aperio_rotated.svs": lambda p: aperio(p, pyramid(options={"extratags": [(274, 3, 1, 3, True)]})),
    **{
        f"aperio_{name}.svs": lambda p, options=options: aperio(p, pyramid(jpeg=options))
        for name, options in KINDS_OF_JPEG.items()
    },
    "generic.tif": lambda p: write_tiff(p, pyramid()),
    "philips.tiff": lambda p: philips(p, pyramid(256, 384, ((128, 192),))),
}
"""Files that the own reader reads."""

LEFT = {
    "aperio_empty_tiles_at_level_0.svs": lambda p: aperio(p, with_empty(pyramid(), {0: {0, 7, 8, 20}})),
    "aperio_empty_tiles_at_level_1.svs": lambda p: aperio(p, with_empty(pyramid(), {1: {0, 4}})),
    "aperio_lower_half_empty.svs": lambda p: aperio(
        p, with_empty(pyramid(sizes=((150, 210), (75, 105))), {1: range(6, 12), 2: range(2, 4)})
    ),
    "aperio_jpeg2000_empty.svs": lambda p: aperio(p, with_empty(pyramid(compression=APERIO_RGB), {1: {1}})),
    "aperio_jpeg2000_ycbcr.svs": lambda p: aperio(p, pyramid(compression=APERIO_YCBCR)),
    "aperio_two_levels_of_one_size.svs": lambda p: aperio(p, [*pyramid(), other(150, 210)]),
    "generic_unmarked_image_first.tif": lambda p: write_tiff(
        p, [pyramid()[0], other(150, 210, subfiletype=0), pyramid()[1]]
    ),
    "generic_unmarked_image_of_full_size.tif": lambda p: write_tiff(
        p, [pyramid()[0], other(W, H, subfiletype=0), pyramid()[1]]
    ),
    "generic_two_finest_levels.tif": lambda p: write_tiff(p, [pyramid()[0], other(W, H), pyramid()[1]]),
    "philips_padded.tiff": lambda p: philips(p, pyramid(320, 448, ((192, 256),))),
    "philips_empty.tiff": lambda p: philips(
        p, with_empty(pyramid(256, 384, ((128, 192),)), {0: {0, 5}, 1: {0}})
    ),
    "leica_offset.scn": lambda p: leica(p, [pyramid()], [(100, 120)], (800, 1200)),
    "leica_offset_of_full_size.scn": lambda p: leica(p, [pyramid()], [(20, 30)], (W, H)),
    "leica_two_parts.scn": lambda p: leica(
        p, [pyramid(), [other(W, H), other(150, 210)]], [(20, 30), (400, 500)], (800, 1200)
    ),
    "ventana.bif": lambda p: ventana(p, pyramid(256, 320, ((128, 160),))),
    "ventana_overlap.bif": lambda p: ventana(p, pyramid(320, 384, ((160, 192),)), overlap=(6, 4)),
    "ventana_origin.bif": lambda p: ventana(p, pyramid(384, 448, ((192, 224),)), origin=1),
    "trestle.tif": lambda p: trestle(p, pyramid()),
    "trestle_overlap.tif": lambda p: trestle(p, pyramid(), overlaps=(8, 6, 4, 3)),
    "hamamatsu.ndpi": lambda p: hamamatsu(p, [blobs(320, 448), shrunk(blobs(320, 448), 160, 224)]),
}
"""Files that the own reader must leave to OpenSlide."""

JPEG_2000_ROUNDING = 2
"""Two decoders of a lossy transform may round differently; those of JPEG are the same."""


def tolerance(path):
    """Largest difference of the own reader's pixels from OpenSlide's."""
    return JPEG_2000_ROUNDING if "jpeg2000" in path.name else 0


INTERPOLATED = ("aperio_odd_downsamples.svs", "aperio_one_pixel_over_tiles.svs")
"""Files with levels whose pixels OpenSlide interpolates, since whole pixels of level 0 lie between theirs.
The difference is held to a tenth of that between neighboring pixels."""


@pytest.fixture(scope="module", params=[*STORED, *LEFT])
def path(request, tmp_path_factory):
    build = (STORED | LEFT)[request.param]
    return build(tmp_path_factory.mktemp("odd") / request.param)


def on_white(region):
    """Pixels of OpenSlide's RGBA region, on white."""
    pixels = np.array(region)
    return np.where(pixels[..., 3:] == 0, 255, pixels[..., :3]).astype(int)


def scale_of(path):
    """The scale of files that state none."""
    return 0.5 if path.name.startswith(("generic", "philips")) else None


def test_the_own_reader_takes_what_it_is_sure_of_alone(path):
    with Slide(path, scale_of(path)) as slide:
        assert (slide._stored is not None) == (path.name in STORED)
        assert slide.mpp == (0.5, 0.5)
    if path.name in LEFT:
        with pytest.raises(SlideError, match="reader='auto'"):
            Slide(path, reader="stored")


@pytest.mark.parametrize("seed", range(2))
def test_regions_of_stored_tiles_are_those_of_openslide(path, seed):
    """Each level is read by OpenSlide in one piece, so that no fractions of pixels arise."""
    if path.name in LEFT:
        return
    rng = np.random.default_rng(seed)
    with Slide(path, scale_of(path), reader="stored") as slide, openslide.OpenSlide(path) as reference:
        for level, size in enumerate(reference.level_dimensions):
            whole = on_white(reference.read_region((0, 0), level, size))
            for _ in range(40):
                left, top = (int(rng.integers(0, side)) for side in size)
                width, height = (int(rng.integers(1, 150)) for _ in size)
                region = slide._stored.read(level, left, top, width, height)
                inside = whole[top : top + height, left : left + width]
                part = region[: inside.shape[0], : inside.shape[1]]
                assert np.abs(part - inside).max() <= tolerance(path)
                assert (region[inside.shape[0] :] == 255).all()
                assert (region[:, inside.shape[1] :] == 255).all()


@pytest.mark.parametrize("mpp", [0.5, 1.0, 1.6])
def test_tiles_and_thumbnails_do_not_depend_on_the_reader(path, mpp):
    scale = scale_of(path)
    with Slide(path, scale) as slide, Slide(path, scale, reader="openslide") as reference:
        assert slide.bounds == reference.bounds
        assert slide.levels == reference.levels
        grids = [TileSettings(32, mpp).grid(s) for s in (slide, reference)]
        assert len(grids[0]) >= 6
        np.testing.assert_array_equal(grids[0].coords, grids[1].coords)
        rows = range(len(grids[0]))
        mine, expected = (
            np.stack([grids[0].read_tile(s, r) for r in rows]).astype(int) for s in (slide, reference)
        )
        thumbnails = [s.thumbnail(4.0).astype(int) for s in (slide, reference)]
    if path.name in INTERPOLATED and mpp > 0.5:
        pixel = np.abs(np.diff(expected, axis=2)).mean()
        assert np.abs(mine - expected).mean() < 0.1 * pixel
    else:
        assert np.abs(mine - expected).max() <= tolerance(path)
    assert np.abs(thumbnails[0] - thumbnails[1]).max() <= tolerance(path)


def test_a_tile_without_a_place_is_an_error_for_both_readers(tmp_path):
    path = aperio(tmp_path / "a.svs", pyramid())
    with tifffile.TiffFile(path) as file:
        offsets = file.pages[1].tags["TileOffsets"].value
    set_tag(path, 1, "TileOffsets", (0, *offsets[1:]))
    for reader in ("auto", "openslide"):
        with Slide(path, reader=reader) as slide:
            with pytest.raises(SlideError, match=r"a\.svs: cannot read level 1"):
                slide.read_field(0, 0, (20, 20), 1.0)
            assert slide.read_field(200, 200, (20, 20), 1.0).std() > 0


def test_levels_in_sub_directories_are_read_as_openslide_reads_them(tmp_path):
    levels = [page.pixels for page in pyramid()]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "jpeg", "metadata": None}
        file.write(levels[0], subifds=1, **options)
        file.write(levels[1], subfiletype=1, **options)
    with Slide(tmp_path / "a.tif", 0.5) as slide, openslide.OpenSlide(tmp_path / "a.tif") as reference:
        assert slide._file.sizes == reference.level_dimensions
        field = slide.read_field(0, 0, (W, H), 0.5)
        np.testing.assert_array_equal(field, on_white(reference.read_region((0, 0), 0, (W, H))))


@pytest.mark.parametrize("layout", [{"tile": (64, 64)}, {"rowsperstrip": 30}])
@pytest.mark.parametrize("ome", [False, True])
def test_directories_in_a_circle_end_nothing(tmp_path, layout, ome):
    """The last directory says that the first one comes next."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, blobs(W, H), photometric="rgb", ome=ome, compression="lzw", **layout)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        first = file.pages[0].offset
    n_tags = int.from_bytes(data[first : first + 2], "little")
    after = first + 2 + 12 * n_tags
    data[after : after + 4] = first.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(SlideError, match=r"a\.tif: "):
        Slide(path, 0.5)
    assert [found.path for found in list_slides(tmp_path)] == [path]


def places_of(path):
    """Positions of the bytes of the directories of a file and of the places and lengths of its tiles."""
    places = []
    with tifffile.TiffFile(path) as file:
        for page in file.pages:
            places += range(page.offset, page.offset + 2 + 12 * len(page.tags) + 4)
            for name in ("TileOffsets", "TileByteCounts"):
                tag = page.tags[name]
                places += range(tag.valueoffset, tag.valueoffset + tag.valuebytecount)
    return places


def level_or_error(read):
    """Pixels, or None if they cannot be read."""
    try:
        return read()
    except (SlideError, openslide.OpenSlideError):
        return None


@pytest.mark.parametrize("name", ["aperio.svs", "generic.tif", "philips.tiff", "aperio_jpeg2000_rgb.svs"])
def test_whatever_is_changed_in_a_directory_the_pixels_are_those_of_openslide(tmp_path, name):
    path = STORED[name](tmp_path / name)
    whole, places, rng = path.read_bytes(), places_of(path), np.random.default_rng(0)
    n_compared = 0
    for _ in range(120):
        data = bytearray(whole)
        for place in rng.choice(places, rng.integers(1, 3)):
            data[place] = rng.choice([rng.integers(256), data[place] ^ (1 << rng.integers(8)), 0, 1, 64])
        path.write_bytes(data)
        slide = level_or_error(lambda: Slide(path, 0.5))
        if slide is None:
            continue
        with slide:
            for level, size in enumerate(slide._file.sizes if slide._stored else ()):
                mine = level_or_error(lambda: slide._stored.read(level, 0, 0, *size))  # noqa: B023
                expected = level_or_error(lambda: read_alone(path, level, size))  # noqa: B023
                if mine is not None and expected is not None:
                    assert np.abs(mine - expected).max() <= tolerance(path)
                    n_compared += 1
                assert mine is not None or expected is None, "OpenSlide reads what we do not"
    assert n_compared > 20


def read_alone(path, level, size):
    """A level as OpenSlide reads it."""
    with openslide.OpenSlide(path) as reference:
        return on_white(reference.read_region((0, 0), level, size))
