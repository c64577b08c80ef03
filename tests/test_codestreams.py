"""A stored tile whose own header states another size is refused before memory is taken for it."""

import resource
import struct
from contextlib import contextmanager, suppress
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from dicom_factory import write_series
from hypothesis import given
from hypothesis import strategies as st
from test_gpu_decoding import StandIn
from vendor_factory import APERIO_RGB, APERIO_YCBCR, JPEG, Directory, aperio, blobs, set_tag, write_tiff

from hdmil_lib.errors import SlideError
from hdmil_lib.slides import Slide
from hdmil_lib.slides.codestreams import (
    JPEG_END,
    MOST_PARTS,
    Header,
    checked,
    checked_jpeg,
    jpeg2000_header,
    jpeg_fits,
    jpeg_header,
)
from hdmil_lib.slides.gpu_decoding import NvImageCodec

W, H, SIDE = 200, 150, 64
SIZ, FRAME = b"\xff\x4f\xff\x51", b"\xff\xc0"
"""Bytes before the sizes that are overwritten."""


@contextmanager
def little_memory(mib=300):
    """Let this process take at most so much more memory: a picture of 65,535 x 65,535 pixels takes 12 GiB."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + mib * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def with_size(stream, width, height):
    """A stream whose header states another size."""
    data = bytearray(stream)
    if SIZ in data:
        at = data.find(SIZ) + 8
        struct.pack_into(">II", data, at, width, height)
        struct.pack_into(">II", data, at + 16, width, height)
    else:
        struct.pack_into(">HH", data, data.find(FRAME) + 5, height, width)
    return bytes(data)


def change_streams(path, index, width, height):
    """State another size in a stored tile of a file, one after the other from the start of the file."""
    data = path.read_bytes()
    mark = SIZ if data.count(SIZ) > 2 else FRAME
    at = -1
    for _ in range(index + 1):
        at = data.find(mark, at + 1)
    path.write_bytes(data[:at] + with_size(data[at:], width, height))


def ome(path, compression):
    """An OME-TIFF of tiles that `tiff_image` decodes."""
    options = {"tile": (SIDE, SIDE), "photometric": "rgb", "compression": compression}
    tifffile.imwrite(path, blobs(W, H), ome=True, metadata={"axes": "YXS"}, **options)
    return path


def strips(path, compression):
    """A TIFF in strips."""
    options = {"photometric": "rgb", "compression": compression, "rowsperstrip": 32}
    tifffile.imwrite(path, blobs(W, H), metadata=None, **options)
    return path


FILES = {
    "jpeg.svs": lambda p: aperio(p, [Directory(blobs(W, H))]),
    "jpeg2000.svs": lambda p: aperio(p, [Directory(blobs(W, H), compression=APERIO_RGB)]),
    "left_to_openslide.svs": lambda p: aperio(p, [Directory(blobs(W, H), compression=APERIO_YCBCR)]),
    "jpeg.tif": lambda p: write_tiff(p, [Directory(blobs(W, H), compression=JPEG)]),
    "jpeg.ome.tif": lambda p: ome(p, "jpeg"),
    "jpeg2000.ome.tif": lambda p: ome(p, "jpeg2000"),
    "jpeg_strips.tif": lambda p: strips(p, "jpeg"),
    "jpeg2000_strips.tif": lambda p: strips(p, "jpeg2000"),
    "dicom": lambda p: write_series(p, blobs(W, H), n_levels=1, jpeg=True)[0],
}


@pytest.mark.parametrize("size", [(65_535, 65_535), (32, 64), (64, 80)])
@pytest.mark.parametrize("kind", FILES)
def test_a_tile_of_another_size_is_one_line(tmp_path, kind, size):
    path = FILES[kind](tmp_path / kind)
    change_streams(path, 1, *size)
    with little_memory(), pytest.raises(SlideError) as caught, Slide(path, 0.5) as slide:
        slide.read_field(0, 0, (W, H), 0.5)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    if kind != "left_to_openslide.svs":
        assert f"its header says {size[0]} x {size[1]} pixels, the file" in message


@pytest.mark.parametrize("kind", ["jpeg.svs", "jpeg2000.svs", "dicom"])
def test_other_tiles_are_read(tmp_path, kind):
    path = FILES[kind](tmp_path / kind)
    with Slide(path, 0.5) as slide:
        expected = slide.read_field(130, 70, (30, 30), 0.5)
    change_streams(path, 1, 65_535, 65_535)
    with Slide(path, 0.5) as slide:
        np.testing.assert_array_equal(slide.read_field(130, 70, (30, 30), 0.5), expected)


def test_a_gpu_is_not_asked_for_a_tile_of_another_size(tmp_path):
    path = FILES["jpeg.svs"](tmp_path / "a.svs")
    change_streams(path, 1, 65_535, 65_535)

    class Spy(StandIn):
        def image(self, stream):
            assert jpeg_header(stream) == (SIDE, SIDE, 3)
            return super().image(stream)

    decoder = NvImageCodec(Spy(), torch.device("cpu"))
    with Slide(path, 0.5) as slide:
        assert slide.can_decode(0.5, decoder)
        _, errors = slide.read_fields(np.array([[0, 0], [130, 70]]), (70, 70), 0.5, decoder)
    assert list(errors) == [0]
    assert "its header says 65535 x 65535 pixels" in str(errors[0])


def encoders():
    """Streams of all kinds with their header."""
    pixels = blobs(40, 24)
    for level in (50, 95):
        yield imagecodecs.jpeg8_encode(pixels, level=level), jpeg_header, 3
        yield imagecodecs.jpeg8_encode(pixels[..., 0].copy(), level=level), jpeg_header, 1
        yield imagecodecs.jpeg8_encode(pixels, level=level, subsampling="420"), jpeg_header, 3
    for form in ("j2k", "jp2"):
        yield imagecodecs.jpeg2k_encode(pixels, level=40, codecformat=form), jpeg2000_header, 3
        yield imagecodecs.jpeg2k_encode(pixels[..., 0].copy(), codecformat=form), jpeg2000_header, 1


@pytest.mark.parametrize(("stream", "header", "samples"), list(encoders()))
def test_headers_are_read(stream, header, samples):
    assert header(bytes(stream)) == Header(24, 40, samples)


def test_markers_and_garbage_before_the_frame_are_skipped_as_decoders_do():
    stream = bytes(imagecodecs.jpeg8_encode(blobs(40, 24)))
    comment = b"\xff\xfe\x00\x06" + FRAME + b"xx"
    for before in (comment, b"\xff" * 3, b"\0\0", b"\xff\x01"):
        longer = stream[:2] + before + stream[2:]
        assert jpeg_header(longer) == Header(24, 40, 3)
        assert imagecodecs.jpeg8_decode(longer).shape == (24, 40, 3)


def test_a_stream_of_too_many_parts_is_refused():
    stream = bytearray(imagecodecs.jpeg2k_encode(blobs(256, 256), codecformat="j2k"))
    struct.pack_into(">II", stream, 24, 2, 2)
    with pytest.raises(ValueError, match=f"16,384 parts, more than the {MOST_PARTS:,} allowed"):
        jpeg2000_header(bytes(stream))


def test_a_decoder_is_not_called_for_other_samples():
    def never(stream, *, out):
        raise AssertionError

    stream = bytes(imagecodecs.jpeg2k_encode(blobs(40, 24), codecformat="j2k"))
    with pytest.raises(ValueError, match="its header says 3 samples per pixel, the file 1"):
        checked(never, jpeg2000_header)(stream, out=np.empty((24, 40), np.uint8))
    assert not jpeg_fits(stream, (24, 40, 3))


@given(st.binary(max_size=80), st.sampled_from((b"", b"\xff\xd8\xff", SIZ, b"\0\0\0\x0cjP  ")))
def test_any_bytes_give_a_header_or_a_value_error(data, start):
    for header in (jpeg_header, jpeg2000_header):
        with suppress(ValueError):
            assert min(header(start + data)) >= 0


def cut(stream, share):
    """The first part of a stream, as a download that was broken off leaves it."""
    return stream[: int(share * len(stream))].ljust(len(stream), b"\0")


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_a_tile_that_was_cut_off_is_not_filled_with_gray(share):
    stream = bytes(imagecodecs.jpeg8_encode(blobs(64, 64), level=90))
    decode, out = checked_jpeg(imagecodecs.jpeg8_decode), np.empty((64, 64, 3), np.uint8)
    assert imagecodecs.jpeg8_decode(cut(stream, share)).shape == out.shape, "no error of the decoder's own"
    with pytest.raises(ValueError, match="was cut off"):
        decode(cut(stream, share), out=out)


@pytest.mark.parametrize("end", [b"", b"\0\0\0", JPEG_END + b"\0"])
def test_a_whole_stream_needs_no_end_marker(end):
    stream = bytes(imagecodecs.jpeg8_encode(blobs(64, 64), level=90))
    out = np.empty((64, 64, 3), np.uint8)
    found = checked_jpeg(imagecodecs.jpeg8_decode)(stream[:-2] + end, out=out)
    np.testing.assert_array_equal(found, imagecodecs.jpeg8_decode(stream))
    assert found is out


def set_counts(path, change):
    """Change the lengths of the tiles of the first directory."""
    with tifffile.TiffFile(path) as file:
        counts = file.pages[0].databytecounts
    set_tag(path, 0, "TileByteCounts", change(counts))


@pytest.mark.parametrize("kind", ["jpeg.svs", "jpeg2000.svs", "left_to_openslide.svs", "jpeg.tif"])
def test_a_tile_longer_than_the_file_is_refused_before_openslide_asks_for_the_memory(tmp_path, kind):
    path = FILES[kind](tmp_path / kind)
    set_counts(path, lambda counts: (*counts[:-1], 2**32 - 1))
    for reader in ("auto", "openslide"):
        with pytest.raises(SlideError, match=r"4,294,967,295 bytes in a file of .* It is damaged"):
            Slide(path, 0.5, reader=reader)


@pytest.mark.parametrize("tag", ["ImageWidth", "TileWidth"])
def test_more_or_larger_tiles_than_in_any_slide_are_refused(tmp_path, tag):
    path = FILES["jpeg.svs"](tmp_path / "a.svs")
    set_tag(path, 0, tag, 2**30)
    with pytest.raises(SlideError, match="its directory speaks of .* It is damaged"):
        Slide(path, 0.5)


@pytest.mark.parametrize("reader", ["auto", "openslide"])
def test_a_level_wider_than_the_finest_is_no_foreign_error(tmp_path, reader):
    path = aperio(tmp_path / "a.svs", [Directory(blobs(W, H)), Directory(blobs(4 * W, H // 10))])
    with Slide(path, 0.5, reader=reader) as slide:
        assert slide.read_field(0, 0, (100, 100), 0.5).shape == (100, 100, 3)
