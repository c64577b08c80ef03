"""DICOM series are read as OpenSlide reads them, each frame decoded once."""

import numpy as np
import pytest
from dicom_factory import write_series
from pydicom import dcmread
from pydicom.uid import generate_uid
from slide_factory import find_ink, paint_disc

from hdmil_lib.errors import SlideError
from hdmil_lib.slides import Slide
from hdmil_lib.slides.stored_tiles import StoredTiles

W, H = 403, 301


@pytest.fixture
def pixels():
    return paint_disc((W, H), (0.5, 0.5), (100, 80), 50)


def read(path, reader, corner=(-20, 6), size=(180, 140)):
    with Slide(path, reader=reader) as slide:
        return [slide.read_field(*corner, size, mpp) for mpp in (0.5, 2.0)] + [slide.thumbnail(4.0)]


@pytest.mark.parametrize("colors", ["YBR_FULL_422", "RGB"])
def test_frames_have_the_pixels_of_openslide(tmp_path, pixels, colors):
    paths = write_series(tmp_path, pixels, jpeg=True, colors=colors)
    overview = dcmread(paths[2])
    overview.SOPInstanceUID = overview.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    overview.ImageType = ["ORIGINAL", "PRIMARY", "OVERVIEW", "NONE"]
    del overview.DimensionOrganizationType
    overview.save_as(tmp_path / "overview.dcm")
    write_series(tmp_path, 255 - pixels, jpeg=True)  # another series in the same folder
    for path in paths:
        for stored, reference in zip(read(path, "stored"), read(path, "openslide"), strict=True):
            np.testing.assert_array_equal(stored, reference)
    with Slide(paths[0]) as slide:
        assert isinstance(slide._pixels, StoredTiles)
        assert (slide.vendor, slide.mpp, len(slide.levels)) == ("dicom", (0.5, 0.5), 3)
        np.testing.assert_allclose(find_ink(slide.thumbnail(2.0), 2.0), (100, 80), atol=0.5)
        before = slide.read_field(0, 0, (W, H), 0.5)
    assert np.abs(before.astype(int) - pixels).mean() < 2


def test_what_is_stored_otherwise_is_left_to_openslide(tmp_path, pixels):
    path = write_series(tmp_path, pixels)[0]
    with Slide(path) as slide:
        assert slide._pixels is None
        np.testing.assert_array_equal(slide.read_field(0, 0, (W, H), 0.5), pixels)
    with pytest.raises(SlideError, match="no JPEG tiles"):
        Slide(path, reader="stored")


def test_damaged_series_end_in_our_error_or_are_read(tmp_path, pixels):
    path = write_series(tmp_path, pixels[:150, :200], jpeg=True, n_levels=1)[0]
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    copies = [whole[: int(share * len(whole))] for share in (0.0, 0.2, 0.5, 0.9, 0.99)]
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(132, len(whole), 3):
            damaged[place] = rng.integers(256)
        copies.append(bytes(damaged))
    for i, copy in enumerate(copies):
        path.write_bytes(copy)
        try:
            with Slide(path, 0.5) as slide:
                slide.thumbnail(8.0)
                slide.read_field(3, 5, (120, 100), 0.7)
            assert i >= 5, "a file that was cut off"
        except SlideError:
            refused += 1
    assert refused > 5
