"""Tissue detection: Otsu's threshold on the saturation of a thumbnail, then morphology in micrometers."""

from dataclasses import dataclass

import cv2
import numpy as np

from hdmil_lib.slides.ink import (
    BLACK_VALUE,
    INK_MPP,
    MARGIN_UM,
    glass_color,
    ink_mask,
    optical_density,
    widen,
)


@dataclass(frozen=True)
class TissueSettings:
    """Settings of `tissue_mask` and of the tiles that it gives; lengths and areas are physical.

    `hdmil_lib.slides.presets` has them for kinds of slides, with the reason of each value. Here each has the
    reason why it can be changed.

    Attributes:
        min_saturation: Lower limit of Otsu's threshold (of 255), so that a blank slide has no tissue.
        max_saturation: Upper limit of Otsu's threshold (of 255), so that pale stroma is not taken for
            background when tissue fills the picture, nor a counterstain beside a strong stain.
        median_um: Width in um of the median filter that removes dust and compression noise.
        closing_um: Width in um of the disc that closes gaps between cells and fibers.
        max_hole_um2: Largest area in um2 of holes that are filled (lumens, fat cells); the default is half a
            tile.
        min_object_um2: Smallest area in um2 of pieces of tissue that are kept; the default is one tile.
        min_tissue: Smallest share of tissue in a tile, 0 to 1, so that no tile is mostly glass.
        white_balance: Whether the color of the glass is made white first, and colors are smoothed instead of
            saturations. A tint of the glass and the noise of pale pixels then do not look like stain, so that
            lower thresholds are safe.
        min_density: Optical density of the brightest channel, relative to the glass, from which gray pixels
            are tissue too: brown over blue is gray. None looks at the saturation alone, so that shadows and
            the edges of coverslips are not tissue.
        exclude_ink: Whether pen marks and black areas are left out; see `hdmil_lib.slides.ink`.
        min_sharpness: Smallest `sharpness` of a tile, without a unit; 0 does not look, since all tiles must
            be read for it.
    """

    min_saturation: int = 15
    max_saturation: int = 40
    median_um: float = 40.0
    closing_um: float = 56.0
    max_hole_um2: float = 8_192.0
    min_object_um2: float = 16_384.0
    min_tissue: float = 0.25
    white_balance: bool = False
    min_density: float | None = None
    exclude_ink: bool = False
    min_sharpness: float = 0.0


def tissue_mask(thumbnail: np.ndarray, mpp: float, settings: TissueSettings | None = None) -> np.ndarray:
    """Segment tissue on a thumbnail.

    Args:
        thumbnail: RGB pixels, uint8 (H, W, 3).
        mpp: Scale of the thumbnail in um/px.
        settings: Thresholds and sizes; None takes the defaults, which suit H&E at 8 um/px.

    Returns:
        True on tissue, bool (H, W). All False if nothing is stained.
    """
    settings = settings or TissueSettings()
    excluded = _excluded(thumbnail, mpp) if settings.exclude_ink else None
    colors = _balanced(thumbnail, mpp, settings) if settings.white_balance else thumbnail
    saturation = cv2.cvtColor(colors, cv2.COLOR_RGB2HSV)[..., 1]
    if not settings.white_balance:
        saturation = cv2.medianBlur(saturation, _odd_pixels(settings.median_um, mpp))
    if excluded is not None:
        saturation = np.where(excluded, np.uint8(0), saturation)
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    mask = saturation > np.clip(otsu, settings.min_saturation, settings.max_saturation)
    if settings.min_density is not None:
        mask |= _dense(thumbnail, mpp, settings)
    if excluded is not None:
        mask &= ~excluded

    width = _odd_pixels(settings.closing_um, mpp)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, disc).astype(bool)
    if excluded is not None:
        mask &= ~excluded
    mask = _without_small(mask, settings.min_object_um2 / mpp**2)
    mask = ~_without_small(~mask, settings.max_hole_um2 / mpp**2)
    return mask if excluded is None else mask & ~excluded


def black_mask(thumbnail: np.ndarray, mpp: float) -> np.ndarray:
    """Areas that were not scanned and are filled with black, with a rim of 40 um, bool (H, W)."""
    return widen(thumbnail.max(axis=-1) < BLACK_VALUE, MARGIN_UM, mpp)


def pen_mask(thumbnail: np.ndarray, mpp: float) -> np.ndarray:
    """Pen marks on a thumbnail, with a rim of 40 um, bool (H, W); black areas without a scan are none.

    Args:
        thumbnail: RGB pixels, uint8 (H, W, 3).
        mpp: Scale of the thumbnail in um/px.
    """
    height, width = thumbnail.shape[:2]
    factor = max(1, int(INK_MPP / mpp))
    size = max(1, round(width / factor)), max(1, round(height / factor))
    small = cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA)
    density = optical_density(small, glass_color(small))
    density[black_mask(small, mpp * factor)] = 0
    ink = ink_mask(density, mpp * factor).astype(np.uint8)
    return cv2.resize(ink, (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)


def _excluded(thumbnail: np.ndarray, mpp: float) -> np.ndarray:
    return pen_mask(thumbnail, mpp) | black_mask(thumbnail, mpp)


def _smoothed(thumbnail: np.ndarray, mpp: float, settings: TissueSettings) -> np.ndarray:
    return cv2.medianBlur(thumbnail, _odd_pixels(settings.median_um, mpp))


def _balanced(thumbnail: np.ndarray, mpp: float, settings: TissueSettings) -> np.ndarray:
    """Smoothed colors, each channel scaled so that the glass is white, uint8 (H, W, 3)."""
    scale = 255.0 / glass_color(thumbnail)
    balanced = _smoothed(thumbnail, mpp, settings) * scale
    return np.rint(balanced.clip(0, 255)).astype(np.uint8)


def _dense(thumbnail: np.ndarray, mpp: float, settings: TissueSettings) -> np.ndarray:
    """Pixels of which all channels are darker than the glass by `min_density`."""
    density = optical_density(_smoothed(thumbnail, mpp, settings), glass_color(thumbnail))
    return density.min(axis=-1) >= settings.min_density


def _odd_pixels(length_um: float, mpp: float) -> int:
    """Length in pixels, rounded to the nearest odd number, at least 1."""
    return 2 * max(0, round((length_um / mpp - 1) / 2)) + 1


def _without_small(mask: np.ndarray, min_area: float) -> np.ndarray:
    """Drop the 4-connected pieces with fewer than `min_area` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    large = stats[:, cv2.CC_STAT_AREA] >= min_area
    large[0] = False
    return large[labels]
