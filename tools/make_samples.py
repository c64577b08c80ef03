"""Make `data_samples/`: small cohorts of bags, so that `HDMIL_FAST=1` starts without drawing slides.

    python tools/make_samples.py [camelyon-mini ...]

Each is a part of the full synthetic cohort, which is prepared in the cache first: of every class, the
slides with the fewest tiles, whole. Bags are copied with their tile labels and compressed.
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd

from hdmil_lib.data import DEFAULT_ENCODER, SAMPLES, Cohort, prepare_cohort
from hdmil_lib.features.bagstore import bag_info, read_bag, read_tile_labels, write_bag
from hdmil_lib.slides.synthesis import PRESETS

N_SLIDES = {"camelyon-mini": 60, "nsclc-mini": 30, "brca-mini": 30}
LIMIT_MB = 16

README = f"""# Sample bags

Bags of synthetic slides: drawn by `hdmil_lib.slides.histology`, encoded with `{DEFAULT_ENCODER}`, no
patient's data, under the license of this repository. They let `HDMIL_FAST=1` start without drawing slides.
`python tools/make_samples.py` makes them: of every class of a full cohort, the slides with the fewest tiles.

| cohort | slides | tiles | MB |
|---|---|---|---|
"""


def choose(cohort: Cohort, n_slides: int) -> list[str]:
    """The slides with the fewest tiles, equally many of every class, in the cohort's order."""
    tiles = pd.Series({s: bag_info(cohort.bag_path(s))["n_tiles"] for s in cohort.slide_ids})
    labels = cohort.table.set_index("slide_id")["label"]
    per_class = n_slides // len(cohort.classes)
    chosen = {s for name in cohort.classes for s in tiles[labels == name].nsmallest(per_class).index}
    return [slide_id for slide_id in cohort.slide_ids if slide_id in chosen]


def make(name: str) -> None:
    """Replace `data_samples/<name>/`."""
    full = prepare_cohort(name)
    part, folder = full.select(choose(full, N_SLIDES[name])), SAMPLES / name
    shutil.rmtree(folder, ignore_errors=True)
    for slide_id in part.slide_ids:
        source, target = part.bag_path(slide_id), folder / "bags" / f"{slide_id}.h5"
        write_bag(target, read_bag(source), read_tile_labels(source), compress=True)
    part.table.drop(columns="path").to_csv(folder / "cohort.csv", index=False)


def describe(name: str) -> str:
    """A line about a cohort in `data_samples/`."""
    cohort = prepare_cohort(name, fast=True)
    slides = ", ".join(f"{n} {label}" for label, n in cohort.table["label"].value_counts().items())
    tiles = sum(bag_info(cohort.bag_path(s))["n_tiles"] for s in cohort.slide_ids)
    return f"| {name} | {slides} | {tiles:,} | {megabytes(SAMPLES / name):.1f} |\n"


def megabytes(folder: Path) -> float:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"default: {' '.join(N_SLIDES)}")
    for name in parser.parse_args().names or N_SLIDES:
        make(name)
    text = README + "".join(describe(name) for name in PRESETS if (SAMPLES / name).is_dir())
    (SAMPLES / "README.md").write_text(text)
    print(text)
    if (size := megabytes(SAMPLES)) > LIMIT_MB:
        raise SystemExit(f"{SAMPLES} holds {size:.1f} MB, more than {LIMIT_MB}: lower N_SLIDES")


if __name__ == "__main__":
    main()
