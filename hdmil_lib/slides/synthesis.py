"""Synthetic cohorts: presets, slides, and the truth beside them.

Synthetic slides are drawn by `hdmil_lib.slides.histology` from a seed. They have the file format, the
scale, the class balance and the difficulty of a real cohort, not its biology: results on them are
results about software and method, never about patients. The truth mask that lies beside each slide
serves teaching and evaluation; training never reads it.
"""

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from hdmil_lib.errors import CohortError, SlideError
from hdmil_lib.slides.anatomy import Recipe
from hdmil_lib.slides.histology import Painter
from hdmil_lib.slides.pyramid import write_pyramid

TRUTH_MPP = 8.0
TRUTH_PER_TILE = 16  # truth pixels along a tile of 128 um
TUMOR = 255  # value of tumor in a truth mask


@dataclass(frozen=True)
class Mixture:
    """A tumor that is arranged in its own way and, in part, in another: as real ones are.

    Attributes:
        own: Arrangement of most of it.
        other: Of the rest.
        most: Largest share of the rest; drawn uniformly for each slide.
    """

    own: str
    other: str | None = None
    most: float = 0.0


@dataclass(frozen=True)
class CohortPreset:
    """A synthetic cohort: what its slides hold and how hard they are.

    `benchmarks/calibrate_cohorts.py` measures what these numbers make of the task. So far it has judged
    camelyon-mini alone; the numbers of the two subtype cohorts are chosen by eye.

    Attributes:
        name: Name of the preset.
        organ: "node", "lung" or "breast".
        classes: Names of the classes, in the order of their indices.
        proportions: Share of each class among the cases.
        architectures: Arrangement of the tumor cells in each class, or a `Mixture`; see `Recipe`.
        tumor_share: For each class, (lowest, highest) share of the tissue; drawn uniformly.
        grade: Mean atypia of the tumor in each class, 0 benign to 1 anaplastic.
        grade_sd: Standard deviation of the mean atypia between slides.
        grade_spread: Half the range of the atypia between the foci of a slide.
        patchiness: How much of a large tumor focus looks benign; see `Recipe`.
        mimic_share: (lowest, highest) share of the tissue in benign look-alikes.
        mimic_grade: Mean atypia of benign epithelium: the closer to `grade`, the harder.
        density_contrast: How much denser tumor nuclei lie than benign ones; 0 = alike.
        stain_jitter: Spread of stain and scanner between slides; 1 = between hospitals.
        tiles: (lowest, highest) number of 128 um tiles of tissue in a slide.
        mpp: (lowest, highest) micrometers a pixel.
        n_slides: Slides of the full cohort.
        paired: Share of the cases that own two slides.
    """

    name: str
    organ: str
    classes: tuple[str, ...]
    proportions: tuple[float, ...]
    architectures: tuple[str | Mixture, ...]
    tumor_share: tuple[tuple[float, float], ...]
    grade: tuple[float, ...]
    grade_sd: float = 0.06
    grade_spread: float = 0.15
    patchiness: float = 0.0
    mimic_share: tuple[float, float] = (0.1, 0.4)
    mimic_grade: float = 0.15
    density_contrast: float = 0.0
    stain_jitter: float = 1.0
    tiles: tuple[int, int] = (100, 160)
    mpp: tuple[float, float] = (0.46, 0.52)
    n_slides: int = 200
    paired: float = 0.15

    def recipe(self, label: str, tissue_share: float, rng: np.random.Generator) -> Recipe:
        """What one slide of a class holds."""
        index = self.classes.index(label)
        low, high = self.tumor_share[index]
        kind = self.architectures[index]
        mixture = Mixture(kind) if isinstance(kind, str) else kind
        recipe = Recipe(
            organ=self.organ,
            tumor_share=float(rng.uniform(low, high)),
            architecture=mixture.own,
            other=mixture.other,
            grade=float(np.clip(rng.normal(self.grade[index], self.grade_sd), 0, 1)),
            grade_spread=self.grade_spread,
            patchiness=self.patchiness,
            mimic_share=float(rng.uniform(*self.mimic_share)),
            mimic_grade=float(np.clip(rng.normal(self.mimic_grade, self.grade_sd), 0, 1)),
            density_contrast=self.density_contrast,
            tissue_share=tissue_share,
        )
        return replace(recipe, other_share=float(rng.uniform(0, mixture.most))) if mixture.other else recipe


