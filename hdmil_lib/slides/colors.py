"""Samples of TIFF files as RGB: what they mean is converted if there is one meaning, and else refused."""

from collections.abc import Callable

import numpy as np
import tifffile

Converter = Callable[[np.ndarray], np.ndarray]
"""Takes the samples of a part of an image, (h, w, samples); returns uint8 (h, w, 3)."""

PHOTOMETRIC, EXTRASAMPLE = tifffile.PHOTOMETRIC, tifffile.EXTRASAMPLE
DECODED_YCBCR = (tifffile.COMPRESSION.JPEG, tifffile.COMPRESSION.WEBP)
"""Compressions whose decoders turn YCbCr to RGB."""


def converter(page: tifffile.TiffPage) -> Converter:
    """Find out how the samples of a TIFF page become RGB.

    Gray is repeated, inverted gray is inverted, 16 bits become 8 over the full range, palettes are looked up,
    CMYK is multiplied (without its color profile), and transparent pixels are laid on white.

    Raises:
        ValueError: The samples have no or several meanings as a color image; the message says what they are.
    """
    if page.sampleformat != tifffile.SAMPLEFORMAT.UINT or page.bitspersample not in (8, 16):
        kind = getattr(page.sampleformat, "name", str(page.sampleformat)).lower()
        raise ValueError(
            f"its samples are {page.bitspersample}-bit {kind}, not 8- or 16-bit unsigned integers"
        )
    n_colors, colors = _colors(page)
    extra = page.extrasamples
    if page.samplesperpixel == n_colors:
        return colors
    if page.samplesperpixel == n_colors + 1 and len(extra) == 1 and extra[0] != EXTRASAMPLE.UNSPECIFIED:
        lay = _lay_on_white if extra[0] == EXTRASAMPLE.UNASSALPHA else _add_white
        return lambda samples: lay(colors(samples[..., :-1]), eight_bits(samples[..., -1:]))
    raise ValueError(
        f"it has {page.samplesperpixel} samples per pixel, {n_colors} of them {_name(page)}, and does not "
        "say what the others are"
    )


def eight_bits(samples: np.ndarray) -> np.ndarray:
    """Bring samples of 16 bits to 8, so that 65,535 becomes 255; samples of 8 bits stay."""
    if samples.dtype.itemsize == 1:
        return samples
    return ((samples.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)


def cmyk_to_rgb(samples: np.ndarray) -> np.ndarray:
    """Multiply what the inks let through, uint8 (h, w, 4) -> (h, w, 3)."""
    through = 255 - samples.astype(np.uint16)
    return ((through[..., :3] * through[..., 3:] + 127) // 255).astype(np.uint8)


def _colors(page: tifffile.TiffPage) -> tuple[int, Converter]:
    """Number of color samples of a page, and how these become RGB."""
    photometric = page.photometric
    if photometric == PHOTOMETRIC.RGB or (
        photometric == PHOTOMETRIC.YCBCR and page.compression in DECODED_YCBCR
    ):
        return 3, eight_bits
    if photometric == PHOTOMETRIC.MINISBLACK:
        return 1, lambda samples: eight_bits(samples).repeat(3, axis=-1)
    if photometric == PHOTOMETRIC.MINISWHITE:
        return 1, lambda samples: 255 - eight_bits(samples).repeat(3, axis=-1)
    if photometric == PHOTOMETRIC.SEPARATED and _is_cmyk(page):
        return 4, lambda samples: cmyk_to_rgb(eight_bits(samples))
    if photometric == PHOTOMETRIC.PALETTE and page.colormap is not None:
        table = eight_bits(page.colormap).T
        if table.shape == (2**page.bitspersample, 3):
            return 1, lambda samples: table[samples[..., 0]]
    raise ValueError(f"its colors are stored as {_name(page)}")


def _is_cmyk(page: tifffile.TiffPage) -> bool:
    return page.tags.valueof("InkSet", 1) == 1 and page.compression not in DECODED_YCBCR


def _name(page: tifffile.TiffPage) -> str:
    return getattr(page.photometric, "name", str(page.photometric)).lower()


def _lay_on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colors that were not multiplied by their opacity, on white."""
    wide = alpha.astype(np.uint16)
    return ((colors * wide + 255 * (255 - wide) + 127) // 255).astype(np.uint8)


def _add_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colors that were multiplied by their opacity, on white."""
    return np.minimum(colors.astype(np.uint16) + (255 - alpha), 255).astype(np.uint8)
