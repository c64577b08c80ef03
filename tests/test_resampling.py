"""The filter on any device is Pillow's, up to one level where a color is rounded."""

import numpy as np
import pytest
import torch
from PIL import Image

from hdmil_lib.slides import resampling
from hdmil_lib.slides.resampling import average, margin, resample


def pillow(pictures, corners, scale, size):
    boxes = [(x, y, x + size[0] * scale[0], y + size[1] * scale[1]) for x, y in corners]
    resized = (
        Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC, box=box)
        for picture, box in zip(pictures, boxes, strict=True)
    )
    return np.stack([np.asarray(image) for image in resized])


@pytest.fixture(scope="module")
def pictures():
    """Noise, in which a wrong position or weight of the filter shows most."""
    return np.random.default_rng(0).integers(0, 256, (5, 190, 210, 3), np.uint8)


@pytest.mark.parametrize("scale", [(0.7, 0.9), (1.0, 1.0), (1.03, 1.04), (1.6, 2.3)])
def test_the_pixels_are_those_of_pillow(pictures, scale, monkeypatch):
    monkeypatch.setattr(resampling, "AT_A_TIME", 2)
    corners = np.random.default_rng(1).uniform(margin(2.3), 30, (5, 2))
    mine = resample(torch.from_numpy(pictures), corners, scale, (60, 50)).numpy()
    difference = np.abs(mine.astype(int) - pillow(pictures, corners, scale, (60, 50)))
    assert mine.dtype == np.uint8
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.002


@pytest.mark.parametrize("side", [120, 224, 300])
def test_at_the_edges_of_a_picture_the_filter_is_cut_off(pictures, side):
    scale = (210 / side, 190 / side)
    mine = resample(torch.from_numpy(pictures), np.zeros((5, 2)), scale, (side, side)).numpy()
    difference = np.abs(mine.astype(int) - pillow(pictures, np.zeros((5, 2)), scale, (side, side)))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.002


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_averages_are_those_of_pillow(pictures, factor):
    whole = np.ascontiguousarray(pictures[:, : 20 * factor, : 24 * factor])
    expected = [np.asarray(Image.fromarray(picture).reduce(factor)) for picture in whole]
    np.testing.assert_array_equal(average(torch.from_numpy(whole), factor), np.stack(expected))


def test_whole_pixels_at_the_same_scale_stay_as_they_are(pictures):
    mine = resample(torch.from_numpy(pictures), np.full((5, 2), 7.0), (1.0, 1.0), (100, 90)).numpy()
    np.testing.assert_array_equal(mine, pictures[:, 7:97, 7:107])
