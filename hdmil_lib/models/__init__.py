"""Bag classifiers and the pre-screening network; one short file a model."""

from collections.abc import Callable
from functools import partial
from typing import Any

from hdmil_lib.errors import HDMILError
from hdmil_lib.models.abmil import ABMIL
from hdmil_lib.models.base import MILModel, MILOutput
from hdmil_lib.models.clam import CLAM
from hdmil_lib.models.dmin import DMIN, PAPER_PRESETS, DMINOutput, DMINSettings, PaperPreset
from hdmil_lib.models.dsmil import DSMIL
from hdmil_lib.models.dtfd import DTFD
from hdmil_lib.models.kan import ChebyshevKAN
from hdmil_lib.models.lipn import LIPN
from hdmil_lib.models.mambamil import MambaMIL
from hdmil_lib.models.max_pooling import MaxPooling
from hdmil_lib.models.mean_pooling import MeanPooling
from hdmil_lib.models.s4mil import S4MIL
from hdmil_lib.models.smt import SMT
from hdmil_lib.models.transmil import TransMIL

__all__ = [
    "ABMIL",
    "CLAM",
    "DMIN",
    "DSMIL",
    "DTFD",
    "LIPN",
    "MODELS",
    "PAPER_PRESETS",
    "S4MIL",
    "SMT",
    "ChebyshevKAN",
    "DMINOutput",
    "DMINSettings",
    "MILModel",
    "MILOutput",
    "MambaMIL",
    "MaxPooling",
    "MeanPooling",
    "PaperPreset",
    "TransMIL",
    "build_model",
]


def _dmin(in_dim: int, n_classes: int, **settings: Any) -> DMIN:
    return DMIN(DMINSettings(in_dim=in_dim, n_classes=n_classes, **settings))


MODELS: dict[str, Callable[..., MILModel]] = {
    "mean": MeanPooling,
    "max": MaxPooling,
    "abmil": ABMIL,
    "clam_sb": CLAM,
    "clam_mb": partial(CLAM, multi_branch=True),
    "dsmil": DSMIL,
    "dtfd_afs": partial(DTFD, distill="afs"),
    "dtfd_maxs": partial(DTFD, distill="maxs"),
    "dtfd_maxmins": partial(DTFD, distill="maxmins"),
    "transmil": TransMIL,
    "s4mil": S4MIL,
    "mambamil": MambaMIL,
    "smt": SMT,
    "dmin": _dmin,
}


def build_model(name: str, in_dim: int, n_classes: int, **settings: Any) -> MILModel:
    """Make a bag classifier by its name in `MODELS`.

    Args:
        name: A key of `MODELS`.
        in_dim: Width of the features.
        n_classes: Number of classes.
        **settings: Keyword arguments of the model, or fields of `DMINSettings`.

    Raises:
        HDMILError: If no model has this name.
    """
    if name not in MODELS:
        raise HDMILError(f"there is no model {name!r}; choose one of {', '.join(MODELS)}")
    return MODELS[name](in_dim, n_classes, **settings)
