"""All ways to choose tiles, and baselines, on slides composed of real tiles; needs the tiles of a collection.

    python tools/compare_composed.py --tiles DIR ... [--seeds N] [--n-slides N] [--seed 2]

Slides are composed with another seed than those on which the form of the cascade was chosen
(`benchmarks/second_look.py`) and the settings of the systems (`tools/tune_composed.py`), and have an official
split whose parts share no tile. Every method is trained with several seeds on the same split; rules are
chosen on its validation slides. Writes `docs/results/composed/<cohort>.csv`, one row per method and seed, and
`.md` with means, and `<cohort>-localization.csv`: how well HDMIL† tells tumor tiles from others of a slide.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hdmil_lib.bags import Bag
from hdmil_lib.batches import BagDataset
from hdmil_lib.cohort import Cohort
from hdmil_lib.config import setup
from hdmil_lib.evaluation.metrics import auc
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.methods import title
from hdmil_lib.models import DMIN
from hdmil_lib.reproduce.field import field_rows
from hdmil_lib.reproduce.keep_ratio import (
    attention_scores,
    tile_evidence,
    tile_tumor_shares,
    within_slide_auc,
)
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.reproduce.tables import to_markdown
from hdmil_lib.storage import read_json, write_table
from hdmil_lib.synthetic.composed import collection_in, compose_cohort
from hdmil_lib.training.crossval import cross_validate
from hdmil_lib.training.trained import CrossValidation

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "composed"
RECIPE = {"camelyon": "camelyon-pcam", "nsclc": "nsclc-lc25000"}
"""Recipes by how a cohort is composed; tuned on slides of seeds 0 and 1 (`tools/tune_composed.py`)."""
SIDE = 64
METHODS = (
    "mean",
    "abmil_gated",
    "clam_mb",
    "hdmil_dagger",
    "hdmil_published",
    "hdmil",
    "hdmil_evidence",
    "hdmil_cascade_30",
    "hdmil_cascade",
    "random",
)
N_DRAWS = 8


def scores_of_seed(
    cv: CrossValidation, cohort: Cohort, recipe: str, bags: Mapping[str, Bag], seed: int
) -> pd.DataFrame:
    """One row per method: AUC and accuracy in percent, tiles read, labels other than those of all tiles."""
    labels = {method: _labels(cv, method) for method in METHODS}
    rows = []
    for method in METHODS:
        part = cv.predictions[cv.predictions["method"] == method].sort_values("slide_id")
        probabilities = part[[f"p_{c}" for c in range(len(cohort.classes))]].to_numpy()
        truth = part["label"].to_numpy()
        row = {
            "method": title(method),
            "seed": seed,
            "AUC": 100 * auc(truth, probabilities),
            "ACC": 100 * float((probabilities.argmax(1) == truth).mean()),
            "tiles read": 100 * float(part["keep_ratio"].mean()),
            "labels changed": 100 * float((labels[method] != labels["hdmil_dagger"]).mean()),
        }
        if method.startswith("hdmil_cascade"):
            row["screening"] = read_json(cv.folder / method / "fold0" / "config.json")["cascade"]["screening"]
        rows.append(row)
    rows += random_rows(cv, bags, cohort, seed)
    rows += rows_of_field(cv, bags, cohort, recipe, seed)
    return pd.DataFrame(rows)


def _labels(cv: CrossValidation, method: str) -> np.ndarray:
    part = cv.predictions[cv.predictions["method"] == method].sort_values("slide_id")
    return part.filter(regex=r"^p_\d+$").to_numpy().argmax(1)


def random_rows(cv: CrossValidation, bags: Mapping[str, Bag], cohort: Cohort, seed: int) -> list[dict]:
    """DMIN on random tiles, as many of each slide as each cascade reads, mean over draws."""
    dmin, test, rows = cv.classifier("hdmil_dagger", 0), sorted(cv.splits[0].test), []
    truth = np.array([cohort.label_of[slide_id] for slide_id in test])
    dagger = _labels(cv, "hdmil_dagger")
    for method in ("hdmil_cascade_30", "hdmil_cascade"):
        part = cv.predictions[cv.predictions["method"] == method].sort_values("slide_id")
        found = []
        for draw in range(N_DRAWS):
            generator, logits = torch.Generator().manual_seed(draw), []
            for slide_id, share in zip(test, part["keep_ratio"], strict=True):
                features = torch.from_numpy(bags[slide_id].features).float()
                rows_read = torch.randperm(len(features), generator=generator)[: round(share * len(features))]
                with torch.inference_mode():
                    logits.append(dmin(features[rows_read]).logits)
            probabilities = torch.cat(logits).softmax(1).numpy()
            label = probabilities.argmax(1)
            scores = auc(truth, probabilities), (label == truth).mean(), (label != dagger).mean()
            found.append([100 * float(score) for score in scores])
        means = dict(zip(("AUC", "ACC", "labels changed"), np.mean(found, 0).tolist(), strict=True))
        name = f"Random tiles, as many as {title(method)}"
        rows.append(
            {"method": name, "seed": seed, **means, "tiles read": 100 * float(part["keep_ratio"].mean())}
        )
    return rows


def rows_of_field(
    cv: CrossValidation, bags: Mapping[str, Bag], cohort: Cohort, recipe: str, seed: int
) -> list[dict]:
    """Fast methods of others; see `reproduce.field`."""
    split, settings, rows = cv.splits[0], RECIPES[recipe].seeded(seed), []
    dmin, test = cv.classifier("hdmil_dagger", 0), sorted(split.test)
    assert isinstance(dmin, DMIN)
    truth, dagger = np.array([cohort.label_of[slide_id] for slide_id in test]), _labels(cv, "hdmil_dagger")
    found = field_rows(
        dmin,
        bags,
        cohort.label_of,
        replace(split, test=tuple(test)),
        settings.training_of("abmil"),
        out=cv.folder / "field",
        side=SIDE,
        **{key: settings.models["abmil"][key] for key in ("embed_dim", "dropout")},
    )
    for row in found:
        probabilities = row.logits.softmax(1).numpy()
        label = probabilities.argmax(1)
        scores = {
            "AUC": auc(truth, probabilities),
            "ACC": float((label == truth).mean()),
            "tiles read": float(row.keep_ratio.mean()),
            "labels changed": float((label != dagger).mean()),
        }
        rows.append({"method": row.method, "seed": seed} | {key: 100 * v for key, v in scores.items()})
    return rows


def localization(cv: CrossValidation, data: BagDataset, cohort: Cohort, seed: int) -> dict:
    """Within-slide AUC of tumor tiles on the test slides, by HDMIL†'s attention and by its tiles alone."""
    dmin, test = cv.classifier("hdmil_dagger", 0), cv.splits[0].test
    assert isinstance(dmin, DMIN)
    share, segments = tile_tumor_shares(cohort, test), Segments([data.length(s) for s in test])
    assert share is not None
    ways = {
        "attention": attention_scores(dmin, data, test),
        "tiles alone": tile_evidence(dmin, data, test),
    }
    found = {name: 100 * within_slide_auc(scores, share, segments).mean() for name, scores in ways.items()}
    return {"seed": seed} | found


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds, and the mean difference of AUC to HDMIL† with its error."""
    dagger = scores[scores["method"] == title("hdmil_dagger")].set_index("seed")["AUC"]
    rows = {}
    for name, part in scores.groupby("method", sort=False):
        behind = part.set_index("seed")["AUC"] - dagger
        rows[name] = {
            "AUC": f"{part['AUC'].mean():.1f} ({part['AUC'].std():.1f})",
            "AUC against HDMIL†": f"{behind.mean():+.1f} ± {behind.std() / np.sqrt(len(behind)):.1f}",
            "ACC": f"{part['ACC'].mean():.1f} ({part['ACC'].std():.1f})",
            "tiles read, %": round(part["tiles read"].mean(), 1),
            "labels changed, %": round(part["labels changed"].mean(), 1),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=Path, required=True, nargs="+", help="folders of labeled tiles")
    parser.add_argument("--seeds", type=int, help="number of training seeds: 5, or 3 for lung")
    parser.add_argument("--n-slides", type=int, help="number of slides: 480, or 300 for lung")
    parser.add_argument("--seed", type=int, default=2, help="seed of the slides")
    given = parser.parse_args()
    setup()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for tiles in given.tiles:
        preset = collection_in(tiles)
        lung = preset.name.startswith("nsclc")
        n_slides, n_seeds = given.n_slides or (300 if lung else 480), given.seeds or (3 if lung else 5)
        cohort = compose_cohort(tiles, n_slides=n_slides, seed=given.seed, looks=[SIDE])
        bags, recipe = cohort.load_bags(), RECIPE["camelyon" if "camelyon" in preset.name else "nsclc"]
        data, tables, places = BagDataset(bags, cohort.label_of), [], []
        for seed in range(n_seeds):
            cv = cross_validate(cohort, METHODS, recipe=RECIPES[recipe], seed=seed, bags=bags)
            tables.append(scores_of_seed(cv, cohort, recipe, bags, seed))
            places.append(localization(cv, data, cohort, seed))
        scores = pd.concat(tables)
        write_table(RESULTS / f"{preset.name}.csv", scores.round(3))
        write_table(RESULTS / f"{preset.name}-localization.csv", pd.DataFrame(places).round(2))
        text = to_markdown(summary(scores))
        (RESULTS / f"{preset.name}.md").write_text(text, encoding="utf-8")
        print(preset.name, text, sep="\n")


if __name__ == "__main__":
    main()
