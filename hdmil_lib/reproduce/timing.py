"""Seconds per slide and stage, with and without pre-screening (paper: Table 2)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from hdmil_lib.inference.anytime import lipn_scores
from hdmil_lib.inference.prediction import Prediction
from hdmil_lib.models import HDMIL
from hdmil_lib.slides import Slide, TileGrid

STAGES = ("thumbnail", "lipn", "crop", "features", "dmin")


def time_slides(
    model: HDMIL,
    slide_paths: Sequence[str | Path],
    repeats: int = 3,
    keep_ratios: Sequence[float] = (),
    *,
    progress: bool = False,
) -> pd.DataFrame:
    """Time HDMIL† (all tiles) and HDMIL (tiles that LIPN keeps) on the same slides.

    The methods take turns on every slide, in reverse order at every other repeat, so that a machine that
    becomes faster or slower favors none of them. Each slide file is read once before, so that every method
    finds it in the file cache, and the encoder runs once before the first turn. Reading and encoding do not
    overlap, so that the stages add up to the total, as in the paper.

    Args:
        model: Model to time.
        slide_paths: Slide files. Slides with fewer than 2,000 tiles measure fixed costs rather than methods.
        repeats: Number of turns of each method on each slide.
        keep_ratios: Shares of tiles for additional runs of HDMIL, in which LIPN's threshold is set on each
            slide so that this share is read: the cost of a tile budget, whatever the model's thresholds keep.
        progress: Whether to show a progress bar.

    Returns:
        One row per slide, repeat and method: `slide_id`, `repeat`, `method` ("HDMIL†", "HDMIL", or
        "HDMIL, keep 0.30"), `n_tiles`, `keep_ratio` (share of tiles read), the seconds of each stage in
        `STAGES`, and `total`.

    Raises:
        SlideError: A slide cannot be read.
    """
    model.encoder(np.zeros((1, 256, 256, 3), np.uint8))
    rows = []
    turns = tqdm(total=len(slide_paths) * repeats, desc="timing", disable=not progress)
    for path in map(Path, slide_paths):
        _read_through(path)
        contenders = [("HDMIL†", model, True), ("HDMIL", model, False)]
        contenders += [
            (f"HDMIL, keep {ratio:.2f}", with_keep_ratio(model, path, ratio), False) for ratio in keep_ratios
        ]
        for repeat in range(repeats):
            for method, contender, all_tiles in contenders if repeat % 2 == 0 else contenders[::-1]:
                prediction = contender.predict(path, all_tiles=all_tiles, n_readers=0)
                rows.append(_row(method, repeat, prediction))
            turns.update()
    turns.close()
    return pd.DataFrame(rows)


def _read_through(path: Path) -> None:
    """Read a file once, so that the operating system caches it."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def _row(method: str, repeat: int, prediction: Prediction) -> dict[str, object]:
    return {
        "slide_id": prediction.slide_id,
        "repeat": repeat,
        "method": method,
        "n_tiles": prediction.n_tiles,
        "keep_ratio": prediction.n_read / prediction.n_tiles,
        **{stage: prediction.seconds.get(stage, 0.0) for stage in STAGES},
        "total": prediction.seconds["total"],
    }


def with_keep_ratio(model: HDMIL, path: Path, keep_ratio: float) -> HDMIL:
    """The model with the threshold at which LIPN keeps a given share of the slide's tiles.

    Raises:
        SlideError: The slide cannot be read.
    """
    with Slide(path) as slide:
        patches = TileGrid.from_slide(slide).patches
    best = np.sort(lipn_scores(model, patches))[::-1]
    last = min(max(round(keep_ratio * len(best)), 1), len(best) - 1)
    threshold = float(best[last - 1] + best[last]) / 2
    return model.with_rules(thresholds=threshold)


def stage_medians(timings: pd.DataFrame) -> pd.DataFrame:
    """Seconds per slide of each method: the median over repeats for each slide, then the mean over slides.

    Returns:
        Indexed by method in the order of `timings`: `n_tiles`, `keep_ratio`, the stages, `total`, and
        `time_ratio`, the total as a share of that of HDMIL†.
    """
    numbers = ["n_tiles", "keep_ratio", *STAGES, "total"]
    medians = timings.groupby(["method", "slide_id"], sort=False)[numbers].median()
    means = medians.groupby(level="method").mean().loc[timings["method"].unique()]
    means["time_ratio"] = means["total"] / means.loc["HDMIL†", "total"]
    return means
