"""Synthetic cohorts with their bags: drawn and encoded in the cache, or the small one in the repository."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from hdmil_lib.cohort import Cohort
from hdmil_lib.config import cache_dir
from hdmil_lib.errors import CohortError
from hdmil_lib.synthetic.drawing import slide_painter, synthesize_cohort, synthesize_slide
from hdmil_lib.synthetic.presets import CohortPreset, preset_named
from hdmil_lib.synthetic.truth import tile_labels

SAMPLES = Path(__file__).resolve().parents[2] / "data_samples"
"""Sample bags of the repository; an installed wheel does not contain them."""

DEFAULT_ENCODER = "efficientnet_lite0"


def prepare_cohort(
    name: str | CohortPreset,
    *,
    fast: bool = False,
    n_slides: int | None = None,
    seed: int = 0,
    encoder: str = DEFAULT_ENCODER,
    looks: Sequence[int] = (),
    workers: int | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Cohort:
    """Make a synthetic cohort with its bags, or take it from the cache.

    The folder in the cache is named after everything that determines the slides, so that another preset, size
    or painter gets another folder. Existing slides and bags are kept: a call that was interrupted continues
    where it stopped. The bags contain the share of tumor of each tile, for teaching and evaluation.

    Args:
        name: A preset or its name: "camelyon-mini", "nsclc-mini" or "brca-mini".
        fast: Return the bags in `data_samples/`, which `tools/make_samples.py` made. They have no slides, and
            the other arguments have no effect.
        n_slides: Number of slides; None takes the preset's.
        seed: Seed of the slides: another seed gives new draws from the same population.
        encoder: Name of an encoder in `ENCODERS`.
        looks: Further sides, in pixels, at which each tile is encoded; see `extract_slide`.
        workers: Number of processes that draw slides; None starts one per core.
        device: Device of the encoder, as `devices.resolve` takes it.
        progress: Show progress bars.

    Returns:
        The cohort; its paths are relative to its folder in the cache.

    Raises:
        CohortError: The name is unknown, the samples are absent, or slides could not be encoded.
    """
    preset = preset_named(name)
    if fast:
        return _shipped_cohort(preset)
    # Encoders take seconds to import, and many callers need only the shipped bags.
    from hdmil_lib.encoders.extraction import extract
    from hdmil_lib.encoders.loading import load_encoder

    n_slides = n_slides or preset.n_slides
    other_seed = f"-seed{seed}" if seed else ""
    folder = cache_dir() / "cohorts" / f"{preset.name}-{_cohort_digest(preset, n_slides)}{other_seed}"
    table = synthesize_cohort(preset, folder / "slides", n_slides, seed, progress, workers)
    slide_paths = table["path"].tolist()
    table["path"] = [f"slides/{Path(path).name}" for path in slide_paths]
    bag_dir = folder / "bags" / "-".join([encoder, *(f"look{side}" for side in looks)])
    cohort = Cohort(table, preset.classes, folder, bag_dir)
    cohort.to_csv(folder / "cohort.csv")
    loaded = load_encoder(encoder, device=device)
    report = extract(slide_paths, loaded, bag_dir, looks=looks, tile_labels=tile_labels, progress=progress)
    failed = report.loc[report["status"] == "failed"]
    if len(failed):
        names, error = failed["slide_id"].tolist(), failed["error"].iloc[0]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise CohortError(f"{folder}: no bags of {listed}; the first error is: {error}")
    return cohort


def large_slides(
    name: str, n_slides: int, side: int, *, seed: int = 10_000, mpp: float | None = None
) -> list[Path]:
    """Draw large synthetic slides with tumor for timing, or take them from the cache.

    Args:
        name: Name of the preset; the slides belong to its last class.
        n_slides: Number of slides.
        side: Width and height in pixels; 16,384 give about 2,500 tiles with tissue.
        seed: Seed of the first slide; the others follow. No slide of a cohort is drawn again, since the seeds
            of cohorts are hashes.
        mpp: Micrometers per pixel; None draws a value from the preset's range.

    Returns:
        Paths of the slides.

    Raises:
        CohortError: There is no such preset.
    """
    preset = preset_named(name)
    scale = f"-{mpp}um" if mpp else ""
    folder = cache_dir() / "large_slides" / f"{name}-{_cohort_digest(preset, side)}{scale}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{side}-{number}.tif" for number in range(n_slides)]
    for number, path in enumerate(paths):
        if not path.exists():
            synthesize_slide(path, preset, preset.classes[-1], seed + number, (side, side), mpp)
    return paths


def _shipped_cohort(preset: CohortPreset) -> Cohort:
    """The cohort in `data_samples/`."""
    if not SAMPLES.is_dir():
        raise CohortError(
            f"{SAMPLES}: an installed package has no sample bags; run from a clone of the repository"
        )
    folder = SAMPLES / preset.name
    if not folder.is_dir():
        raise CohortError(
            f"{folder}: no sample bags of this cohort; use fast=False, or, if it is camelyon-mini, make them "
            "with `python tools/make_samples.py`"
        )
    return Cohort.from_csv(folder / "cohort.csv", preset.classes, bags=folder / "bags")


def _cohort_digest(preset: CohortPreset, size: int) -> str:
    """Short hash of a cohort's settings and of a small field that the painter draws from them."""
    digest = hashlib.sha256(repr((preset, size)).encode())
    for strip in slide_painter(preset, preset.classes[-1], seed=0, size=(512, 512), mpp=0.5).strips():
        digest.update(strip.tobytes())
    return digest.hexdigest()[:8]
