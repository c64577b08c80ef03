"""Cohorts of slides that are composed of labeled tiles from a folder: real texture, known content.

The tiles of public collections, such as PatchCamelyon, NCT-CRC-HE and LC25000, are put side by side at their
true scale. Training, validation and test slides have no tile in common, nor copies of one. Each slide has a
stain of its own.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from hdmil_lib.cohort import Cohort
from hdmil_lib.config import cache_dir
from hdmil_lib.errors import CohortError
from hdmil_lib.processes import helper_processes
from hdmil_lib.slides import TileGrid
from hdmil_lib.synthetic.composition import IMAGES, compose_slide
from hdmil_lib.synthetic.drawing import worker_start
from hdmil_lib.synthetic.histology import Scanner
from hdmil_lib.synthetic.truth import truth_path, tumor_share

DEFAULT_ENCODER = "efficientnet_lite0"
PARTS = {"train": 1 / 2, "val": 1 / 6, "test": 1 / 3}
"""Share of the slides, and of the tiles, in each part."""


@dataclass(frozen=True)
class ComposedPreset:
    """How slides are composed.

    Attributes:
        name: Name of the preset.
        classes: Names of the classes of slides, in the order of their indices.
        normal: Classes of tiles without tumor, which every slide has; a tile is drawn from all of them alike.
        tumor: For each class of slides, the class of its tumor tiles, or none.
        tumor_share: For each class of slides, the (lowest, highest) share of the fields that is tumor.
        other_share: Largest share of another class's tumor in the tumor; each slide draws uniformly from 0.
        tile_mpp: Micrometers per pixel of the tiles.
        fields: Fields along each side of a slide.
        foci: Largest number of connected pieces of tumor.
        stain_jitter: Spread of the stain between slides; 1 = as between hospitals.
    """

    name: str
    classes: tuple[str, ...]
    normal: tuple[str, ...]
    tumor: tuple[str | None, ...]
    tumor_share: tuple[tuple[float, float], ...]
    other_share: float
    tile_mpp: float
    fields: int
    foci: int = 3
    stain_jitter: float = 0.5


LIKE: dict[str, dict[str, Any]] = {
    "camelyon": {
        "classes": ("normal", "tumor"),
        "tumor_share": ((0.0, 0.0), (0.02, 0.10)),
        "other_share": 0.0,
    },
    "nsclc": {"classes": ("LUAD", "LUSC"), "tumor_share": ((0.1, 0.5), (0.1, 0.5)), "other_share": 0.45},
}
"""What slides look like: a few percent of tumor or none; or two kinds of tumor, of which one prevails."""

COLLECTIONS = {
    "pcam": ComposedPreset(
        "camelyon-pcam", normal=("0",), tumor=(None, "1"), tile_mpp=0.972, fields=17, **LIKE["camelyon"]
    ),
    "nct": ComposedPreset(
        "camelyon-nct",
        normal=("LYM", "MUC", "MUS", "NORM", "STR"),
        tumor=(None, "TUM"),
        tile_mpp=0.5,
        fields=14,
        **LIKE["camelyon"],
    ),
    "lc25000": ComposedPreset(
        "nsclc-lc25000",
        normal=("lung_n",),
        tumor=("lung_aca", "lung_scc"),
        tile_mpp=1.0,
        fields=7,
        **LIKE["nsclc"],
    ),
}
"""Public collections of tiles with their folders' names; the scale of LC25000 is not known, 1 is assumed."""


