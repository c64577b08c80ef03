"""tissue_statistics against OpenCV for all colors, and against colorsys."""

import colorsys
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch

from hdmil_lib.kernels import tissue_statistics
from hdmil_lib.kernels.tissue_statistics.reference import hsv, nearest
from hdmil_lib.slides.tissue import TissueSettings


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


def test_hue_saturation_and_value_of_all_colors_are_those_of_opencv():
    levels = torch.arange(256, dtype=torch.uint8)
    for red in range(256):
        colors = torch.cartesian_prod(torch.tensor([red], dtype=torch.uint8), levels, levels)
        expected = cv2.cvtColor(colors.numpy()[None], cv2.COLOR_RGB2HSV)[0]
        np.testing.assert_array_equal(torch.stack(hsv(*colors.T), 1), expected)


def test_they_are_the_textbook_definition_up_to_rounding():
    for red, green, blue in draw(500).tolist():
        h, s, v = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
        ours = [x.item() for x in hsv(*torch.tensor([[red], [green], [blue]], dtype=torch.uint8))]
        difference = [abs(a - b) for a, b in zip(ours, (180 * h, 255 * s, 255 * v), strict=True)]
        # The error comes from a reciprocal rounded to 12 bits and from the rounding of the result.
        assert min(difference[0], 180 - difference[0]) < 0.6
        assert max(difference[1:]) < 0.6


def test_no_quotient_is_near_a_half():
    """The kernel may divide in float32, since half-integers are more than 8 rounding errors away."""
    divisors = torch.arange(1, 256, dtype=torch.int32)
    for number in (255 * 4096, 30 * 4096):
        quotients = [Fraction(number, d) for d in divisors.tolist()]
        assert nearest(number, divisors).tolist() == [round(q) for q in quotients]
        assert min((Fraction(1, 2) - abs(q - round(q))) / q for q in quotients) > Fraction(8, 2**24)


@pytest.mark.parametrize("bins", [1, 7, 16, 128])
def test_counts_are_those_of_a_loop_over_the_pixels_of_opencv(bins):
    tiles = draw(3, 20, 30)
    ours = tissue_statistics(tiles, bins=bins, threshold=100)
    expected, tissue = np.zeros((3, 3, bins), int), np.zeros(3)
    for n, tile in enumerate(tiles.numpy()):
        for h, s, v in cv2.cvtColor(tile, cv2.COLOR_RGB2HSV).reshape(-1, 3).tolist():
            expected[n, 0, h * bins // 180] += 1
            expected[n, 1, s * bins // 256] += 1
            expected[n, 2, v * bins // 256] += 1
            tissue[n] += s > 100
    np.testing.assert_array_equal(ours.histogram, expected)
    np.testing.assert_array_equal(ours.tissue_share, (tissue / 600).astype(np.float32))
    assert ours.histogram.dtype == torch.int64
    assert ours.tissue_share.dtype == torch.float32


def test_bins_are_those_of_opencv_s_histogram():
    tiles = draw(2, 16, 16)
    histogram = tissue_statistics(tiles).histogram
    for n, tile in enumerate(tiles.numpy()):
        planes = cv2.cvtColor(tile, cv2.COLOR_RGB2HSV)
        for channel, top in enumerate((180, 256, 256)):
            expected = cv2.calcHist([planes], [channel], None, [16], [0, top]).ravel()
            np.testing.assert_array_equal(histogram[n, channel], expected)


def test_white_black_and_gray_have_no_hue_and_are_no_tissue():
    tiles = torch.tensor([255, 0, 128], dtype=torch.uint8)[:, None, None, None].expand(3, 4, 4, 3)
    histogram, share = tissue_statistics(tiles)
    assert (histogram[:, :2, 0] == 16).all()
    assert not share.any()
    assert histogram[:, 2].argmax(1).tolist() == [15, 0, 8]


def test_stained_pixels_count_as_tissue():
    tile = np.full((1, 8, 8, 3), 250, np.uint8)
    tile[:, :2] = (180, 90, 160)
    assert tissue_statistics(torch.from_numpy(tile)).tissue_share.item() == 0.25


def test_the_default_threshold_is_the_least_of_tissue_mask():
    low = TissueSettings().min_saturation
    tiles = draw(2, 8, 8)
    explicit = tissue_statistics(tiles, threshold=low)
    assert torch.equal(tissue_statistics(tiles).tissue_share, explicit.tissue_share)


def test_the_compiled_operator_equals_the_eager_one():
    tiles = draw(2, 9, 9)
    compiled = torch.compile(lambda t: tissue_statistics(t, bins=5), fullgraph=True)(tiles)
    for ours, wanted in zip(compiled, tissue_statistics(tiles, bins=5), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tiles", dict(tiles=draw(1, 4, 4).float())),
        ("tiles", dict(tiles=draw(1, 4, 4).numpy())),
        ("tiles", dict(tiles=draw(4, 4))),
        ("tiles", dict(tiles=draw(1, 0, 4))),
        ("bins", dict(bins=0)),
        ("bins", dict(bins=129)),
        ("threshold", dict(threshold=-1)),
        ("threshold", dict(threshold=256)),
        ("backend", dict(backend="cuda")),
        ("backend", dict(backend="triton")),
    ],
)
def test_a_bad_argument_is_named(name, change, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=name):
        tissue_statistics(**dict(tiles=draw(1, 4, 4)) | change)
