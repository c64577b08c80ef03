"""Tissue is found where it lies, and a blank slide has none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_factory import INK, paint_disc

from hdmil_lib.slides import TissueSettings, tissue_mask

UM = 8.0


def disc(
    center_um: tuple[float, float], radius_um: float, mpp: float = UM, side_um: float = 1600
) -> np.ndarray:
    side = round(side_um / mpp)
    return paint_disc((side, side), (mpp, mpp), center_um, radius_um)


def test_no_tissue_on_a_blank_slide():
    rng = np.random.default_rng(0)
    white = np.full((150, 200, 3), 255, np.uint8)
    glass = rng.normal((243, 241, 244), 2, (150, 200, 3)).astype(np.uint8)
    shaded = np.linspace(200, 255, 200, dtype=np.uint8)[None, :, None].repeat(150, 0).repeat(3, 2)
    for blank in (white, glass, shaded, np.zeros_like(white)):
        assert not tissue_mask(blank, UM).any()


def test_all_of_a_picture_full_of_tissue():
    """Next to dark epithelium, Otsu's threshold alone would take pale stroma for background."""
    rng = np.random.default_rng(0)
    picture = np.empty((150, 200, 3))
    picture[:, :100], picture[:, 100:] = (150, 90, 160), (235, 190, 215)
    picture = (picture + rng.normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8)
    assert tissue_mask(picture, UM).mean() > 0.99


@settings(max_examples=25, deadline=None)
@given(center=st.tuples(st.floats(400, 1200), st.floats(400, 1200)), radius=st.floats(120, 350))
def test_a_disc_is_found_whole(center, radius):
    thumbnail = disc(center, radius)
    truth = thumbnail[..., 1] < 160  # more than half ink
    mask = tissue_mask(thumbnail, UM)
    # Threshold, median and closing may shift the rim by one pixel.
    rim = 2 * np.pi * radius / UM
    assert mask.shape == truth.shape
    assert mask.dtype == bool
    assert np.logical_xor(mask, truth).sum() <= rim


@pytest.mark.parametrize("mpp", [4.0, 8.0, 16.0])
def test_areas_are_physical(mpp):
    """Pieces below a tile are dropped and holes below half a tile are filled, at any mpp."""
    radius = np.sqrt(128.0**2 / np.pi)
    assert tissue_mask(disc((800, 800), 1.2 * radius, mpp), mpp).any()
    assert not tissue_mask(disc((800, 800), 0.8 * radius, mpp), mpp).any()

    def with_hole(hole_radius):
        sheet = disc((800, 800), 600, mpp)
        hole = disc((800, 800), hole_radius, mpp)
        return np.where(hole[..., 1:2] < 160, 255, sheet).astype(np.uint8)

    center = round(800 / mpp)
    half = np.sqrt(0.5) * radius
    assert tissue_mask(with_hole(0.8 * half), mpp)[center, center]
    assert not tissue_mask(with_hole(1.4 * half), mpp)[center, center]


def test_settings_change_what_counts():
    thumbnail = disc((800, 800), 50)
    assert not tissue_mask(thumbnail, UM).any()
    assert tissue_mask(thumbnail, UM, TissueSettings(min_object_um2=1000)).any()
    pale = np.full((100, 100, 3), 255, np.uint8)
    pale[30:70, 30:70] = 255 - (255 - INK) // 20
    assert not tissue_mask(pale, UM).any()
    assert tissue_mask(pale, UM, TissueSettings(min_saturation=3)).any()


def test_dust_is_dropped_and_gaps_are_closed():
    thumbnail = disc((800, 800), 300)
    rng = np.random.default_rng(0)
    dust = rng.random(thumbnail.shape[:2]) < 0.01
    gaps = rng.random(thumbnail.shape[:2]) < 0.1
    spotted = np.where(dust[..., None], INK, thumbnail)
    spotted[gaps & (thumbnail[..., 1] < 255)] = 255
    assert np.logical_xor(tissue_mask(spotted, UM), tissue_mask(thumbnail, UM)).mean() < 0.005
