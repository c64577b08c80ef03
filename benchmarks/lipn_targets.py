"""What should LIPN learn? Targets compared by what DMIN says of the tiles that each LIPN keeps.

    python benchmarks/lipn_targets.py

For each seed and fold of a synthetic cohort one DMIN is trained (or taken from the cache) and one LIPN per
variant. Each LIPN, DMIN's own attention, random tiles and the truth then rank the tiles of the *validation*
slides, and DMIN sees the best of them: AUC and tumor recall by keep ratio, mean and standard deviation over
seeds and folds, and the difference to random tiles with the same DMIN. Epochs are chosen on the same
validation slides, as in all trainings here, so levels are a little high for all variants alike.

It takes half an hour of one core. Results go to `benchmarks/results/lipn_targets.json`.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from hdmil_lib.bags import Bag
from hdmil_lib.batches import BagDataset
from hdmil_lib.cohort import Cohort
from hdmil_lib.config import setup
from hdmil_lib.models import HDMIL, LIPN
from hdmil_lib.reproduce.keep_ratio import (
    attention_scores,
    lipn_scores,
    score_rankings,
    tile_tumor_shares,
)
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.synthetic.cohorts import prepare_cohort
from hdmil_lib.training.crossval import cross_validate
from hdmil_lib.training.fit import TrainSettings
from hdmil_lib.training.lipn import fit_lipn

RESULTS = Path(__file__).resolve().parent / "results" / "lipn_targets.json"
FOLDS = 5
KEEP_RATIOS = (1.0, 0.6, 0.3, 0.1)
LIPN_TRAINING = TrainSettings(1e-3, epochs=12, min_epochs=12)
VARIANTS = {
    "masks, as published": {"target": "mask"},
    "evidence": {"target": "evidence"},
    "evidence, turned patches": {"target": "evidence", "augment": True},
}


def scores_of_seed(cohort: Cohort, name: str, bags: dict[str, Bag], seed: int) -> pd.DataFrame:
    """Scores of all rankings on the validation slides of every fold."""
    training = replace(LIPN_TRAINING, seed=seed)
    cv = cross_validate(
        cohort, ["hdmil_dagger"], folds=FOLDS, seed=seed, recipe=RECIPES[name], bags=bags, workers=1
    )
    data = BagDataset(bags, cohort.label_of)
    tables = []
    for fold, split in enumerate(tqdm(cv.splits, desc=f"seed {seed}, LIPN")):
        dmin = cv.classifier("hdmil_dagger", fold)
        rankings = {"DMIN attention": attention_scores(dmin, data, split.val)}
        for variant, options in VARIANTS.items():
            torch.manual_seed(seed)
            lipn = LIPN(len(cohort.classes))
            with tempfile.TemporaryDirectory() as out:
                fit_lipn(lipn, dmin, data, split, training, out=out, **options)
            rankings[variant] = lipn_scores(HDMIL(dmin, lipn), data, split.val)
        table = score_rankings(
            dmin,
            data,
            split.val,
            rankings,
            tile_tumor_shares(cohort, split.val),
            keep_ratios=KEEP_RATIOS,
            n_draws=8,
            generator=torch.Generator().manual_seed(seed),
        )
        tables.append(table.assign(seed=seed, fold=fold))
    return pd.concat(tables)


def summarize(scores: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """By source and ratio: mean and deviation over seeds and folds, and AUC beyond that of other sources."""
    keys = ["seed", "fold", "keep_ratio"]
    random = scores[scores["source"] == "random"].set_index(keys)["auc"]
    whole = random.xs(1.0, level="keep_ratio")
    scores = scores.join(random.rename("random"), on=keys).join(whole.rename("whole"), on=keys[:2])
    scores["auc_beyond_random"] = scores["auc"] - scores["random"]
    scores["auc_beyond_all_tiles"] = scores["auc"] - scores["whole"]
    columns = ["auc", "auc_beyond_random", "auc_beyond_all_tiles", "tumor_recall"]
    figures = scores.groupby(["source", "keep_ratio"], sort=False)[columns].agg(["mean", "std"]).round(4)
    figures.columns = ["_".join(column).replace("std", "sd") for column in figures.columns]
    return {
        source: {str(ratio): figures.loc[source, ratio].to_dict() for ratio in KEEP_RATIOS}
        for source in scores["source"].unique()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    minis = [name for name in RECIPES if name.endswith("-mini")]
    parser.add_argument("--cohorts", choices=minis, nargs="+", default=["camelyon-mini"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    setup()
    torch.set_num_threads(1)
    for name in arguments.cohorts:
        cohort = prepare_cohort(name)
        bags = cohort.load_bags()
        scores = pd.concat([scores_of_seed(cohort, name, bags, seed) for seed in range(arguments.seeds)])
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        results[name] = {
            "cohort": f"{name} (synthetic), {len(cohort)} bags",
            "part": "validation slides",
            "seeds": arguments.seeds,
            "folds": FOLDS,
            "lipn_training": asdict(LIPN_TRAINING),
            "sources": summarize(scores),
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        table = scores.pivot_table(index="source", columns="keep_ratio", values=["auc", "tumor_recall"])
        print(name, table.loc[scores["source"].unique()].round(3).to_string(), sep="\n")


if __name__ == "__main__":
    main()