def compose_cohort(
    tiles: str | Path,
    *,
    like: str | None = None,
    n_slides: int = 480,
    seed: int = 0,
    encoder: str = DEFAULT_ENCODER,
    looks: Sequence[int] = (),
    parts: Sequence[str] = tuple(PARTS),
    first: int = 0,
    fields: int | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: bool = True,
) -> Cohort:
    """Compose a cohort from a folder of tiles and extract its bags, or take it from the cache.

    The table of the cohort has a column `split`. Slides that exist are kept, so that an interrupted call goes
    on where it stopped. Bags have the share of tumor of each tile, for teaching and evaluation.

    Args:
        tiles: Folder with one subfolder of images per class of tiles, named as in `COLLECTIONS`.
        like: "camelyon" or "nsclc", if it should be checked what the folder gives.
        n_slides: Number of slides of all three parts, also if only some are made.
        seed: Seed of the cohort: of the parts of the tiles, and of the slides.
        encoder: Name of an encoder in `ENCODERS`.
        looks: Further sides, in pixels, at which each tile is encoded; see `extract`.
        parts: Parts that are made: of "train", "val" and "test".
        first: Number of the first slide of each part. Slides of one seed with other numbers are further
            slides of the same tiles.
        fields: Number of tiles along each side of a slide; by default that of the collection.
        device: Device of the encoder, as `devices.resolve` takes it.
        workers: Number of processes that compose; None starts one per core.
        progress: Whether progress bars are shown.

    Raises:
        CohortError: The folder is of no known collection, has too few tiles, or slides could not be encoded.
    """
    from hdmil_lib.encoders.extraction import extract
    from hdmil_lib.encoders.loading import load_encoder

    root = Path(tiles)
    preset = collection_in(root, like)
    if fields is not None:
        preset = replace(preset, fields=fields)
    sources = parts_of_tiles(root, preset, seed)
    drawn = () if tuple(parts) == tuple(PARTS) and first == 0 else (tuple(parts), first)
    content = (preset, n_slides, seed, sorted(map(str, _names(sources))), *drawn)
    digest = hashlib.sha256(repr(content).encode())
    folder = cache_dir() / "cohorts" / f"{preset.name}-{digest.hexdigest()[:8]}"
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    table = plan(preset, n_slides, seed, first)
    table = table[table["split"].isin(parts)].reset_index(drop=True)
    table["path"] = [f"slides/{slide_id}.tif" for slide_id in table["slide_id"]]
    jobs = [
        (folder / row.path, preset, sources[row.split], row.label, row.seed)
        for row in table.itertuples()
        if not (folder / row.path).exists() or not truth_path(folder / row.path).exists()
    ]
    _compose_all(jobs, len(table), preset.name, workers, progress)
    bag_dir = folder / "bags" / "-".join([encoder, *(f"look{side}" for side in looks)])
    cohort = Cohort(table.drop(columns="seed"), preset.classes, folder, bag_dir)
    cohort.to_csv(folder / "cohort.csv")
    report = extract(
        [folder / path for path in table["path"]],
        load_encoder(encoder, device=device),
        bag_dir,
        looks=looks,
        tile_labels=partial(tumor_labels, preset=preset),
        progress=progress,
    )
    failed = report.loc[report["status"] == "failed"]
    if len(failed):
        raise CohortError(
            f"{folder}: no bags of {len(failed)} slides; the first error is: {failed['error'].iloc[0]}"
        )
    return cohort


def collection_in(root: Path, like: str | None = None) -> ComposedPreset:
    """The collection whose classes a folder has.

    Raises:
        CohortError: It has those of none, or its slides are not like those that are wanted.
    """
    if like is not None and like not in LIKE:
        raise CohortError(f"like is {like!r}, expected {' or '.join(LIKE)}")
    found = {p.name for p in root.iterdir() if p.is_dir()} if root.is_dir() else set()
    for preset in COLLECTIONS.values():
        if found and {*preset.normal, *filter(None, preset.tumor)} <= found:
            if like is not None and preset.classes != LIKE[like]["classes"]:
                raise CohortError(
                    f"{root}: these tiles give slides of {' and '.join(preset.classes)}, not {like}"
                )
            return preset
    expected = "; ".join(
        f"{name}: {', '.join((*p.normal, *filter(None, p.tumor)))}" for name, p in COLLECTIONS.items()
    )
    raise CohortError(f"{root}: has no folders of tiles of a known collection ({expected})")


def parts_of_tiles(root: Path, preset: ComposedPreset, seed: int) -> dict[str, dict[str, list[Path]]]:
    """Tiles by part and class. Copies of one image, whose names share a `group<g>_`, are in one part.

    Raises:
        CohortError: A class has fewer than 12 groups.
    """
    parts: dict[str, dict[str, list[Path]]] = {part: {} for part in PARTS}
    for name in sorted({*preset.normal, *filter(None, preset.tumor)}):
        groups: dict[str, list[Path]] = {}
        for path in sorted((root / name).iterdir()):
            if path.suffix.lower() in IMAGES:
                copy = re.match(r"group\d+(?=_)", path.stem)
                groups.setdefault(copy.group() if copy else path.stem, []).append(path)
        if len(groups) < 12:
            raise CohortError(f"{root / name}: {len(groups)} different tiles are too few for three parts")
        order = np.random.default_rng([seed, 5]).permutation(sorted(groups))
        ends = np.rint(np.cumsum([*PARTS.values()]) * len(order)).astype(int)
        for part, first, end in zip(PARTS, (0, *ends), ends, strict=False):
            parts[part][name] = [path for group in order[first:end] for path in groups[group]]
    return parts


