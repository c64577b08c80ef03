"""Draw synthetic slides and cohorts from a seed.

The slides have the file format, the scale, the class balance and the difficulty of a real cohort, but not its
biology: results on them are results about software and methods, never about patients.
"""

import os
from concurrent.futures import as_completed
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from hdmil_lib.errors import CohortError
from hdmil_lib.processes import helper_processes
from hdmil_lib.synthetic.histology import Painter
from hdmil_lib.synthetic.presets import CohortPreset, preset_named
from hdmil_lib.synthetic.pyramid import write_pyramid
from hdmil_lib.synthetic.truth import TRUTH_MPP, TUMOR, truth_path, write_mask


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
        path: The `.tif` file to write. The mask goes to `<stem>.truth.png` in the same folder: 8 um/px,
            255 = tumor, 0 = no tumor.
        preset: A preset, or the name of one.
        label: One of the preset's classes.
        seed: Seed of everything that is drawn.
        size: (width, height) in pixels; None draws a size that holds the preset's number of tiles.
        mpp: Micrometers per pixel; None draws a value from the preset's range.

    Returns:
        The path of the slide.

    Raises:
        CohortError: There is no such preset, or it has no such class.
    """
    preset = preset_named(preset)
    if label not in preset.classes:
        raise CohortError(f"{path}: {preset.name} has no class {label!r}; choose one of {preset.classes}")
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
    """Make the painter that `synthesize_slide` uses: it gives the pixels and the truth without a file."""
    rng = np.random.default_rng([seed, 0])
    drawn_mpp, share = round(float(rng.uniform(*preset.mpp)), 4), float(rng.uniform(0.52, 0.64))
    mpp = mpp or drawn_mpp
    n_tiles, shape = rng.uniform(*preset.tiles), rng.uniform(0.9, 1.1)
    if size is None:
        side = np.sqrt(0.88 * n_tiles / share) * 128 / mpp
        size = tuple(64 * round(s / 64) for s in (side * shape, side / shape))
    content = preset.draw_content(label, share, rng)
    return Painter(content, *size, mpp, seed, preset.stain_jitter)


def plan_cohort(preset: CohortPreset, n_slides: int, seed: int) -> pd.DataFrame:
    """Draw the cases, labels and seeds of a cohort, with the classes in the preset's proportions.

    Returns:
        One row per slide: slide_id, case_id, label, seed.
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


def worker_start() -> None:
    """Let a process that draws use one thread."""
    cv2.setNumThreads(1)


def synthesize_cohort(
    preset: str | CohortPreset,
    folder: str | Path,
    n_slides: int | None = None,
    seed: int = 0,
    progress: bool = True,
    workers: int | None = None,
) -> pd.DataFrame:
    """Draw the slides of a synthetic cohort; slides that exist already are kept.

    Args:
        preset: A preset, or the name of one.
        folder: Folder of the slides and their truth masks; created if it does not exist.
        n_slides: Number of slides; None takes the preset's.
        seed: Seed of the cohort. A smaller cohort of the same seed is not a part of a larger one.
        progress: Show a progress bar.
        workers: Number of processes that draw; None starts one per core, 1 draws in this process.

    Returns:
        One row per slide: slide_id, case_id, label, path. Some cases have two slides.

    Raises:
        CohortError: There is no such preset.
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
            with helper_processes(workers, worker_start) as pool:
                for done in as_completed([pool.submit(synthesize_slide, *job) for job in jobs]):
                    done.result()
                    bar.update()
    return table.drop(columns="seed")
