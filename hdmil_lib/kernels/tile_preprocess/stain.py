"""Stain normalization: maps from the colors of one slide to those of another, estimated from pixels.

Both methods have the same form. A pixel x is transformed to a linear color space S, to logarithms, by an
affine map (M, t), and back: 256 S^-1 exp(M log(S (x + 1) / 256) + t) - 1, clipped to [0, 255]. Adding 1 keeps
the logarithm of black finite.

- Macenko et al. 2009, "A method for normalizing histology slides for quantitative analysis": S = 1, so that
  -log is the optical density, in which stains are additive (Beer-Lambert law), and M = target stains * ratio
  of strengths * pseudo-inverse of the source stains.
- Reinhard et al. 2001, "Color transfer between images": S gives the cone responses LMS; M and t scale and
  shift each axis of l-alpha-beta so that its mean and standard deviation become those of the target.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

MIN_DENSITY = 0.15  # lowest optical density of a stained pixel (beta of Macenko et al.)
EXTREME_PERCENT = 1.0  # percentile taken as the minimum of angles and strengths (alpha of Macenko et al.)
MIN_PIXELS = 16  # number of stained pixels that an estimate needs
MIN_ANGLE = 0.02  # smallest angle between two stains in radians, a little over 1 degree

LMS_OF_RGB = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
LAB_OF_LOG_LMS = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])

Matrix = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class StainTransform:
    """A map of colors for `tile_preprocess`.

    Attributes:
        space: Color space S as a map from linear RGB, (3, 3), invertible and without negative numbers.
        matrix: Map M from the logarithms of a pixel in S to those of the normalized pixel, (3, 3).
        offset: Offset t in natural logarithms, (3,).
        back: Inverse of S, (3, 3).
    """

    space: Matrix
    matrix: Matrix
    offset: tuple[float, float, float]
    back: Matrix

    def numbers(self) -> list[float]:
        """Return S, M, t and the inverse of S, row by row: 30 numbers."""
        return [n for row in (*self.space, *self.matrix, self.offset, *self.back) for n in row]


def fit_macenko(pixels: Tensor | np.ndarray, target: Tensor | np.ndarray) -> StainTransform:
    """Fit the map that gives a slide the two stain colors of another slide and their strengths.

    Args:
        pixels: RGB pixels of the slide to normalize, uint8 (..., 3). Background pixels are ignored.
        target: RGB pixels of the target slide, uint8 (..., 3). Background pixels are ignored.

    Raises:
        ValueError: `pixels` or `target` is not RGB in uint8, has no tissue, or shows one stain only.
    """
    source_stains, source_strengths = stain_vectors(pixels, "pixels")
    target_stains, target_strengths = stain_vectors(target, "target")
    matrix = target_stains * (target_strengths / source_strengths) @ np.linalg.pinv(source_stains)
    return _transform(np.eye(3), matrix, np.zeros(3))


def fit_reinhard(pixels: Tensor | np.ndarray, target: Tensor | np.ndarray) -> StainTransform:
    """Fit the map that gives a slide the means and standard deviations of another slide in l-alpha-beta.

    Args:
        pixels: RGB pixels of the slide to normalize, uint8 (..., 3). Background pixels are ignored.
        target: RGB pixels of the target slide, uint8 (..., 3). Background pixels are ignored.

    Raises:
        ValueError: `pixels` or `target` is not RGB in uint8, has no tissue, or `pixels` have a single color.
    """
    source, wanted = (
        np.log(np.exp(-_stained_densities(p, name)) @ LMS_OF_RGB.T) @ LAB_OF_LOG_LMS.T
        for p, name in ((pixels, "pixels"), (target, "target"))
    )
    spread = source.std(0)
    if spread.min() < 1e-6:
        raise ValueError("pixels vary along fewer than three axes of color, so they cannot be scaled")
    stretch = wanted.std(0) / spread
    back = np.linalg.inv(LAB_OF_LOG_LMS)
    offset = back @ (wanted.mean(0) - stretch * source.mean(0))
    return _transform(LMS_OF_RGB, back @ np.diag(stretch) @ LAB_OF_LOG_LMS, offset)


def stain_vectors(pixels: Tensor | np.ndarray, name: str = "pixels") -> tuple[np.ndarray, np.ndarray]:
    """Estimate the colors of hematoxylin and eosin from stained pixels (Macenko et al. 2009).

    The optical densities of two stains fill a wedge of a plane, whose edges are the stains. The plane is that
    of the two largest singular values; the edges are percentiles 1 and 99 of the angles in it.

    Args:
        pixels: RGB pixels, uint8 (..., 3).
        name: Name of the argument in error messages.

    Returns:
        The optical densities of both stains as unit columns, (3, 2), hematoxylin first (it absorbs more
        red), and the 99th percentile of the amount of each stain, (2,).

    Raises:
        ValueError: `pixels` is not RGB in uint8, has no tissue, or shows one stain only.
    """
    densities = _stained_densities(pixels, name)
    plane = np.linalg.eigh(densities.T @ densities)[1][:, :0:-1]
    plane *= np.sign(plane.sum(0)[0])
    along, across = (densities @ plane).T
    low, high = np.percentile(np.arctan2(across, along), [EXTREME_PERCENT, 100 - EXTREME_PERCENT])
    if high - low < MIN_ANGLE:
        raise ValueError(f"{name} shows one stain only, but an estimate needs two")
    stains = plane @ np.array([[np.cos(low), np.cos(high)], [np.sin(low), np.sin(high)]])
    stains = stains[:, np.argsort(-stains[0])]
    amounts = densities @ np.linalg.pinv(stains).T
    return stains, np.percentile(amounts, 100 - EXTREME_PERCENT, axis=0)


def _stained_densities(pixels: Tensor | np.ndarray, name: str) -> np.ndarray:
    """Return -log((x + 1) / 256) for the pixels that are not background, float64 (n, 3)."""
    pixels = pixels.cpu().numpy() if isinstance(pixels, Tensor) else np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.shape[-1:] != (3,):
        raise ValueError(f"{name} is {pixels.dtype} {pixels.shape}, expected uint8 (..., 3)")
    densities = -np.log((pixels.reshape(-1, 3) + 1.0) / 256)
    stained = densities[np.linalg.norm(densities, axis=1) > MIN_DENSITY]
    if len(stained) < MIN_PIXELS:
        raise ValueError(
            f"{name} has no tissue: {len(stained)} of {len(densities)} pixels are stained (optical density "
            f"above {MIN_DENSITY}), and an estimate needs {MIN_PIXELS}"
        )
    return stained


def _transform(space: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> StainTransform:
    rows = (tuple(map(tuple, values.tolist())) for values in (space, matrix, np.linalg.inv(space)))
    space_rows, matrix_rows, back_rows = rows
    return StainTransform(space_rows, matrix_rows, tuple(offset.tolist()), back_rows)