def plan(preset: ComposedPreset, n_slides: int, seed: int, first: int = 0) -> pd.DataFrame:
    """Slides with their part, class and seed: the classes are equally frequent in every part.

    Args:
        preset: How slides are composed.
        n_slides: Number of slides of all parts.
        seed: Seed of the cohort.
        first: Number of the first slide of each part.

    Returns:
        One row per slide: slide_id, case_id, label, split, seed.
    """
    rows = []
    for part, share in PARTS.items():
        for number in range(first, first + round(share * n_slides)):
            slide_id = f"{preset.name}-{part}-{number:03d}"
            label = preset.classes[number % len(preset.classes)]
            draw = np.random.SeedSequence([seed, list(PARTS).index(part), number]).generate_state(1)[0]
            rows.append((slide_id, slide_id, label, part, int(draw)))
    return pd.DataFrame(rows, columns=["slide_id", "case_id", "label", "split", "seed"])


def compose(
    path: Path, preset: ComposedPreset, tiles: Mapping[str, Sequence[Path]], label: str, seed: int
) -> None:
    """Compose one slide and the mask of its classes of tiles."""
    rng = np.random.default_rng(seed)
    index = preset.classes.index(label)
    layout = rng.choice(np.array(preset.normal, dtype=object), (preset.fields, preset.fields))
    if (kind := preset.tumor[index]) is not None:
        share = rng.uniform(*preset.tumor_share[index])
        n_fields = max(1, round(share * layout.size))
        tumor = grow(layout.shape, n_fields, int(rng.integers(1, preset.foci + 1)), rng)
        layout[tumor] = kind
        others = [other for other in preset.tumor if other not in (kind, None)]
        if others:
            n_others = int(rng.uniform(0, preset.other_share) * n_fields)
            layout[tuple(rng.permutation(np.argwhere(tumor))[:n_others].T)] = others[0]
    stain = Stain.draw(rng, preset.stain_jitter)
    order = int(rng.integers(1 << 62))
    compose_slide(path, tiles, layout, tile_mpp=preset.tile_mpp, seed=order, recolor=stain.apply)


def grow(shape: tuple[int, int], n_fields: int, n_foci: int, rng: np.random.Generator) -> np.ndarray:
    """Fields of tumor, bool of this shape: foci that grow by neighbors until there are `n_fields`."""
    taken = np.zeros(shape, bool)
    for _ in range(min(n_foci, n_fields)):
        taken[tuple(rng.integers(shape))] = True
    while taken.sum() < n_fields:
        padded = np.pad(taken, 1)
        near = (padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]) & ~taken
        taken.ravel()[rng.choice(np.flatnonzero(near))] = True
    return taken


@dataclass(frozen=True)
class Stain:
    """A change of stain: hematoxylin and eosin absorb otherwise, all else stays.

    Attributes:
        change: Change of the optical density per unit of the usual stains, float32 (2, 3).
        unmixing: Amounts of the usual stains by optical density, float32 (3, 2).
    """

    change: np.ndarray
    unmixing: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, jitter: float) -> "Stain":
        """Draw a stain as those of drawn slides; with a jitter of 0 nothing changes."""
        usual = Scanner.draw(np.random.default_rng(0), 0.0).stains
        own = Scanner.draw(rng, jitter).stains
        return cls(own - usual, np.linalg.pinv(usual).astype(np.float32))

    def apply(self, tile: np.ndarray) -> np.ndarray:
        """Change the colors of a tile, uint8 RGB (S, S, 3)."""
        density = -np.log((tile.astype(np.float32) + 1) / 256)
        amounts = np.maximum(density @ self.unmixing, 0)
        changed = 256 * np.exp(-density - amounts @ self.change) - 1
        return np.clip(changed, 0, 255).round().astype(np.uint8)


def tumor_labels(slide_path: str | Path, grid: TileGrid, preset: ComposedPreset) -> np.ndarray:
    """Share of tumor, of either kind, in each tile of a composed slide, float32 (N,)."""
    names = sorted({*preset.normal, *filter(None, preset.tumor)})
    values = [names.index(kind) + 1 for kind in preset.tumor if kind is not None]
    return np.sum([tumor_share(truth_path(slide_path), grid.rowcol, value) for value in values], axis=0)


def _names(sources: Mapping[str, Mapping[str, Sequence[Path]]]) -> list[str]:
    return [
        f"{part}/{p.parent.name}/{p.name}"
        for part, kinds in sources.items()
        for ps in kinds.values()
        for p in ps
    ]


def _compose_all(jobs: list[tuple], total: int, name: str, workers: int | None, progress: bool) -> None:
    workers = min(workers or os.cpu_count() or 1, max(len(jobs), 1))
    with tqdm(total=total, initial=total - len(jobs), desc=name, unit="slide", disable=not progress) as bar:
        if workers == 1:
            for job in jobs:
                compose(*job)
                bar.update()
            return
        with helper_processes(workers, worker_start) as pool:
            for done in as_completed([pool.submit(compose, *job) for job in jobs]):
                done.result()
                bar.update()
