"""Training settings for the paper's three data sets, and for the synthetic cohorts modeled on them."""

from hdmil_lib.training.recipes import Recipe, published_recipe, small_recipe, tuned_recipe

RECIPES: dict[str, Recipe] = {
    "camelyon16": published_recipe(),
    "nsclc": published_recipe(degree=16, keep_ratio=0.7, learning_rate=3e-5, subtyping=True),
    "brca": published_recipe(keep_ratio=0.7, subtyping=True),
}
RECIPES |= {
    "camelyon-mini": small_recipe(RECIPES["camelyon16"]),
    "nsclc-mini": small_recipe(RECIPES["nsclc"]),
    "brca-mini": small_recipe(RECIPES["brca"]),
    "camelyon-pcam": tuned_recipe(RECIPES["camelyon16"]),
    "nsclc-lc25000": tuned_recipe(RECIPES["nsclc"]),
}
"""By cohort: the paper's "camelyon16", "nsclc" and "brca", drawn cohorts modeled on them, composed ones."""
