"""OME-TIFF, plain TIFF, PNG and JPEG files of well-kept writers are slides like others, pixel by pixel."""

import struct
import tracemalloc
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image
from slide_factory import find_ink, paint_disc

from hdmil_lib.errors import SlideError
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.slides.scale import IfUnknown

H, W = 301, 403
UM = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def write_ome(path, pixels, metadata=UM, n_levels=3, tile=64, **options):
    """A pyramid as tifffile writes it: the finest level in a directory, the others in its SubIFDs."""
    options = {"photometric": "rgb", "tile": (tile, tile)} | options
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(pixels, subifds=n_levels - 1, metadata={"axes": "YXS"} | metadata, **options)
        for level in range(1, n_levels):
            file.write(halved(pixels, level), subfiletype=1, metadata=None, **options)
    return path


def halved(pixels, level):
    """Means of blocks of pixels, as many as fit."""
    side = 2**level
    h, w = pixels.shape[0] // side, pixels.shape[1] // side
    blocks = pixels[: h * side, : w * side].reshape(h, side, w, side, 3)
    return np.rint(blocks.mean((1, 3))).astype(np.uint8)


def read_all(path, mpp=0.5):
    """All pixels of the finest level."""
    with Slide(path, mpp) as slide:
        return slide.read_field(0, 0, slide.dimensions, slide.mpp[0])


# OME-TIFF


@pytest.mark.parametrize("compression", [None, "deflate", "lzw", "zstd", "webp", "jpeg2000", "jpegxl"])
def test_an_ome_tiff_keeps_its_pyramid_pixels_and_scale(tmp_path, noise, compression):
    lossless = {"compressionargs": {"lossless": True, "level": 1}} if compression == "webp" else {}
    if compression == "jpeg2000":
        lossless = {"compressionargs": {"level": 0}}
    if compression == "jpegxl":
        lossless = {"compressionargs": {"lossless": True}}
    path = write_ome(tmp_path / "a.ome.tif", noise, compression=compression, **lossless)
    with Slide(path) as slide:
        assert (slide.vendor, slide.dimensions, slide.mpp) == ("ome-tiff", (W, H), (0.25, 0.25))
        assert slide.scale.source == "OME physical size"
        assert [level.downsample_x for level in slide.levels] == [1, 2, 4]
        np.testing.assert_array_equal(slide.read_field(0, 0, (W, H), 0.25), noise)
        np.testing.assert_array_equal(slide.read_field(40, 20, (64, 64), 0.5), halved(noise, 1)[10:74, 20:84])
        outside = slide.read_field(-8, H - 8, (16, 16), 0.25)
        np.testing.assert_array_equal(outside[:8, 8:], noise[-8:, :8])
        assert (outside[8:] == 255).all()
        assert (outside[:, :8] == 255).all()


def test_jpeg_tiles_of_an_ome_tiff_go_through_the_stored_reader(tmp_path):
    pixels = paint_disc((W, H), (0.25, 0.25), (50, 40), 25)
    path = write_ome(tmp_path / "a.ome.tif", pixels, compression="jpeg", compressionargs={"level": 95})
    with Slide(path, reader="stored") as slide:
        assert slide._stored.levels[1].is_jpeg
        assert np.abs(read_all(path, None).astype(int) - pixels).mean() < 1
        np.testing.assert_allclose(find_ink(slide.thumbnail(1.0), 1.0), (50, 40), atol=0.2)


def test_libvips_writes_the_same_kind_of_file(tmp_path, noise):
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0">'
        f'<Pixels DimensionOrder="XYCZT" ID="Pixels:0" SizeC="3" SizeT="1" SizeX="{W}" SizeY="{H}" SizeZ="1" '
        'Type="uint8" PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="0.0005" '
        'PhysicalSizeYUnit="mm"><Channel ID="Channel:0:0" SamplesPerPixel="3"/></Pixels></Image></OME>'
    )
    image = pyvips.Image.new_from_array(noise).copy(interpretation="srgb")
    image = image.copy()
    image.set_type(pyvips.GValue.gstr_type, "image-description", xml)
    path = tmp_path / "a.tif"
    image.tiffsave(
        str(path), tile=True, pyramid=True, subifd=True, compression="deflate", tile_width=64, tile_height=64
    )
    with Slide(path) as slide:
        assert slide.vendor == "ome-tiff"
        assert slide.mpp == pytest.approx((0.5, 0.5))
        assert len(slide.levels) > 2
        np.testing.assert_array_equal(slide.read_field(0, 0, (W, H), 0.5), noise)


