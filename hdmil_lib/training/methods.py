"""The rows of the results tables: what each system trains, and which tiles it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Screen = Literal["lipn", "random", "published", "joint"]


@dataclass(frozen=True)
class Method:
    """One row of a results table.

    Attributes:
        title: As the tables print it.
        model: Name in `MODELS` of the network that it trains.
        options: Of `build_model`, beyond the recipe's.
        screen: Tiles that a trained DMIN gets to read: all (None); those that LIPN keeps at the calibrated
            thresholds ("lipn"); as many as these, drawn at random ("random"); those that LIPN keeps at
            gamma, each pooled by the branches that it was kept for, as in the paper ("published"); or those
            of a LIPN that went on learning together with DMIN ("joint").
        lipn: Options of `train_lipn`, of a method that trains one.
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

TABLE1_METHODS = tuple(name for name in METHODS if not name.startswith("dmin_"))
TABLE3_METHODS = ("dmin_linear", "dmin_no_distillation", "hdmil_dagger", "hdmil")
