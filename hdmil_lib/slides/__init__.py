"""Whole-slide images: reading, tissue detection and tiling."""

from hdmil_lib.slides.presets import PRESETS, TissuePreset, tissue_settings
from hdmil_lib.slides.reader import Level, Slide
from hdmil_lib.slides.tiling import TileGrid, TileSettings
from hdmil_lib.slides.tissue import TissueSettings, tissue_mask

__all__ = [
    "Level",
    "PRESETS",
    "Slide",
    "TileGrid",
    "TileSettings",
    "TissuePreset",
    "TissueSettings",
    "tissue_mask",
    "tissue_settings",
]
