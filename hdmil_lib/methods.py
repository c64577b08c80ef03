"""The systems that can be cross-validated: what each one trains, and which tiles it reads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hdmil_lib.errors import HDMILError, nearest

Screen = Literal["lipn", "random", "published", "joint"]


@dataclass(frozen=True)
class Method:
    """One row of a results table.

    Attributes:
        title: Name in tables and figures.
        model: Name in `MODELS` of the network that it trains.
        options: Settings of that network, beyond the recipe's.
        screen: Tiles that a trained DMIN gets to read: all (None); those that LIPN keeps at the thresholds
            chosen in training ("lipn"); as many as these, drawn at random ("random"); those that LIPN keeps at
            gamma, each pooled by the branches that it was kept for, as in the paper ("published"); or those
            of a LIPN that went on learning together with DMIN ("joint").
        lipn: Options of `fit_lipn`, for a method that trains a LIPN.
        dmin: Method whose DMIN it builds on, if it screens tiles.
        base: Method whose LIPN it builds on, if it screens tiles and trains none.
    """

    title: str
    model: str = "dmin"
    options: Mapping[str, Any] = field(default_factory=dict)
    screen: Screen | None = None
    lipn: Mapping[str, Any] = field(default_factory=dict)
    dmin: str = "hdmil_dagger"
    base: str = "hdmil"

    @property
    def needs(self) -> tuple[str, ...]:
        """Methods that must have been trained before."""
        if self.screen is None:
            return ()
        return (self.dmin,) if self.screen == "lipn" else (self.dmin, self.base)


METHODS: dict[str, Method] = {
    "max": Method("Max-Pooling", "max"),
    "mean": Method("Mean-Pooling", "mean"),
    "abmil": Method("ABMIL", "abmil", {"gated": False}),
    "abmil_gated": Method("ABMIL, gated", "abmil"),
    "clam_sb": Method("CLAM-SB", "clam_sb"),
    "clam_mb": Method("CLAM-MB", "clam_mb"),
    "dsmil": Method("DSMIL", "dsmil"),
    "transmil": Method("TransMIL", "transmil"),
    "dtfd_afs": Method("DTFD (AFS)", "dtfd_afs"),
    "dtfd_maxs": Method("DTFD (MAS)", "dtfd_maxs"),
    "dtfd_maxmins": Method("DTFD (MaxMinS)", "dtfd_maxmins"),
    "s4mil": Method("S4MIL", "s4mil"),
    "mambamil": Method("MambaMIL", "mambamil"),
    "smt": Method("SMT", "smt"),
    "hdmil_dagger": Method("HDMIL†"),
    "hdmil_dagger_published": Method(
        "HDMIL†, head as published", options={"degree": 12, "linear_start": False}
    ),
    "hdmil": Method("HDMIL", screen="lipn"),
    "hdmil_evidence": Method(
        "HDMIL, LIPN taught evidence", screen="lipn", lipn={"target": "evidence", "augment": True}
    ),
    "hdmil_published": Method("HDMIL, inference as published", screen="published"),
    "random": Method("Random tiles, as many as HDMIL", screen="random"),
    "ahdmil": Method("AHDMIL", screen="joint"),
    "dmin_linear": Method(
        "DMIN, linear heads, no self-distillation", options={"head": "linear", "self_distillation": False}
    ),
    "dmin_no_distillation": Method("DMIN, no self-distillation", options={"self_distillation": False}),
}


def title(method: str) -> str:
    """The name of a method of `METHODS` in tables and figures; another name as it is."""
    return METHODS[method].title if method in METHODS else method


def check_methods(names: Iterable[str]) -> None:
    """Hold names to `METHODS`.

    Raises:
        HDMILError: A name is unknown; the nearest known one is named.
    """
    for name in names:
        if name not in METHODS:
            hint = nearest(name, METHODS)
            raise HDMILError(f"there is no method {name!r}{hint}; choose from {', '.join(METHODS)}")
