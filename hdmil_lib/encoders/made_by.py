"""Whether a bag that is already there is the one that is wanted."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hdmil_lib.bags import bag_info
from hdmil_lib.errors import BagError
from hdmil_lib.slides.presets import describe
from hdmil_lib.slides.scale import IfUnknown

if TYPE_CHECKING:
    from hdmil_lib.encoders.loading import Encoder
    from hdmil_lib.slides.tissue import TissueSettings

TILE_SIZE, TILE_MPP = 256, 0.5


def settings(encoder: "Encoder", tissue: "TissueSettings") -> dict[str, Any]:
    """Attributes that an existing bag must have, whatever its slide, to be skipped."""
    return {
        "encoder": encoder.name,
        "weights_hash": encoder.weights_hash,
        "decoder": wanted_decoder(encoder),
        "patch_size": TILE_SIZE,
        "tile_mpp": TILE_MPP,
        "min_tissue": tissue.min_tissue,
        "tissue": describe(tissue),
    }


def wanted_decoder(encoder: "Encoder") -> str:
    """The decoder of an encoder; one of the user's own need not name any."""
    return getattr(encoder, "decoder", "cpu")


def _given_scale(mpp: float | tuple[float, float] | None) -> dict[str, float]:
    if mpp is None or isinstance(mpp, IfUnknown):
        return {}
    return dict(zip(("mpp_x", "mpp_y"), map(float, np.broadcast_to(mpp, 2)), strict=True))


def check_made_by(
    path: Path,
    wanted: dict[str, Any],
    looks: Sequence[int],
    scale: float | tuple[float, float] | None,
) -> dict[str, Any]:
    """What a bag says of itself, if it was made with the wanted settings.

    Args:
        path: The bag.
        wanted: Attributes from `settings`.
        looks: Sides in pixels of the looks that it must have.
        scale: Micrometers per level-0 pixel of its slide, as `Slide` takes it.

    Raises:
        BagError: The bag is damaged, or was made with other settings.
    """
    info = {"decoder": "cpu", "tissue": "default"} | bag_info(path)  # bags of version 0.2.0 do not say so
    for key, value in (wanted | _given_scale(scale)).items():
        if info.get(key) != value:
            raise BagError(
                f"{path}: already there, but made with {key} {info.get(key)!r} instead of {value!r}. Use "
                "another folder, or delete the bag to extract the slide again."
            )
    if info.get("mpp_source") == "given" and (scale is None or isinstance(scale, IfUnknown)):
        raise BagError(
            f"{path}: already there, but made with a scale that was given, {info['mpp_x']:g} um/px. Give it "
            "again (--force-mpp), use another folder, or delete the bag to extract the slide again."
        )
    if missing := set(looks) - set(info["looks"]):
        raise BagError(
            f"{path}: already there, but without a look of {min(missing)} pixels. Use another folder, or "
            "delete the bag to extract the slide again."
        )
    return info
