"""Tissue detection: Otsu's threshold on the saturation of a thumbnail, then morphology in micrometers."""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class TissueSettings:
    """Settings of `tissue_mask`; lengths and areas are physical, so that they apply to any mpp.

    Attributes:
        min_saturation: Lower limit of Otsu's threshold (of 255), so that a blank slide has no tissue.
        max_saturation: Upper limit of Otsu's threshold (of 255), so that pale stroma is not taken for
            background when tissue fills the picture.
        median_um: Width in um of the median filter that removes dust and compression noise.
        closing_um: Width in um of the disc that closes gaps between cells and fibers.
        max_hole_um2: Largest area in um2 of holes that are filled (lumens, fat cells); the default is half a
            tile.
        min_object_um2: Smallest area in um2 of pieces of tissue that are kept; the default is one tile.
    """

    min_saturation: int = 15
    max_saturation: int = 40
    median_um: float = 40.0
    closing_um: float = 56.0
    max_hole_um2: float = 8_192.0
    min_object_um2: float = 16_384.0


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
    saturation = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)[..., 1]
    saturation = cv2.medianBlur(saturation, _odd_pixels(settings.median_um, mpp))
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    mask = saturation > np.clip(otsu, settings.min_saturation, settings.max_saturation)

    width = _odd_pixels(settings.closing_um, mpp)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, disc).astype(bool)
    mask = _without_small(mask, settings.min_object_um2 / mpp**2)
    return ~_without_small(~mask, settings.max_hole_um2 / mpp**2)


def _odd_pixels(length_um: float, mpp: float) -> int:
    """Length in pixels, rounded to the nearest odd number, at least 1."""
    return 2 * max(0, round((length_um / mpp - 1) / 2)) + 1


def _without_small(mask: np.ndarray, min_area: float) -> np.ndarray:
    """Drop the 4-connected pieces with fewer than `min_area` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    large = stats[:, cv2.CC_STAT_AREA] >= min_area
    large[0] = False
    return large[labels]
