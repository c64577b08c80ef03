"""Bag classifiers, the pre-screening network LIPN, and HDMIL, which joins DMIN and LIPN."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from hdmil_lib.errors import HDMILError, nearest
from hdmil_lib.models.abmil import ABMIL
from hdmil_lib.models.base import LossTerms, MILModel, MILOutput
from hdmil_lib.models.clam import CLAM
from hdmil_lib.models.dmin import DMIN, DMINOutput, DMINSettings, LossWeights
from hdmil_lib.models.dsmil import DSMIL
from hdmil_lib.models.dtfd import DTFD
from hdmil_lib.models.hdmil import HDMIL, HDMILOutput
from hdmil_lib.models.info import ModelInfo
from hdmil_lib.models.kan import ChebyshevKAN
from hdmil_lib.models.lipn import LIPN
from hdmil_lib.models.look import LookSettings, SecondLook
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
    "HDMIL",
    "LIPN",
    "MODELS",
    "S4MIL",
    "SMT",
    "ChebyshevKAN",
    "DMINOutput",
    "DMINSettings",
    "HDMILOutput",
    "LossTerms",
    "LookSettings",
    "LossWeights",
    "MILModel",
    "MILOutput",
    "MambaMIL",
    "MaxPooling",
    "MeanPooling",
    "ModelInfo",
    "SecondLook",
    "TransMIL",
    "create_model",
]


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
    "dmin": DMIN,
}


def create_model(name: str, in_dim: int, n_classes: int, **settings: Any) -> MILModel:
    """Create a bag classifier.

    Args:
        name: A key of `MODELS`.
        in_dim: Width of the features.
        n_classes: Number of classes.
        **settings: Keyword arguments of the model's constructor.

    Raises:
        HDMILError: There is no model of this name, or it has no such setting.
        ValueError: A setting is out of bounds.
    """
    if name not in MODELS:
        raise HDMILError(
            f"there is no model {name!r}{nearest(name, MODELS)}; choose one of {', '.join(MODELS)}"
        )
    known = [key for key in signature(MODELS[name]).parameters if key not in ("in_dim", "n_classes")]
    for key in settings:
        if key not in known:
            raise HDMILError(f"{name} has no setting {key!r}{nearest(key, known)}; it has {', '.join(known)}")
    return MODELS[name](in_dim, n_classes, **settings)