def test_the_largest_of_several_images_is_the_slide(tmp_path, noise):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        options = {"photometric": "rgb", "tile": (64, 64)}
        file.write(noise[:50, :60], metadata={"axes": "YXS", "Name": "label"}, **options)
        file.write(noise, metadata={"axes": "YXS"} | UM, **options)
    np.testing.assert_array_equal(read_all(path, None), noise)


@pytest.mark.parametrize(
    ("shape", "axes", "why"),
    [((3, 80, 80), "CYX", "3 channels in planes"), ((2, 80, 80, 3), "ZYXS", "2 planes in depth")],
)
def test_what_is_not_one_color_picture_is_refused(tmp_path, shape, axes, why):
    path = tmp_path / "a.ome.tif"
    photometric = "rgb" if axes.endswith("S") else "minisblack"
    tifffile.imwrite(
        path, np.zeros(shape, np.uint8), ome=True, photometric=photometric, metadata={"axes": axes}
    )
    with pytest.raises(SlideError, match=rf"a\.ome\.tif: .*{why}.*export") as caught:
        Slide(path, 0.5)
    assert "\n" not in str(caught.value)


def test_tissue_and_tiles_are_found_as_in_other_slides(tmp_path):
    pixels = paint_disc((1600, 1200), (0.25, 0.25), (200, 150), 120)
    paths = [write_ome(tmp_path / "a.ome.tif", pixels, tile=256), tmp_path / "a.tif", tmp_path / "a.png"]
    tifffile.imwrite(paths[1], pixels, photometric="rgb", rowsperstrip=7, compression="lzw")
    Image.fromarray(pixels).save(paths[2])
    grids = []
    for path in paths:
        with Slide(path, 0.25) as slide:
            grids.append(TileGrid.from_slide(slide))
            assert grids[-1].read_tile(slide, 0).shape == (256, 256, 3)
    assert len(grids[0]) >= 3
    for grid in grids[1:]:
        np.testing.assert_array_equal(grid.coords, grids[0].coords)


# Plain TIFF


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("compression", [None, "deflate", "lzw", "packbits", "zstd", "webp"])
@pytest.mark.parametrize("rows", [1, 37, H])
def test_strips_are_read(tmp_path, noise, compression, rows, big):
    lossless = {"compressionargs": {"lossless": True, "level": 1}} if compression == "webp" else {}
    options = {"compression": compression, "rowsperstrip": rows, "resolution": (20_000, 20_000)}
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, noise, photometric="rgb", bigtiff=big, resolutionunit="centimeter", **options, **lossless
    )
    with Slide(path) as slide:
        assert (slide.vendor, slide.scale.source) == ("tiff", "TIFF resolution")
        assert slide.mpp == pytest.approx((0.5, 0.5))
    np.testing.assert_array_equal(read_all(path), noise)


@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize("compression", ["none", "jpeg", "deflate", "lzw", "webp", "packbits"])
def test_libvips_pyramids_are_read(tmp_path, compression, tile):
    pixels = paint_disc((W, H), (0.5, 0.5), (100, 80), 50)
    path = tmp_path / "a.tif"
    image = pyvips.Image.new_from_array(pixels).copy(xres=2000, yres=2000, interpretation="srgb")
    options = {"tile": tile, "pyramid": tile, "compression": compression, "Q": 95}
    image.tiffsave(str(path), **options, **({"lossless": True} if compression == "webp" else {}))
    with Slide(path) as slide:
        assert slide.mpp == pytest.approx((0.5, 0.5))
        np.testing.assert_allclose(find_ink(slide.thumbnail(2.0), 2.0), (100, 80), atol=0.3)
    limit = 3 if compression == "jpeg" else 0
    assert np.abs(read_all(path).astype(int) - pixels).mean() <= limit


