"""Methods that can be cross-validated: the networks that they train and the tiles that they read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hdmil_lib.errors import HDMILError, nearest

Screen = Literal["lipn", "random", "published", "joint", "cascade"]


@dataclass(frozen=True)
class Method:
    """A method of `METHODS`.

    Attributes:
        title: Name in tables and figures.
        model: Name in `MODELS` of the bag classifier, for a method that reads all tiles.
        options: Settings of the bag classifier in addition to those of the recipe.
        screen: Tiles that a trained DMIN reads. None: all tiles. "lipn": the tiles that LIPN keeps at the
            thresholds chosen in training. "random": the same number of random tiles. "published": the tiles
            that LIPN keeps at gamma, pooled by the branches that they were kept for, as in the paper.
            "joint": as "lipn", with DMIN and LIPN fine-tuned together. "cascade": those that LIPN and a
            second look keep, or random tiles where these are as good on validation slides.
        lipn: Options of `fit_lipn`, for a method that trains a LIPN.
        cascade: `CascadeSettings`, for a method that trains a second look.
        dmin: Method whose DMIN is used, for a method that screens tiles.
        base: Method whose LIPN is used, for a method that screens tiles and trains no LIPN.
    """

    title: str
    model: str = "dmin"
    options: Mapping[str, Any] = field(default_factory=dict)
    screen: Screen | None = None
    lipn: Mapping[str, Any] = field(default_factory=dict)
    cascade: Mapping[str, Any] = field(default_factory=dict)
    dmin: str = "hdmil_dagger"
    base: str = "hdmil"

    @property
    def needs(self) -> tuple[str, ...]:
        """Methods that must be trained before this one."""
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
    "hdmil_cascade_30": Method(
        "HDMIL, cascade, 30 %", screen="cascade", base="hdmil_evidence", cascade={"keep_ratio": 0.3}
    ),
    "hdmil_cascade": Method("HDMIL, cascade, 10 %", screen="cascade", base="hdmil_evidence"),
    "hdmil_published": Method("HDMIL, inference as published", screen="published"),
    "random": Method("Random tiles, as many as HDMIL", screen="random"),
    "ahdmil": Method("AHDMIL", screen="joint"),
    "dmin_linear": Method(
        "DMIN, linear heads, no self-distillation", options={"head": "linear", "self_distillation": False}
    ),
    "dmin_no_distillation": Method("DMIN, no self-distillation", options={"self_distillation": False}),
}


def title(method: str) -> str:
    """Title of a method in tables and figures; a name that is not in `METHODS` is its own title."""
    return METHODS[method].title if method in METHODS else method


def check_methods(names: Iterable[str]) -> None:
    """Check that all names are in `METHODS`.

    Raises:
        HDMILError: A name is unknown.
    """
    for name in names:
        if name not in METHODS:
            hint = nearest(name, METHODS)
            raise HDMILError(f"there is no method {name!r}{hint}; choose from {', '.join(METHODS)}")
