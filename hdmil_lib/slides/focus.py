"""How sharp a field of tissue is."""

import cv2
import numpy as np

SHARPNESS_MPP = 1.0
"""Scale in um/px at which `sharpness` is meant to be measured. A blur of 2 um, the width of chromatin grains,
shows there; at 0.5 um/px the noise of a camera counts too, at 2 um/px such a blur is hardly seen."""

BLURRED = 0.05
"""Sharpness below which a field at 1 um/px is out of focus. All tiles of a real slide in focus lie above
0.29, and below 0.05 when they are blurred with a Gaussian of 2 um. Of real lymph node tiles 99 % lie above
0.65, and more than half below 0.05 when blurred so."""

NOISE_VARIANCE = 50.0
"""Variance of the gray values that is added to that of a field. Rounding to whole values has a Laplacian of
variance 1.7, so that an empty field would be called sharp; stained tissue has several hundred."""


def sharpness(field: np.ndarray) -> float:
    """Variance of the Laplacian of the gray values over their variance.

    The quotient does not depend on how strongly a field is stained, and it is the mean of the squared spatial
    frequencies, weighted with their power.

    Args:
        field: RGB pixels at `SHARPNESS_MPP`, uint8 (H, W, 3).

    Returns:
        0 for a uniform field, 20 for white noise.
    """
    gray = cv2.cvtColor(field, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return float(cv2.Laplacian(gray, cv2.CV_32F).var() / (gray.var() + NOISE_VARIANCE))