COLORS = {
    "gray": (
        lambda rgb: (rgb[..., 0], {"photometric": "minisblack"}),
        lambda rgb: rgb[..., :1].repeat(3, -1),
    ),
    "inverted": (
        lambda rgb: (rgb[..., 0], {"photometric": "miniswhite"}),
        lambda rgb: 255 - rgb[..., :1].repeat(3, -1),
    ),
    "16 bits": (lambda rgb: (rgb.astype(np.uint16) * 257, {"photometric": "rgb"}), lambda rgb: rgb),
    "planes": (
        lambda rgb: (rgb.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
        lambda rgb: rgb,
    ),
    "opaque": (
        lambda rgb: (
            np.dstack([rgb, np.full_like(rgb[..., 0], 255)]),
            {"photometric": "rgb", "extrasamples": ["unassalpha"]},
        ),
        lambda rgb: rgb,
    ),
    "transparent": (
        lambda rgb: (
            np.dstack([rgb, np.zeros_like(rgb[..., 0])]),
            {"photometric": "rgb", "extrasamples": ["unassalpha"]},
        ),
        lambda rgb: np.full_like(rgb, 255),
    ),
    "palette": (
        lambda rgb: (
            rgb[..., 0],
            {
                "photometric": "palette",
                "colormap": np.stack([np.arange(256) * 257] * 3)[:, ::-1].astype(np.uint16),
            },
        ),
        lambda rgb: 255 - rgb[..., :1].repeat(3, -1),
    ),
    "CMYK": (
        lambda rgb: (np.dstack([255 - rgb, np.zeros_like(rgb[..., 0])]), {"photometric": "separated"}),
        lambda rgb: rgb,
    ),
}


@pytest.mark.parametrize("layout", [{"rowsperstrip": 50}, {"rowsperstrip": 50, "compression": "lzw"}, "ome"])
@pytest.mark.parametrize("colors", COLORS)
def test_colors_of_one_meaning_are_converted(tmp_path, noise, colors, layout):
    store, expected = COLORS[colors]
    samples, options = store(noise)
    path = tmp_path / "a.ome.tif"
    if layout == "ome":
        axes = "SYX" if colors == "planes" else "YXS"[: samples.ndim]
        tifffile.imwrite(path, samples, ome=True, tile=(64, 64), metadata={"axes": axes}, **options)
    else:
        tifffile.imwrite(path, samples, ome=False, **layout, **options)
    np.testing.assert_array_equal(read_all(path), expected(noise))


@pytest.mark.parametrize(
    ("pixels", "options", "why"),
    [
        (np.zeros((80, 80, 3), np.float32), {"photometric": "rgb"}, "32-bit ieeefp"),
        (np.zeros((80, 80), np.int16), {}, "16-bit int"),
        (np.zeros((80, 80, 3), np.uint8), {"photometric": "cielab"}, "cielab"),
        (np.zeros((80, 80, 5), np.uint8), {"photometric": "rgb"}, "5 samples per pixel"),
        (np.zeros((4, 80, 80), np.uint8), {"photometric": "minisblack"}, "a stack of 4 images"),
    ],
)
def test_colors_of_several_meanings_are_refused_in_a_line(tmp_path, pixels, options, why):
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(SlideError, match=rf"a\.tif: .*{why}") as caught:
        Slide(tmp_path / "a.tif", 0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "why"),
    [
        (np.zeros((80, 80, 3), np.float32), "32-bit ieeefp"),
        (np.zeros((80, 80, 5), np.uint8), "5 samples per"),
    ],
)
def test_tiles_that_openslide_would_misread_are_refused_too(tmp_path, pixels, why):
    options = {"tile": (16, 16), "resolution": (20_000, 20_000), "resolutionunit": 3}
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **options)
    with pytest.raises(SlideError, match=rf"a\.tif: .*{why}"):
        Slide(tmp_path / "a.tif")


# PNG and JPEG


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16"])
def test_png_files_are_slides(tmp_path, noise, mode):
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
        expected = noise[..., :1].repeat(3, -1)
    else:
        image = image.convert(mode)
        expected = np.asarray(image.convert("RGB"))
    image.save(tmp_path / "a.png", dpi=(50_800, 50_800))
    with Slide(tmp_path / "a.png") as slide:
        assert (slide.vendor, slide.scale.source) == ("png", "PNG resolution")
        assert slide.mpp == pytest.approx((0.5, 0.5), rel=1e-4)
    np.testing.assert_array_equal(read_all(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_files_are_slides(tmp_path, mode):
    pixels = paint_disc((W, H), (0.5, 0.5), (100, 80), 50)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "a.jpg", quality=95, dpi=(50_800, 50_800))
    with Image.open(tmp_path / "a.jpg") as stored:
        expected = np.asarray(stored.convert("RGB")).astype(int)
    assert np.abs(read_all(tmp_path / "a.jpg") - expected).max() <= (1 if mode == "CMYK" else 0)
    with Slide(tmp_path / "a.jpg") as slide:
        assert slide.mpp == pytest.approx((0.5, 0.5))


def test_transparent_pixels_are_white(tmp_path, noise):
    Image.fromarray(np.dstack([noise, np.zeros_like(noise[..., 0])])).save(tmp_path / "a.png")
    assert (read_all(tmp_path / "a.png") == 255).all()


def test_no_scale_lists_what_was_found_and_the_caller_fills_in(tmp_path, noise):
    Image.fromarray(noise).save(tmp_path / "a.png", dpi=(72, 72))
    with pytest.raises(SlideError, match=r"found: PNG resolution says 352\.7 um/px, which is not credible"):
        Slide(tmp_path / "a.png")
    with Slide(tmp_path / "a.png", IfUnknown(0.5)) as slide:
        assert slide.scale.source == "given, unknown"
    write_ome(tmp_path / "b.ome.tif", noise, {"PhysicalSizeX": 3.0, "PhysicalSizeXUnit": "pixel"} | {})
    with pytest.raises(SlideError, match="found: nothing"):
        Slide(tmp_path / "b.ome.tif")


# Sizes and damage


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(2**31 - 1, 1), (2**16, 2**15), (20_000, 20_000)])
def test_a_header_of_too_many_pixels_is_refused_before_memory_is_taken(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png_header(*size))
    tracemalloc.start()
    with pytest.raises(SlideError, match=r"a\.png: .*pixels in one piece, more than"):
        Slide(tmp_path / "a.png", 0.5)
    assert tracemalloc.get_traced_memory()[1] < 5e7
    tracemalloc.stop()


