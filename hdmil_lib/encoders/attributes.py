"""What a bag says of how it was made, and whether an existing one was made as wanted."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hdmil_lib.bags import bag_info
from hdmil_lib.errors import BagError
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.slides.presets import describe
from hdmil_lib.slides.quality import ink_notes
from hdmil_lib.slides.reader import LEVEL_TOLERANCE
from hdmil_lib.slides.scale import IfUnknown

if TYPE_CHECKING:
    from hdmil_lib.encoders.loading import Encoder
    from hdmil_lib.slides.tiling import TileSettings
    from hdmil_lib.slides.tissue import TissueSettings


def wanted_decoder(encoder: "Encoder") -> str:
    """The decoder of an encoder; one of the user's own need not name any."""
    return getattr(encoder, "decoder", "cpu")


def settings_of(encoder: "Encoder", tissue: "TissueSettings", tiles: "TileSettings") -> dict[str, Any]:
    """Attributes that an existing bag must have, whatever its slide, to be skipped."""
    return {
        "encoder": encoder.name,
        "weights_hash": encoder.weights_hash,
        "decoder": wanted_decoder(encoder),
        "patch_size": tiles.size,
        "tile_mpp": tiles.mpp,
        "min_tissue": tissue.min_tissue,
        "tissue": describe(tissue),
    }


def given_scale(mpp: float | tuple[float, float] | None, source: str | None = None) -> dict[str, float]:
    """The attributes of a scale that overrides what files say.

    Args:
        mpp: The scale that is given.
        source: Where the scale of a bag came from: one in `IfUnknown` counts where the slide stated none.
    """
    if mpp is None or (isinstance(mpp, IfUnknown) and source != "given, unknown"):
        return {}
    return dict(zip(("mpp_x", "mpp_y"), map(float, np.broadcast_to(mpp, 2)), strict=True))


def geometry(slide: Slide, grid: TileGrid, tissue: "TissueSettings") -> dict[str, Any]:
    """TRIDENT's attributes of `coords`, with rounded magnifications, and the exact scale."""
    part = scanned_part(slide)
    known = {} if part is None else {"scanned_part": list(part)}
    return known | {
        "patch_size_level0": grid.tile_size_level0[0],
        "level0_magnification": round(10 / slide.mpp[0]),
        "target_magnification": round(10 / grid.mpp),
        "overlap": 0,
        "level0_width": slide.dimensions[0],
        "level0_height": slide.dimensions[1],
        "mpp_x": slide.mpp[0],
        "mpp_y": slide.mpp[1],
        "mpp_source": slide.scale.source,
        "mpp_note": "; ".join((*slide.scale.notes, *_enlarged(slide, grid), *ink_notes(grid, tissue))),
    }


def scanned_part(slide: Slide) -> tuple[int, int, int, int] | None:
    """The bounds of a slide, (x, y, width, height) in level-0 pixels; None if they are the whole slide."""
    return None if slide.bounds == (0, 0, *slide.dimensions) else slide.bounds


def _enlarged(slide: Slide, grid: TileGrid) -> list[str]:
    """What is to be said where tiles are finer than the slide."""
    factor = max(slide.mpp) / grid.mpp
    return (
        [f"tiles of {grid.mpp:g} um/px are enlarged {factor:.2f} times"] if factor > LEVEL_TOLERANCE else []
    )


def check_made_by(
    path: Path,
    wanted: dict[str, Any],
    looks: Sequence[int],
    scale: float | tuple[float, float] | None,
    source: str | None,
    max_broken: float,
) -> dict[str, Any]:
    """What a bag says of itself.

    Args:
        path: The bag.
        wanted: Attributes that it must have, from `settings_of`.
        looks: Sides of the looks that it must have.
        scale: The scale with which the slide would be opened.
        source: Fingerprint of the slide's file; None if it is not there.
        max_broken: Largest share of tiles that may have been unreadable.

    Raises:
        BagError: The bag was made otherwise, or of another file.
    """
    info = {"decoder": "cpu", "tissue": "default"} | bag_info(path)  # bags of version 0.2.0 do not say so
    for key, value in (wanted | given_scale(scale, info.get("mpp_source"))).items():
        if info.get(key) != value:
            raise BagError(
                f"{path}: already there, but made with {key} {info.get(key)!r} instead of {value!r}. Use "
                "another folder, or delete the bag to extract the slide again."
            )
    overrides = info.get("mpp_source") in ("given", "table")
    if overrides and (scale is None or isinstance(scale, IfUnknown)):
        raise BagError(
            f"{path}: already there, but made with a scale that was given, {info['mpp_x']:g} um/px. Give it "
            "again (--force-mpp, or the column mpp of a table), use another folder, or delete the bag to "
            "extract the slide again."
        )
    if missing := set(looks) - set(info["looks"]):
        raise BagError(
            f"{path}: already there, but without a look of {min(missing)} pixels. Use another folder, or "
            "delete the bag to extract the slide again."
        )
    if source is not None and info.get("source_fingerprint", source) != source:
        raise BagError(
            f"{path}: already there, but made of another file: the slide has changed since. Delete the bag "
            "to extract the slide again, or use another folder."
        )
    n_broken = int(info.get("n_broken", 0))
    if n_broken > max_broken * (info["n_tiles"] + n_broken):
        raise BagError(
            f"{path}: already there, but without {n_broken:,} tiles that could not be read. Allow that "
            "(--max-broken), or replace the slide and delete the bag."
        )
    return info