PRESETS: dict[str, CohortPreset] = {
    preset.name: preset
    for preset in (
        CohortPreset(
            name="camelyon-mini",
            organ="node",
            classes=("normal", "tumor"),
            proportions=(0.5, 0.5),
            architectures=("nests", "nests"),
            tumor_share=((0.0, 0.0), (0.005, 0.10)),
            grade=(0.0, 0.93),
            grade_sd=0.05,
            grade_spread=0.15,
            patchiness=1.5,
            mimic_share=(0.2, 0.35),
            mimic_grade=0.26,
            stain_jitter=0.5,
        ),
        CohortPreset(
            name="nsclc-mini",
            organ="lung",
            classes=("LUAD", "LUSC"),
            proportions=(0.5, 0.5),
            architectures=(Mixture("glands", "solid", 0.55), Mixture("solid", "glands", 0.55)),
            tumor_share=((0.2, 0.7), (0.2, 0.7)),
            grade=(0.55, 0.6),
        ),
        CohortPreset(
            name="brca-mini",
            organ="breast",
            classes=("IDC", "ILC"),
            proportions=(0.8, 0.2),
            architectures=(Mixture("nests", "files", 0.55), Mixture("files", "nests", 0.55)),
            tumor_share=((0.1, 0.6), (0.1, 0.6)),
            grade=(0.5, 0.42),
        ),
    )
}


def preset_named(preset: str | CohortPreset) -> CohortPreset:
    """The preset of this name, or the one given.

    Raises:
        CohortError: No preset has this name.
    """
    if isinstance(preset, CohortPreset):
        return preset
    if preset not in PRESETS:
        raise CohortError(f"{preset}: no such preset; take one of {', '.join(PRESETS)}")
    return PRESETS[preset]


def truth_path(slide: str | Path) -> Path:
    """Where the truth mask of a synthetic or composed slide lies: `<stem>.truth.png` beside it."""
    return Path(slide).with_suffix(".truth.png")


