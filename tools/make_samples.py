"""Make `data_samples/`: a small cohort of bags and a trained model, for `HDMIL_FAST=1` and first looks.

    python tools/make_samples.py

The bags are a part of the full synthetic cohort, which is prepared in the cache first: small tumor slides,
and normal slides of the same sizes, whole. They are copied with their tile labels and compressed. The model
is HDMIL of the best fold of the full cohort's cross-validation, which `make tutorial` leaves in the cache.
"""

import shutil
from pathlib import Path

from hdmil_lib.bags import bag_info, read_bag, read_tile_labels, write_bag
from hdmil_lib.cohort import Cohort
from hdmil_lib.reproduce.recipes import RECIPES
from hdmil_lib.synthetic.cohorts import DEFAULT_ENCODER, SAMPLES, prepare_cohort
from hdmil_lib.training.crossval import cross_validate

NAME = "camelyon-mini"
N_SLIDES = 100
MIN_TUMOR_TILES = 4
N_FOLDS = 5  # of the cross-validation in `make tutorial`
LIMIT_MB = 18

README = """# Sample bags and model

`{name}` holds bags of {n} synthetic slides ({classes}; {tiles:,} tiles, {size:.1f} MB): drawn by
`hdmil_lib.synthetic.histology`, encoded with `{encoder}`, no patient's data. `{name}/model` is
HDMIL, trained on the full cohort. All is under the license of this repository. They let
`HDMIL_FAST=1` start without drawing slides or training. `make samples` makes them: of the full
cohort, the smallest tumor slides with {least} tumor tiles or more, and normal slides of the same
sizes; of the cross-validation, the fold of lowest validation loss.
"""


def choose(cohort: Cohort) -> list[str]:
    """Tumor slides with few tiles, and normal slides of the same sizes, in the cohort's order.

    Tumor slides count with `MIN_TUMOR_TILES` tumor tiles or more: of a hundred slides with smaller tumors no
    system learns anything, and a first run would show nothing. Each gets the normal slide whose number of
    tiles is nearest, so that the size of a slide says nothing about its class.
    """
    tiles, tumor = {}, {}
    for slide_id in cohort.slide_ids:
        tiles[slide_id] = bag_info(cohort.bag_path(slide_id))["n_tiles"]
        share = read_tile_labels(cohort.bag_path(slide_id))
        tumor[slide_id] = 0 if share is None else int((share >= 0.5).sum())
    table = cohort.table.set_index("slide_id").assign(tiles=tiles, tumor=tumor)
    normal, positive = (table[table["label"] == name] for name in cohort.classes)
    chosen = positive.loc[positive["tumor"] >= MIN_TUMOR_TILES, "tiles"].nsmallest(N_SLIDES // 2)
    left, partners = normal["tiles"].copy(), []
    for size in chosen:
        partners.append((left - size).abs().idxmin())
        left = left.drop(partners[-1])
    return [slide_id for slide_id in cohort.slide_ids if slide_id in {*chosen.index, *partners}]


def copy_bags(full: Cohort, folder: Path) -> None:
    """The chosen bags and their labels."""
    part = full.select(choose(full))
    for slide_id in part.slide_ids:
        source, target = part.bag_path(slide_id), folder / "bags" / f"{slide_id}.h5"
        write_bag(target, read_bag(source), read_tile_labels(source), compress=True)
    part.table.drop(columns="path").to_csv(folder / "cohort.csv", index=False)


def save_model(full: Cohort, folder: Path) -> None:
    """The networks of the best fold."""
    cv = cross_validate(full, ["hdmil"], folds=N_FOLDS, seed=0, recipe=RECIPES[NAME])
    cv.hdmil(cv.best_fold()).save_pretrained(folder)


def main() -> None:
    full, folder = prepare_cohort(NAME), SAMPLES / NAME
    shutil.rmtree(folder, ignore_errors=True)
    copy_bags(full, folder)
    save_model(full, folder / "model")
    shipped = prepare_cohort(NAME, fast=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    text = README.format(
        name=NAME,
        n=len(shipped),
        classes=", ".join(f"{n} {label}" for label, n in shipped.table["label"].value_counts().items()),
        tiles=sum(bag_info(shipped.bag_path(s))["n_tiles"] for s in shipped.slide_ids),
        size=size,
        encoder=DEFAULT_ENCODER,
        least=MIN_TUMOR_TILES,
    )
    (SAMPLES / "README.md").write_text(text)
    print(text)
    if size > LIMIT_MB:
        raise SystemExit(f"{folder} holds {size:.1f} MB, more than {LIMIT_MB}: lower N_SLIDES")


if __name__ == "__main__":
    main()