def test_a_tiff_in_strips_of_too_many_pixels_is_refused(tmp_path, noise):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise, photometric="rgb", compression="lzw", rowsperstrip=H)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for name, value in (("ImageWidth", 2**16), ("ImageLength", 2**15), ("RowsPerStrip", 2**15)):
            tag = file.pages[0].tags[name]
            data[tag.valueoffset : tag.valueoffset + 4] = struct.pack("<I", value)
    path.write_bytes(data)
    with pytest.raises(SlideError, match=r"a\.tif: .*pixels in one piece, more than"):
        Slide(path, 0.5)


def test_a_full_disk_is_said(tmp_path, noise, monkeypatch):
    Image.fromarray(noise).save(tmp_path / "a.png")
    monkeypatch.setattr("tempfile.TemporaryFile", partial(Path("/dev/full").open, "r+b", buffering=0))
    with pytest.raises(SlideError, match="No space left on device.*set TMPDIR"):
        Slide(tmp_path / "a.png", 0.5)


def test_the_temporary_file_is_gone_after_closing(tmp_path, noise, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    Image.fromarray(noise).save(tmp_path / "a.png")
    with Slide(tmp_path / "a.png", 0.5):
        assert list((tmp_path / "temporary").iterdir()) == []


def writers(tmp_path):
    """A file of each kind, small enough to be damaged at many places."""
    pixels = paint_disc((150, 120), (0.5, 0.5), (37, 30), 20)
    write_ome(tmp_path / "ome.tif", pixels, n_levels=2, compression="deflate")
    write_ome(tmp_path / "ome_jpeg.tif", pixels, n_levels=2, compression="jpeg")
    tifffile.imwrite(tmp_path / "lzw.tif", pixels, photometric="rgb", rowsperstrip=16, compression="lzw")
    tifffile.imwrite(tmp_path / "raw.tif", pixels, photometric="rgb", bigtiff=True)
    tifffile.imwrite(tmp_path / "webp.tif", pixels, photometric="rgb", tile=(64, 64), compression="webp")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    return sorted(path for path in tmp_path.iterdir() if path.is_file())


def try_to_read(path):
    try:
        with Slide(path, None if path.name.startswith("ome") else 0.5) as slide:
            slide.thumbnail(8.0)
            slide.read_field(3, 5, (40, 40), 0.7)
    except SlideError:
        return False
    return True


def test_damaged_copies_end_in_our_error_or_are_read(tmp_path):
    rng, refused = np.random.default_rng(0), 0
    (tmp_path / "bad").mkdir()
    for path in writers(tmp_path):
        whole, bad = path.read_bytes(), tmp_path / "bad" / path.name
        assert try_to_read(path)
        for share in (0.0, 0.01, 0.2, 0.5, 0.9):
            bad.write_bytes(whole[: int(share * len(whole))])
            assert not try_to_read(bad), (path.name, share)
        for _ in range(60):
            damaged = bytearray(whole)
            near = len(whole) if rng.random() < 0.5 else min(len(whole), 600)
            for place in rng.integers(0, near, rng.integers(1, 4)):
                damaged[place] = rng.integers(256)
            bad.write_bytes(damaged)
            refused += not try_to_read(bad)
    assert refused > 50
