"""Whole-slide images: reading, tissue detection and tiling."""

from hdmil_lib.slides.reader import Level, Slide
from hdmil_lib.slides.tiling import TileGrid
from hdmil_lib.slides.tissue import TissueSettings, tissue_mask

__all__ = ["Level", "Slide", "TileGrid", "TissueSettings", "tissue_mask"]
