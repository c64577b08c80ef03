"""Synthetic slides that served for nothing else: five times as large as the cohort's, one of each case."""

from collections.abc import Mapping
from dataclasses import replace

from hdmil_lib.data import Cohort, load_bags, prepare_cohort
from hdmil_lib.features.bagstore import Bag
from hdmil_lib.slides.synthesis import PRESETS

COHORT, N_SLIDES, SEED = "camelyon-mini", 150, 20_000


def held_out_cohort() -> tuple[Cohort, Mapping[str, Bag]]:
    """Drawn and encoded in the cache: some 25 minutes, once."""
    preset = replace(PRESETS[COHORT], name=f"{COHORT}-large", tiles=(500, 700), paired=0.0)
    cohort = prepare_cohort(preset, n_slides=N_SLIDES, seed=SEED)
    return cohort, load_bags(cohort)
