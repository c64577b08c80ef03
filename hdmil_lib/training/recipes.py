"""Settings of all networks on one cohort: the paper's, and those of the synthetic cohorts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hdmil_lib.models import PAPER_PRESETS, PaperPreset
from hdmil_lib.training.joint import FINE_TUNING
from hdmil_lib.training.trainer import (
    MINI_LIPN_TRAINING,
    MINI_TRAINING,
    PAPER_LIPN_TRAINING,
    PAPER_TRAINING,
    TrainSettings,
)

CLAM, DTFD = ("clam_sb", "clam_mb"), ("dtfd_afs", "dtfd_maxs", "dtfd_maxmins")


@dataclass(frozen=True)
class Recipe:
    """Settings of all networks on one cohort.

    Attributes:
        training: Of the bag classifiers.
        lipn_training: Of LIPN.
        joint_training: Of DMIN and LIPN together (AHDMIL).
        models: Options of a bag classifier by its name in `MODELS`.
        trainings: What a bag classifier's training has different from `training`, by the same name.
        loss: Options of `dmin_loss`.
    """

    training: TrainSettings
    lipn_training: TrainSettings
    joint_training: TrainSettings
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trainings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)

    def shorter(self, epochs: int) -> "Recipe":
        """The same with at most so many epochs of every network."""

        def cut(settings: TrainSettings) -> TrainSettings:
            return replace(settings, epochs=epochs, min_epochs=min(settings.min_epochs, epochs))

        parts = ("training", "lipn_training", "joint_training")
        return replace(self, **{part: cut(getattr(self, part)) for part in parts})

    def seeded(self, seed: int) -> "Recipe":
        """The same with this seed in every training."""
        parts = ("training", "lipn_training", "joint_training")
        return replace(self, **{part: replace(getattr(self, part), seed=seed) for part in parts})

    def training_of(self, model: str) -> TrainSettings:
        """How a bag classifier is trained."""
        return replace(self.training, **self.trainings.get(model, {}))


def _paper(preset: PaperPreset) -> Recipe:
    """DMIN as in the paper, the others as in their own papers' code."""
    common = {"learning_rate": 1e-4}
    return Recipe(
        training=replace(PAPER_TRAINING, learning_rate=preset.learning_rate),
        lipn_training=PAPER_LIPN_TRAINING,
        joint_training=FINE_TUNING,
        models={
            "dmin": {"degree": preset.settings.degree, "keep_ratio": preset.settings.keep_ratio},
            **dict.fromkeys(CLAM, {"subtyping": preset.subtyping}),
        },
        trainings={
            **dict.fromkeys(CLAM, common),
            "transmil": {"learning_rate": 2e-4, "optimizer": "lookahead_radam"},
            "s4mil": common,
            "mambamil": {"learning_rate": 2e-4},
            "dsmil": common | {"betas": (0.5, 0.9), "weight_decay": 1e-3},
            **dict.fromkeys(DTFD, common | {"weight_decay": 1e-4, "clip": 5.0, "drop_epoch": 100}),
        },
        loss={"subtyping": preset.subtyping},
    )


def _mini(paper: Recipe) -> Recipe:
    """The paper's recipe cut down to a synthetic cohort of some 200 bags of some 120 tiles.

    Smaller layers, several bags a step, and heads of degree 3 that start linear; "hdmil_dagger_published"
    has the paper's head. Of the baselines' own settings those stay that do not depend on the size.
    """
    small = {"embed_dim": 256}
    return Recipe(
        training=MINI_TRAINING,
        lipn_training=MINI_LIPN_TRAINING,
        joint_training=replace(FINE_TUNING, batch_size=MINI_TRAINING.batch_size),
        models={
            **dict.fromkeys(("max", "mean", "abmil", "smt", *DTFD), small),
            **dict.fromkeys(CLAM, {**small, "attention_dim": 128, **paper.models["clam_sb"]}),
            **dict.fromkeys(("transmil", "s4mil", "mambamil"), {"embed_dim": 128}),
            "dmin": paper.models["dmin"] | {**small, "attention_dim": 128, "degree": 3, "linear_start": True},
        },
        trainings={
            "transmil": {"optimizer": "lookahead_radam"},
            "dsmil": {"betas": (0.5, 0.9), "weight_decay": 1e-3},
            **dict.fromkeys(DTFD, {"weight_decay": 1e-4, "clip": 5.0}),
        },
        loss={**paper.loss, "k": 8},
    )


RECIPES: dict[str, Recipe] = {name: _paper(preset) for name, preset in PAPER_PRESETS.items()}
RECIPES |= {
    "camelyon-mini": _mini(RECIPES["camelyon16"]),
    "nsclc-mini": _mini(RECIPES["nsclc"]),
    "brca-mini": _mini(RECIPES["brca"]),
}
"""By cohort: the paper's "camelyon16", "nsclc" and "brca", and the synthetic ones after them."""
