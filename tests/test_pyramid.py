"""OpenSlide reads from a pyramid what was written to it; the file is complete or absent."""

import numpy as np
import openslide
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hdmil_lib.errors import SlideError
from hdmil_lib.synthetic.pyramid import write_pyramid


def smooth_image(width: int, height: int) -> np.ndarray:
    """A picture that JPEG preserves well: slow waves, different in every channel."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin(x / 37 + c) + np.cos(y / 53 - c) for c in range(3)]
    return np.rint(128 + 40 * np.stack(waves, axis=-1)).astype(np.uint8)


def cut(image: np.ndarray, height: int) -> list[np.ndarray]:
    return [image[y : y + height] for y in range(0, len(image), height)]


@settings(max_examples=12, deadline=None)
@given(
    width=st.integers(17, 900),
    height=st.integers(17, 900),
    strip=st.integers(1, 700),
    mpp=st.tuples(st.floats(0.2, 1.0), st.floats(0.2, 1.0)),
)
@example(width=17, height=17, strip=1, mpp=(1.0, 0.20038019326075177))  # needs a ratio of 32-bit integers
def test_openslide_reads_back_what_was_written(tmp_path_factory, width, height, strip, mpp):
    image = smooth_image(width, height)
    path = write_pyramid(tmp_path_factory.mktemp("p") / "a.tif", cut(image, strip), width, height, mpp)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.dimensions == (width, height)
        assert slide.level_count >= 4
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp[0], rel=1e-5)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(mpp[1], rel=1e-5)
        read = np.asarray(slide.read_region((0, 0), 0, (width, height)))[..., :3]
        # JPEG at quality 85 with halved chroma has errors of a few gray levels on a smooth picture.
        assert np.abs(read.astype(int) - image).mean() < 3


def test_levels_show_the_same_place(tmp_path):
    image = np.full((1024, 1280, 3), 240, np.uint8)
    image[256:512, 768:1024] = 30
    path = write_pyramid(tmp_path / "a.tif", cut(image, 300), 1280, 1024, 0.5)
    with openslide.OpenSlide(path) as slide:
        for level, downsample in enumerate(slide.level_downsamples):
            size = slide.level_dimensions[level]
            pixels = np.asarray(slide.read_region((0, 0), level, size))[..., 0]
            dark = np.argwhere(pixels < 135)
            assert np.abs(dark.min(0) * downsample - (256, 768)).max() <= downsample
            assert np.abs((dark.max(0) + 1) * downsample - (512, 1024)).max() <= downsample


def test_bytes_depend_on_the_rows_and_not_on_the_strips(tmp_path):
    image = smooth_image(700, 650)
    files = [
        write_pyramid(tmp_path / f"{h}.tif", cut(image, h), 700, 650, 0.5).read_bytes() for h in (1, 97, 650)
    ]
    assert files[0] == files[1] == files[2]
    other = write_pyramid(tmp_path / "other.tif", [255 - image], 700, 650, 0.5).read_bytes()
    assert other != files[0]


@pytest.mark.parametrize(
    ("strips", "problem"),
    [
        ([np.zeros((100, 64, 3), np.uint8)], "100 rows"),
        ([np.zeros((200, 64, 3), np.uint8)], "200 rows"),
        ([np.zeros((128, 63, 3), np.uint8)], "give uint8"),
        ([np.zeros((128, 64, 3), np.float32)], "give uint8"),
    ],
)
def test_wrong_rows_are_an_error_and_leave_nothing(tmp_path, strips, problem):
    with pytest.raises(SlideError, match=problem):
        write_pyramid(tmp_path / "bad.tif", strips, 64, 128, 0.5)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_the_old_slide_alone(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(b"old")

    def rows():
        yield np.zeros((64, 64, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pyramid(path, rows(), 64, 128, 0.5)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_memory_does_not_grow_with_the_height(tmp_path):
    import tracemalloc

    def peak(height: int) -> int:
        tracemalloc.start()
        rows = (np.zeros((256, 2048, 3), np.uint8) for _ in range(height // 256))
        write_pyramid(tmp_path / "a.tif", rows, 2048, height, 0.5)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(8192) < 1.3 * peak(2048)
