"""Settings of tissue detection by kind of slide."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from hdmil_lib.errors import HDMILError, nearest
from hdmil_lib.slides.tissue import TissueSettings


@dataclass(frozen=True)
class TissuePreset:
    """Settings for one kind of slide.

    Attributes:
        name: Key in `PRESETS`, as in `hdmil extract --tissue`.
        purpose: The slides that it is for, and why its settings differ from the default ones.
        settings: The settings.
    """

    name: str
    purpose: str
    settings: TissueSettings


_CLEAN = TissueSettings(white_balance=True, exclude_ink=True)

PRESETS: Mapping[str, TissuePreset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            TissuePreset(
                "default",
                "H&E sections without pen marks; the masks of all earlier versions.",
                TissueSettings(),
            ),
            TissuePreset(
                "he",
                "H&E sections with pen marks or black borders, which are left out. The glass is made "
                "white, so that a threshold of 10 is safe. It rises to 24 at most: pale stroma beside dark "
                "epithelium has about 30.",
                replace(_CLEAN, min_saturation=10, max_saturation=24),
            ),
            TissuePreset(
                "faint",
                "Pale or bleached stains, whose saturation is 5 to 15. Below 5 the noise of the glass "
                "counts as tissue. Smears of stain beside the section are found too.",
                replace(_CLEAN, min_saturation=5, max_saturation=8),
            ),
            TissuePreset(
                "ihc",
                "DAB or another chromogen beside a pale counterstain, between which Otsu's threshold would "
                "lie; here it rises to 8 at most. Brown over blue is gray and found by its density from "
                "0.2 on, where 63 % of the light passes.",
                replace(_CLEAN, min_saturation=5, max_saturation=8, min_density=0.2),
            ),
            TissuePreset(
                "biopsy",
                "Needle and endoscopic biopsies and cell blocks. Pieces from 0.0025 mm2 (50 x 50 um) are "
                "kept, and tiles with a tenth of tissue, since a piece smaller than a tile lies on up to "
                "four. The median is 24 um wide, so that it does not erase thin strips.",
                replace(
                    _CLEAN,
                    min_saturation=8,
                    max_saturation=20,
                    median_um=24.0,
                    min_object_um2=2_500.0,
                    min_tissue=0.1,
                ),
            ),
            TissuePreset(
                "tma",
                "Tissue microarrays in H&E or IHC, with the thresholds of ihc. Pieces from 0.05 mm2 are "
                "kept, a sixth of a core of 0.6 mm, so that crumbs between the cores are not. Holes up to "
                "0.03 mm2 are filled, such as glands and fat.",
                replace(
                    _CLEAN,
                    min_saturation=5,
                    max_saturation=8,
                    min_density=0.2,
                    max_hole_um2=30_000.0,
                    min_object_um2=50_000.0,
                ),
            ),
        )
    }
)
"""All presets, the default one first. Bags record a preset by its name, so that its values never change:
another choice of values gets another name."""


def tissue_settings(preset: str | TissueSettings | None = None, **changes: Any) -> TissueSettings:
    """Settings of a preset with single ones changed.

    Args:
        preset: Name of a preset, or settings; None is the preset "default".
        **changes: New values of single settings; those that are None are not changed.

    Raises:
        HDMILError: There is no such preset, or a value is out of its range.
    """
    if preset is None or isinstance(preset, str):
        name = preset or "default"
        if name not in PRESETS:
            raise HDMILError(
                f"there is no tissue preset {name!r}{nearest(name, PRESETS)}; choose from "
                f"{', '.join(PRESETS)}"
            )
        preset = PRESETS[name].settings
    settings = replace(preset, **{name: value for name, value in changes.items() if value is not None})
    _check(settings)
    return settings


def describe(settings: TissueSettings) -> str:
    """Name of the preset that settings are, or their values that differ from "default", for a record.

    The smallest share of tissue in a tile is left out: bags record it by itself.
    """
    for preset in PRESETS.values():
        if replace(preset.settings, min_tissue=settings.min_tissue) == settings:
            return preset.name
    default = asdict(replace(TissueSettings(), min_tissue=settings.min_tissue))
    changed = {name: value for name, value in asdict(settings).items() if value != default[name]}
    return ", ".join(f"{name}={value:g}" for name, value in changed.items())


def described(text: str, min_tissue: float) -> TissueSettings:
    """The settings of which `describe` made this text.

    Raises:
        HDMILError: The text names no preset and no settings.
    """
    if text in PRESETS:
        return tissue_settings(text, min_tissue=min_tissue)
    kinds = {
        name: float if value is None else type(value) for name, value in asdict(TissueSettings()).items()
    }
    try:
        pairs = dict(part.split("=") for part in text.split(", "))
        changes = {name: kinds[name](float(value)) for name, value in pairs.items()}
    except (ValueError, KeyError):
        raise HDMILError(f"{text!r} describes no tissue settings; use one of {', '.join(PRESETS)}") from None
    return tissue_settings(None, min_tissue=min_tissue, **changes)


def _check(settings: TissueSettings) -> None:
    """Refuse values that no slide can have, by name."""
    for name in ("min_saturation", "max_saturation"):
        if not 0 <= getattr(settings, name) <= 255:
            raise HDMILError(f"{name} is {getattr(settings, name)}, expected 0 to 255")
    if settings.min_saturation > settings.max_saturation:
        raise HDMILError(
            f"min_saturation {settings.min_saturation} is above max_saturation {settings.max_saturation}; "
            "raise the latter or lower the former"
        )
    if not 0 <= settings.min_tissue <= 1:
        raise HDMILError(f"min_tissue is {settings.min_tissue:g}, expected a share of 0 to 1")
    for name in ("median_um", "closing_um", "max_hole_um2", "min_object_um2", "min_sharpness"):
        if not 0 <= getattr(settings, name) < float("inf"):
            raise HDMILError(f"{name} is {getattr(settings, name):g}, expected 0 or more")
