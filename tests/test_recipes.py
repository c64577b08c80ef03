"""Recipes: what follows from a cohort's size, the width of its features, and what makes up the paper's."""

from dataclasses import fields

import pytest
from bag_factory import make_data
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.models import DMIN, HDMIL, LIPN, MODELS, create_model
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.training.fit import Classification, TrainSettings, make_optimizer, train_epoch
from hdmil_lib.training.joint import JointLearning
from hdmil_lib.training.lipn import LIPNLossWeights, Screening
from hdmil_lib.training.recipes import SMALL_COHORT, recipe_for

SIZES = (6, SMALL_COHORT - 1, SMALL_COHORT, 20_000)
WIDTHS = (1, 3, 64, 320, 1024, 2560)


def embed_dim(recipe, model):
    return recipe.models[model]["embed_dim"]


@settings(max_examples=200, deadline=None)
@given(n_slides=st.integers(1, 100_000), in_dim=st.integers(1, 10_000))
def test_widths_are_powers_of_two_between_the_features_and_the_published_width(n_slides, in_dim):
    recipe = recipe_for(n_slides, in_dim)
    width, largest = embed_dim(recipe, "dmin"), 256 if n_slides < SMALL_COHORT else 512
    assert 64 <= width <= largest
    assert width & (width - 1) == 0
    assert width <= max(in_dim, 64)
    assert width == largest or 2 * width > in_dim  # no power of two that fits is larger
    assert recipe.models["dmin"]["attention_dim"] == width // 2
    assert embed_dim(recipe, "abmil") == embed_dim(recipe, "clam_sb") == width


def test_small_and_large_cohorts_differ():
    small, large = recipe_for(SMALL_COHORT - 1, 1024), recipe_for(SMALL_COHORT, 1024)
    assert (small.training.batch_size, large.training.batch_size) == (4, 1)
    assert (small.training.epochs, large.training.epochs) == (40, 200)
    assert small.models["dmin"]["degree"] == 3
    assert small.models["dmin"]["linear_start"]
    assert large.models["dmin"]["degree"] == 12
    assert embed_dim(large, "dmin") == 512
    assert small.training.standardize
    assert large.training.standardize


@pytest.mark.parametrize("n_slides", SIZES)
@pytest.mark.parametrize("subtyping", [False, True])
def test_subtyping_reaches_all_clustering_losses(n_slides, subtyping):
    recipe = recipe_for(n_slides, 320, subtyping=subtyping)
    for name in ("dmin", "clam_sb", "clam_mb"):
        model = create_model(name, 320, 2, **recipe.models[name])
        found = model.settings.subtyping if name == "dmin" else model.subtyping
        assert found == (subtyping or n_slides < SMALL_COHORT)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("in_dim", WIDTHS)
@pytest.mark.parametrize("n_slides", SIZES)
def test_the_settings_make_models_that_train_a_step(n_slides, in_dim, name):
    recipe, data = recipe_for(n_slides, in_dim), make_data(4, n_tiles=6, dim=in_dim)
    model = create_model(name, in_dim, 2, **recipe.models.get(name, {}))
    train_a_step(Classification(model, data), data, recipe.training_of(name))


@pytest.mark.parametrize("n_slides", SIZES)
def test_the_settings_train_lipn_and_both_networks_together(n_slides):
    recipe, data = recipe_for(n_slides, 64), make_data(4, n_tiles=6, dim=64)
    dmin, lipn = create_model("dmin", 64, 2, **recipe.models["dmin"]), LIPN(2)
    screening = Screening(lipn, dmin, data, data.slide_ids, "mask", LIPNLossWeights(), augment=False)
    train_a_step(screening, data, recipe.lipn_training)
    joint = JointLearning(HDMIL(dmin, lipn), data, LIPNLossWeights())
    train_a_step(joint, data, recipe.joint_training)


def train_a_step(objective, data, settings):
    """A step of as many bags as the settings ask for changes weights and leaves all finite."""
    before = {name: p.detach().clone() for name, p in objective.learner.named_parameters()}
    optimizer = make_optimizer(objective.param_groups(), settings)
    row = train_epoch(objective, optimizer, data, data.slide_ids[: settings.batch_size], settings)
    assert row["train_loss"] < float("inf")
    parameters = dict(objective.learner.named_parameters())
    assert all(p.isfinite().all() for p in parameters.values())
    assert any(not p.equal(before[name]) for name, p in parameters.items())


@pytest.mark.parametrize("recipe", [*map(RECIPES.get, RECIPES), *(recipe_for(n, 320) for n in SIZES)])
def test_recipes_name_models_and_settings_that_exist(recipe):
    assert set(recipe.models) <= set(MODELS)
    assert set(recipe.trainings) <= set(MODELS)
    known = {field.name for field in fields(TrainSettings)}
    for name in MODELS:
        assert set(recipe.trainings.get(name, {})) <= known
        create_model(name, 32, 2, **recipe.models.get(name, {}))
        assert isinstance(recipe.training_of(name), TrainSettings)


def test_seeds_and_lengths_reach_all_trainings():
    recipe = recipe_for(100, 64)
    parts = ("training", "lipn_training", "joint_training")
    assert [getattr(recipe.seeded(7), part).seed for part in parts] == [7, 7, 7]
    short = recipe.shorter(2)
    assert [getattr(short, part).epochs for part in parts] == [2, 2, 2]
    assert all(getattr(short, part).min_epochs <= 2 for part in parts)
    assert short.training_of("dsmil").epochs == 2
    assert short.training_of("dsmil").betas == (0.5, 0.9)


def test_defaults_and_recipes_are_those_of_the_paper():
    settings = DMIN().settings
    assert (settings.in_dim, settings.embed_dim, settings.attention_dim, settings.k) == (1024, 512, 256, 32)
    assert (settings.dropout, settings.degree, settings.temperature) == (0.25, 12, 0.7)
    assert (settings.threshold, settings.keep_ratio, settings.subtyping) == (0.5, 0.6, False)
    table = {
        "camelyon16": (12, 0.6, 3e-4, False),
        "nsclc": (16, 0.7, 3e-5, True),
        "brca": (12, 0.7, 3e-4, True),
    }
    for name, expected in table.items():
        recipe, dmin = RECIPES[name], RECIPES[name].models["dmin"]
        found = (dmin["degree"], dmin["keep_ratio"], recipe.training.learning_rate, dmin["subtyping"])
        assert found == expected
        assert (recipe.training.weight_decay, recipe.training.batch_size) == (1e-5, 1)
        assert (recipe.training.epochs, recipe.training.min_epochs, recipe.training.patience) == (200, 50, 20)
        assert (recipe.lipn_training.learning_rate, recipe.lipn_training.patience) == (1e-4, 5)
