"""Settings of all networks of a cross-validation."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hdmil_lib.training.fit import TrainSettings
from hdmil_lib.training.joint import FINE_TUNING

CLAM, DTFD = ("clam_sb", "clam_mb"), ("dtfd_afs", "dtfd_maxs", "dtfd_maxmins")
SMALL_COHORT = 500
"""Number of slides from which `recipe_for` returns the published instead of the tuned recipe."""


@dataclass(frozen=True)
class Recipe:
    """Settings of all networks of a cross-validation.

    Attributes:
        training: Training settings of the bag classifiers.
        lipn_training: Training settings of LIPN.
        joint_training: Settings of the fine-tuning of DMIN and LIPN together (AHDMIL).
        models: Settings of bag classifiers, by their names in `MODELS`.
        trainings: Training settings that replace those of `training`, by the names of bag classifiers.
    """

    training: TrainSettings
    lipn_training: TrainSettings
    joint_training: TrainSettings
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trainings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def shorter(self, epochs: int) -> "Recipe":
        """The recipe with at most this many epochs in every training."""

        def cut(settings: TrainSettings) -> TrainSettings:
            return replace(settings, epochs=epochs, min_epochs=min(settings.min_epochs, epochs))

        return self._with(cut)

    def seeded(self, seed: int) -> "Recipe":
        """The recipe with this seed in every training."""
        return self._with(lambda settings: replace(settings, seed=seed))

    def balanced(self, balance: Literal["sampling", "loss"]) -> "Recipe":
        """The recipe with this way to balance classes in every training; see `TrainSettings`."""
        return self._with(lambda settings: replace(settings, balance=balance))

    def training_of(self, model: str) -> TrainSettings:
        """Training settings of a bag classifier."""
        return replace(self.training, **self.trainings.get(model, {}))

    def _with(self, change: Any) -> "Recipe":
        parts = ("training", "lipn_training", "joint_training")
        return replace(self, **{part: change(getattr(self, part)) for part in parts})


def published_recipe(
    *, degree: int = 12, keep_ratio: float = 0.6, learning_rate: float = 3e-4, subtyping: bool = False
) -> Recipe:
    """DMIN as in the paper (by default for Camelyon16), the others as in the code of their own papers.

    Args:
        degree: K, degree of DMIN's heads.
        keep_ratio: r, DMIN's target share of selected tiles.
        learning_rate: Learning rate of DMIN and of the pooling baselines.
        subtyping: Whether every class has tiles of its own; see `instance_clustering_loss`.
    """
    common = {"learning_rate": 1e-4}
    return Recipe(
        training=TrainSettings(learning_rate=learning_rate),
        lipn_training=TrainSettings(learning_rate=1e-4, min_epochs=0, patience=5),
        joint_training=FINE_TUNING,
        models={
            "dmin": {"degree": degree, "keep_ratio": keep_ratio, "subtyping": subtyping},
            **dict.fromkeys(CLAM, {"subtyping": subtyping}),
        },
        trainings={
            **dict.fromkeys(CLAM, common),
            "transmil": {"learning_rate": 2e-4, "optimizer": "lookahead_radam"},
            "s4mil": common,
            "mambamil": {"learning_rate": 2e-4},
            "dsmil": common | {"betas": (0.5, 0.9), "weight_decay": 1e-3},
            **dict.fromkeys(DTFD, common | {"weight_decay": 1e-4, "clip": 5.0, "drop_epoch": 100}),
        },
    )


def tuned_recipe(published: Recipe, *, embed_dim: int = 256) -> Recipe:
    """The small recipe with the settings that tuning on composed lymph nodes chose.

    ABMIL, CLAM-MB and DMIN had ten trials each (`tools/tune_composed.py`), and the same trial was the best of
    all three: a lower learning rate, half of the tiles left out in each step, more dropout and weight decay,
    and the tiles of highest attention of the other classes as examples of what a class is not.

    Args:
        published: Recipe for a large cohort.
        embed_dim: Width of the embeddings.
    """
    small = small_recipe(published, embed_dim=embed_dim)
    tuned = {name: {**small.models[name], "dropout": 0.5} for name in ("abmil", *CLAM, "dmin")}
    for name in (*CLAM, "dmin"):
        tuned[name] |= {"k": 8, "subtyping": True}
    training = replace(small.training, learning_rate=2e-4, weight_decay=1e-3, instance_dropout=0.5)
    return replace(small, training=training, models={**small.models, **tuned})


def small_recipe(published: Recipe, *, embed_dim: int = 256) -> Recipe:
    """The published recipe adapted to the synthetic cohorts of a few hundred drawn slides.

    It has narrower layers, several bags per step, heads of degree 3 that start linear (except in
    "hdmil_dagger_published"), and shorter trainings. Settings of the baselines that do not depend on the size
    of the cohort stay.

    Args:
        published: Recipe for a large cohort.
        embed_dim: Width of the embeddings.
    """
    training = TrainSettings(
        learning_rate=1e-3, epochs=40, min_epochs=15, patience=10, standardize=True, batch_size=4
    )
    small = {"embed_dim": embed_dim}
    attention = {**small, "attention_dim": embed_dim // 2}
    return Recipe(
        training=training,
        lipn_training=TrainSettings(learning_rate=1e-3, epochs=12, min_epochs=12),
        joint_training=replace(FINE_TUNING, batch_size=training.batch_size),
        models={
            **dict.fromkeys(("max", "mean", "abmil", "smt", *DTFD), small),
            **dict.fromkeys(CLAM, {**attention, **published.models["clam_sb"]}),
            **dict.fromkeys(("transmil", "s4mil", "mambamil"), {"embed_dim": embed_dim // 2}),
            "dmin": {**published.models["dmin"], **attention, "degree": 3, "linear_start": True, "k": 8},
        },
        trainings={
            "transmil": {"optimizer": "lookahead_radam"},
            "dsmil": {"betas": (0.5, 0.9), "weight_decay": 1e-3},
            **dict.fromkeys(DTFD, {"weight_decay": 1e-4, "clip": 5.0}),
        },
    )


def recipe_for(n_slides: int, in_dim: int, *, subtyping: bool = False) -> Recipe:
    """Recipe for a cohort, by its number of slides and the width of its features.

    Below `SMALL_COHORT` slides this is the tuned recipe, which was chosen on slides composed of real tiles.
    Otherwise it is the published recipe with standardized features, since encoders differ in the scale of
    their features. The width of the embeddings is the largest power of two up to that of the features, at
    least 64, and at most 256 in the tuned recipe and 512, the published width, in the other.

    Args:
        n_slides: Number of slides of the cohort.
        in_dim: Width of the features.
        subtyping: Whether every class has tiles of its own; False for tumor against normal. The tuned recipe
            treats all cohorts as if it were true.
    """
    published = published_recipe(subtyping=subtyping)
    if n_slides < SMALL_COHORT:
        return tuned_recipe(published, embed_dim=_width(in_dim, 256))
    width = {"embed_dim": _width(in_dim, 512)}
    attention = {**width, "attention_dim": width["embed_dim"] // 2}
    models: dict[str, Mapping[str, Any]] = {
        **dict.fromkeys(("max", "mean", "abmil", "smt", *DTFD, "transmil", "s4mil", "mambamil"), width),
        **{name: {**attention, **published.models["clam_sb"]} for name in CLAM},
        "dmin": {**published.models["dmin"], **attention},
    }
    training = replace(published.training, standardize=True)
    return replace(published, models=models, training=training)


def _width(in_dim: int, largest: int) -> int:
    """The largest power of two up to `in_dim`, clamped to 64 and `largest`."""
    return min(max(2 ** (in_dim.bit_length() - 1), 64), largest)