def write_mask(path: Path, image: np.ndarray) -> None:
    """Write a PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    os.replace(partial, path)


def synthesize_slide(
    path: str | Path,
    preset: str | CohortPreset,
    label: str,
    seed: int,
    size: tuple[int, int] | None = None,
    mpp: float | None = None,
) -> Path:
    """Draw one synthetic slide and its truth mask; the same arguments give the same bytes.

    Args:
        path: Target `.tif`. `<stem>.truth.png` lies beside it: 8 um/px, 255 = tumor, 0 = not.
        preset: Name of a preset, or a preset.
        label: One of the preset's classes.
        seed: Determines everything.
        size: (width, height) in pixels; None draws a size that holds the preset's number of tiles.
        mpp: Micrometers a pixel; None draws one from the preset's range.

    Raises:
        CohortError: The preset has no such class.
    """
    preset = preset_named(preset)
    if label not in preset.classes:
        raise CohortError(f"{path}: {preset.name} has no class {label!r}; take one of {preset.classes}")
    painter = slide_painter(preset, label, seed, size, mpp)
    write_mask(truth_path(path), painter.truth(TRUTH_MPP).astype(np.uint8) * TUMOR)
    return write_pyramid(path, painter.strips(), painter.width, painter.height, painter.mpp)


def slide_painter(
    preset: CohortPreset,
    label: str,
    seed: int,
    size: tuple[int, int] | None = None,
    mpp: float | None = None,
) -> Painter:
    """The painter behind `synthesize_slide`, for those who want rows or truth without a file."""
    rng = np.random.default_rng([seed, 0])
    drawn_mpp, share = round(float(rng.uniform(*preset.mpp)), 4), float(rng.uniform(0.52, 0.64))
    mpp = mpp or drawn_mpp
    n_tiles, shape = rng.uniform(*preset.tiles), rng.uniform(0.9, 1.1)
    if size is None:
        side = np.sqrt(0.88 * n_tiles / share) * 128 / mpp
        size = tuple(64 * round(s / 64) for s in (side * shape, side / shape))
    recipe = preset.recipe(label, share, rng)
    return Painter(recipe, *size, mpp, seed, preset.stain_jitter)


def plan_cohort(preset: CohortPreset, n_slides: int, seed: int) -> pd.DataFrame:
    """Slides, cases and labels of a cohort, classes in the preset's proportions.

    Returns:
        DataFrame slide_id, case_id, label, seed.
    """
    rng = np.random.default_rng([seed, 3])
    cases, left = [], n_slides
    while left:
        cases.append(2 if left > 1 and rng.uniform() < preset.paired else 1)
        left -= cases[-1]
    quota = np.cumsum(preset.proportions) / np.sum(preset.proportions) * len(cases)
    labels = rng.permutation(np.searchsorted(quota, np.arange(len(cases)) + 0.5))
    rows = []
    for case, (count, label) in enumerate(zip(cases, labels, strict=True)):
        for part in range(count):
            case_id = f"{preset.name}-{case:03d}"
            row_seed = int(np.random.SeedSequence([seed, case, part]).generate_state(1, np.uint32)[0])
            rows.append((f"{case_id}-{'ab'[part]}", case_id, preset.classes[label], row_seed))
    return pd.DataFrame(rows, columns=["slide_id", "case_id", "label", "seed"])


def _worker_start() -> None:
    cv2.setNumThreads(1)


def synthesize_cohort(
    preset: str | CohortPreset,
    folder: str | Path,
    n_slides: int | None = None,
    seed: int = 0,
    progress: bool = True,
    workers: int | None = None,
) -> pd.DataFrame:
    """Draw the slides of a synthetic cohort; slides that are already there are kept.

    Args:
        preset: Name of a preset, or a preset.
        folder: Where the slides and their truth masks go; made if absent.
        n_slides: Number of slides; None takes the preset's.
        seed: Determines the cohort. A smaller cohort is not a part of a larger one.
        progress: Show a progress bar.
        workers: Processes; None takes one a core. 1 draws in this process.

    Returns:
        DataFrame slide_id, case_id, label, path. Some cases own two slides.
    """
    preset, folder = preset_named(preset), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = plan_cohort(preset, n_slides or preset.n_slides, seed)
    table["path"] = [str(folder / f"{slide}.tif") for slide in table.slide_id]
    drawn = np.array([Path(path).exists() and truth_path(path).exists() for path in table.path], bool)
    jobs = [(row.path, preset, row.label, row.seed) for row in table[~drawn].itertuples()]
    bar = tqdm(total=len(table), initial=drawn.sum(), desc=preset.name, unit="slide", disable=not progress)
    workers = min(workers or os.cpu_count() or 1, max(len(jobs), 1))
    with bar:
        if workers == 1:
            for job in jobs:
                synthesize_slide(*job)
                bar.update()
        else:
            with ProcessPoolExecutor(workers, get_context("spawn"), _worker_start) as pool:
                for done in as_completed([pool.submit(synthesize_slide, *job) for job in jobs]):
                    done.result()
                    bar.update()
    return table.drop(columns="seed")


def tumor_share(truth_png: str | Path, rowcol: np.ndarray, value: int = TUMOR) -> np.ndarray:
    """Share of each tile that is tumor.

    Tiles of 128 um and truth pixels of 8 um start at the same corner: tile (row, col) is the truth's
    16 x 16 pixels from (16 row, 16 col). Tiles that reach over the edge count the rest as not tumor.

    Args:
        truth_png: Mask written by `synthesize_slide`, or by `composition.compose_slide`.
        rowcol: int (N, 2), `TileGrid.rowcol`.
        value: Pixel value that counts: 255 = tumor; in a composed slide, 1 + index of the class.

    Returns:
        float32 (N,), 0 to 1.

    Raises:
        SlideError: The mask cannot be read.
    """
    mask = cv2.imread(str(truth_png), cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise SlideError(f"{truth_png}: no readable truth mask; synthesize the slide again")
    side = TRUTH_PER_TILE
    rowcol = np.asarray(rowcol, dtype=np.int64).reshape(-1, 2)
    rows, cols = np.maximum(-(-np.array(mask.shape) // side), rowcol.max(axis=0, initial=0) + 1)
    padded = np.zeros((rows * side, cols * side), np.float32)
    padded[: mask.shape[0], : mask.shape[1]] = mask == value
    share = padded.reshape(rows, side, cols, side).mean(axis=(1, 3), dtype=np.float32)
    return share[rowcol[:, 0], rowcol[:, 1]]
