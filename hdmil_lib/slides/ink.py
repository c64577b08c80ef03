"""Pen marks and black areas on a thumbnail, by the optical density of the three channels.

Dyes of histology absorb green at least about as much as red and blue (hematoxylin, eosin), or blue most
(DAB). Inks differ: blue ink absorbs red most, green ink absorbs green least, red ink absorbs green and blue
alike and almost no red, black ink everything.
"""

import cv2
import numpy as np

MIN_STROKE_UM2 = 20_000.0
"""Smallest area in um2 of a mark that is taken for ink. A pen draws lines of 0.3 mm and more; dye crystals
and pigmented cells are smaller."""

INK_MPP = 16.0
"""Scale in um/px at which ink is looked for, a ninth of the narrowest stroke; a fourth of the pixels at 8."""

MARGIN_UM = 40.0
"""Width in um of the rim around ink and black areas that is left out too, where they mix with the glass."""

STRONG, WEAK = 0.4, 0.15
"""Difference of the optical density between two channels in ink, and in its pale ends, which count where
they are connected to ink. On the thumbnails of six sets of real H&E tiles one pixel in 25,000 has the first
and the hue of an ink, and no stroke was found."""

BLACK_INK = 0.6
"""Optical density from which all channels together are black ink: a quarter of the light passes."""

DARK = 0.8
"""Optical density of the most absorbed channel from which tissue that is connected to ink is under ink,
whatever the hue of the two together. On thumbnails of real H&E tiles 0.3 to 2 % of the pixels reach it."""

BLACK_VALUE = 16
"""Brightest channel (of 255) below which nothing was scanned: scanners fill such areas with black.
Black ink lets more light through."""


MAX_GLASS_PIXELS = 500_000
"""Number of pixels that are looked at for the color of the glass, about, evenly spread."""


def glass_color(thumbnail: np.ndarray) -> np.ndarray:
    """The color of the bare glass: that of the brightest pale pixels.

    Args:
        thumbnail: RGB pixels, uint8 (H, W, 3).

    Returns:
        float (3,); white if fewer than one pixel in a hundred is pale and bright. Pixels that are exactly
        white are passed over, since readers fill areas that were not scanned with them.
    """
    step = max(1, round((thumbnail.shape[0] * thumbnail.shape[1] / MAX_GLASS_PIXELS) ** 0.5))
    pixels = thumbnail[::step, ::step].reshape(-1, 3)
    value, least = pixels.max(axis=1), pixels.min(axis=1)
    pale = (value >= 200) & (value - least <= 14) & (least < 255)
    if pale.mean() < 0.01:
        return np.full(3, 255.0)
    brightest = np.percentile(value[pale], 95)
    glass = pixels[pale & (value >= brightest - 4)]
    return np.median(glass, axis=0).astype(float)


def optical_density(thumbnail: np.ndarray, glass: np.ndarray) -> np.ndarray:
    """How much light each channel loses compared with the glass, as a decadic logarithm.

    Args:
        thumbnail: RGB pixels, uint8 (H, W, 3).
        glass: Color of the bare glass, (3,).

    Returns:
        float32 (H, W, 3), 0 where a pixel is as bright as the glass or brighter.
    """
    levels = np.arange(256, dtype=np.float32)[:, None]
    table = np.maximum(0, np.log10((glass + 1) / (levels + 1))).astype(np.float32)
    return np.stack([table[thumbnail[..., c], c] for c in range(3)], axis=-1)


def ink_mask(density: np.ndarray, mpp: float) -> np.ndarray:
    """Find strokes of blue, green, red and black pens.

    Ink that was put on the specimen to mark its margins looks the same and is found too. A large hemorrhage
    is not as saturated as red ink, but may come close to it.

    Args:
        density: Optical density, (H, W, 3), from `optical_density`.
        mpp: Scale in um/px.

    Returns:
        True on ink and a rim of 40 um, bool (H, W).
    """
    red, green, blue = np.moveaxis(density, -1, 0)
    most, least = density.max(axis=-1), density.min(axis=-1)
    hues = (
        (red > 1.08 * green) & (green >= blue),
        (red > 1.3 * green) & (blue > 1.3 * green),
        (green > 4 * red) & (blue > 0.65 * green) & (blue < 1.6 * green),
    )
    over_tissue = ((most >= DARK) & (blue < 0.8 * most)) | (least >= BLACK_INK)
    found = np.zeros(density.shape[:2], bool)
    for hue, strong in zip(hues, (STRONG, STRONG, 1.4 * STRONG), strict=True):
        weak = (hue & (most - least >= WEAK)) | over_tissue
        found |= _connected(weak, hue & (most - least >= strong), mpp)
    black = (least >= BLACK_INK) & (most - least < 0.35 * least)
    found |= _connected(over_tissue, black, mpp)
    return widen(found, MARGIN_UM, mpp)


def widen(mask: np.ndarray, margin_um: float, mpp: float) -> np.ndarray:
    """Widen a mask, bool (H, W), by a margin in um, at least by one pixel."""
    if not mask.any():
        return mask
    width = 2 * max(1, round(margin_um / mpp)) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    return cv2.dilate(mask.astype(np.uint8), disc).astype(bool)


def _connected(weak: np.ndarray, strong: np.ndarray, mpp: float) -> np.ndarray:
    """The 8-connected pieces of `weak` in which `strong` covers the area of a stroke."""
    count, labels = cv2.connectedComponents(weak.astype(np.uint8), connectivity=8)
    area = np.bincount(labels[strong & weak], minlength=count) * mpp**2
    kept = area >= MIN_STROKE_UM2
    kept[0] = False
    return kept[labels]
