"""A small part of a cohort: balanced by class and patient, and the same whenever it is drawn."""

import random
from collections import defaultdict
from collections.abc import Sequence

from hdmil_lib.public.sources import RemoteSlide

POOL = 1.5
"""A draw of n slides is from the 1.5 n smallest ones, so that a small part is a small download."""


def choose(slides: Sequence[RemoteSlide], n_slides: int, seed: int = 0) -> list[RemoteSlide]:
    """Draw slides: as many of each class, and of as many patients as possible.

    Where there is an official split, each class has the same share of test slides as in the whole cohort.
    Each patient's smallest slide is drawn before any patient's second.

    Args:
        slides: All slides of the cohort.
        n_slides: Number to draw; all are taken if there are fewer.
        seed: Seed of the draw.

    Returns:
        The slides in the order of the cohort.
    """
    if n_slides >= len(slides):
        return list(slides)
    strata: dict[tuple[str, str], list[RemoteSlide]] = defaultdict(list)
    for slide in slides:
        strata[slide.label, slide.split or ""].append(slide)
    rng = random.Random(seed)
    chosen: set[str] = set()
    for key, count in _quotas(strata, n_slides).items():
        ordered = _patients_first(strata[key])
        pool = ordered[: max(count, round(POOL * count))]
        chosen |= {slide.slide_id for slide in rng.sample(pool, min(count, len(pool)))}
    return [slide for slide in slides if slide.slide_id in chosen]


def _quotas(strata: dict[tuple[str, str], list[RemoteSlide]], n_slides: int) -> dict[tuple[str, str], int]:
    """Numbers of slides by class and part: equal classes, parts of a class in proportion, one at least."""
    classes = sorted({label for label, _ in strata})
    quotas = {}
    for index, label in enumerate(classes):
        share = n_slides // len(classes) + (index < n_slides % len(classes))
        parts = sorted(part for found, part in strata if found == label)
        total = sum(len(strata[label, part]) for part in parts)
        most = max(share - len(parts) + 1, 0)
        for part in parts[1:]:
            quotas[label, part] = min(max(1, round(share * len(strata[label, part]) / total)), most)
        quotas[label, parts[0]] = share - sum(quotas[label, part] for part in parts[1:])
    return quotas


def _patients_first(slides: Sequence[RemoteSlide]) -> list[RemoteSlide]:
    """Each patient's smallest slide by size, then each one's second, and so on."""
    seen: dict[str, int] = defaultdict(int)
    ranked = []
    for slide in sorted(slides, key=lambda slide: (slide.size, slide.slide_id)):
        ranked.append((seen[slide.case_id], slide.size, slide.slide_id, slide))
        seen[slide.case_id] += 1
    return [slide for *_, slide in sorted(ranked, key=lambda row: row[:3])]
