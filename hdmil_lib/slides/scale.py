"""How large the pixels of a slide are: what its file says, if that is credible, and who else is asked."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import openslide

PLAUSIBLE_MPP = (0.08, 1.1)
"""Scales that a file may state, in um/px: those at which microscopes scan. Others are units that were mixed
up, defaults of image writers (72 dpi is 353 um/px), or scans that show no nuclei."""

GIVEN_MPP = (0.01, 20.0)
"""Scales that a caller may give, in um/px; larger ones are nanometers."""

CONTRADICTION = 1.5
"""Factor between scale and objective power from which they contradict each other."""

UM_PER_RESOLUTION_UNIT = {"centimeter": 10_000.0, "inch": 25_400.0, "micron": 1.0}
"""Units of the resolution of TIFF files; the last is that of ImageJ."""

RESOLUTIONS = {"tiff": "TIFF resolution", "png": "PNG resolution", "jpeg": "JPEG resolution"}
"""Sources that state pixels per unit, by the first part of their properties' names."""

UM_PER_OME_UNIT = {
    **{"m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "pm": 1e-6},
    **{"Å": 1e-4, "in": 25_400.0, "thou": 25.4, "mil": 25.4},
}
"""Units of length in OME-XML; both letters that look like a mu are written."""


class IfUnknown(float):
    """A scale in um/px for slides that do not state a credible one: `Slide(path, mpp=IfUnknown(0.25))`."""


class FromTable(float):
    """A scale in um/px that the column `mpp` of a table states, whatever the file says."""


class Scale(NamedTuple):
    """Micrometers per level-0 pixel of a slide.

    Attributes:
        mpp: (x, y).
        source: Who said so: "given", "table", "properties", "OME physical size", "TIFF resolution",
            "PNG resolution", "JPEG resolution", "objective power" or "given, unknown".
        notes: What is odd about it, in words.
    """

    mpp: tuple[float, float]
    source: str
    notes: tuple[str, ...] = ()


def scale_of(properties: Mapping[str, str], mpp: float | tuple[float, float] | None = None) -> Scale:
    """The scale of a slide.

    The order is: what the caller gives, the properties of the scanner, the physical size in OME-XML, the
    resolution of the TIFF, PNG or JPEG file, the power of the objective (10 / power), and a scale that the
    caller gives as `IfUnknown`.

    Args:
        properties: Properties of the slide, by OpenSlide's names, or as `ome` and `raster` name them.
        mpp: Scale that is given, one number or (x, y); see `IfUnknown` and `FromTable`.

    Raises:
        ValueError: The scale that is given is out of bounds, or no source states a credible one. The message
            lists what was found.
    """
    if mpp is not None and not isinstance(mpp, IfUnknown):
        return Scale(_given(mpp), "table" if isinstance(mpp, FromTable) else "given")
    stated = _stated(properties)
    low, high = PLAUSIBLE_MPP
    notes = [
        f"{source} say{'' if source == 'properties' else 's'} {_text(pair)} um/px, which is not credible"
        for source, pair in stated.items()
        if not all(low <= m <= high for m in pair)
    ]
    credible = {source: pair for source, pair in stated.items() if all(low <= m <= high for m in pair)}
    for source, pair in credible.items():
        nominal = stated.get("objective power")
        if nominal and source != "objective power":
            ratio = max(pair[0] / nominal[0], nominal[0] / pair[0])
            if ratio > CONTRADICTION:
                notes.append(
                    f"{source}: {_text(pair)} um/px, while the objective power says {_text(nominal)}"
                )
        return Scale(pair, source, tuple(notes))
    if mpp is not None:
        return Scale(_given(float(mpp)), "given, unknown", tuple(notes))
    found = "; ".join(notes) or "nothing"
    raise ValueError(
        f"the file does not say how large its pixels are (found: {found}); pass mpp= (--mpp, or "
        "--force-mpp to override what files say), in um per level-0 pixel."
    )


def _given(mpp: float | tuple[float, float]) -> tuple[float, float]:
    x, y = np.broadcast_to(np.asarray(mpp, float), 2).tolist()
    low, high = GIVEN_MPP
    if not all(math.isfinite(m) and low <= m <= high for m in (x, y)):
        raise ValueError(f"mpp must be positive, {low:g} to {high:g} micrometers per pixel, got {mpp}.")
    return x, y


def _stated(properties: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """What the file states, by source; values that are no positive numbers are left out."""

    def number(key: str) -> float:
        try:
            return float(properties.get(key, "nan"))
        except ValueError:
            return math.nan

    def physical(axis: str) -> float:
        unit = UM_PER_OME_UNIT.get(properties.get(f"ome.PhysicalSize{axis}Unit", ""), math.nan)
        return number(f"ome.PhysicalSize{axis}") * unit

    def resolution(kind: str) -> tuple[float, float]:
        unit = UM_PER_RESOLUTION_UNIT.get(properties.get(f"{kind}.ResolutionUnit", "").lower(), math.nan)
        x, y = number(f"{kind}.XResolution"), number(f"{kind}.YResolution")
        return (unit / x, unit / y) if min(x, y) > 0 else (math.nan, math.nan)

    power = number(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    nominal = 10.0 / power if power > 0 else math.nan
    found = {
        "properties": (number(openslide.PROPERTY_NAME_MPP_X), number(openslide.PROPERTY_NAME_MPP_Y)),
        "OME physical size": (physical("X"), physical("Y")),
        **{source: resolution(kind) for kind, source in RESOLUTIONS.items()},
        "objective power": (nominal, nominal),
    }
    return {source: pair for source, pair in found.items() if all(math.isfinite(m) and m > 0 for m in pair)}


def _text(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.4g}" if math.isclose(*pair, rel_tol=1e-3) else f"{pair[0]:.4g} x {pair[1]:.4g}"
