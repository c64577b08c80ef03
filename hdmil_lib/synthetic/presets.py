"""Presets of synthetic cohorts: what their slides hold, and how hard they are to classify.

The cache names a cohort's folder after the repr of its preset: a changed field, value or class name makes
`prepare_cohort` draw and encode the cohort again.
"""

from dataclasses import dataclass, replace

import numpy as np

from hdmil_lib.errors import CohortError
from hdmil_lib.synthetic.anatomy import SlideContent


@dataclass(frozen=True)
class Mixture:
    """A tumor with two architectures, as real tumors often have.

    Attributes:
        own: Architecture of most of the tumor.
        other: Architecture of the rest.
        most: Largest share of the rest; each slide draws its share uniformly between 0 and this.
    """

    own: str
    other: str | None = None
    most: float = 0.0


@dataclass(frozen=True)
class CohortPreset:
    """Settings of a synthetic cohort.

    `benchmarks/tune_cohorts.py` measures how difficult a cohort is. So far only camelyon-mini was tuned with
    it; the settings of the two subtype cohorts were chosen by eye.

    Attributes:
        name: Name of the preset.
        organ: "node", "lung" or "breast".
        classes: Names of the classes, in the order of their indices.
        proportions: Share of each class among the cases.
        architectures: Arrangement of the tumor cells in each class, or a `Mixture`; see `SlideContent`.
        tumor_share: For each class, the (lowest, highest) share of the tissue that is tumor; each slide draws
            uniformly.
        grade: For each class, mean atypia of the tumor, 0 benign to 1 anaplastic.
        grade_sd: Standard deviation of the mean atypia between slides.
        grade_spread: Half the range of the atypia between the foci of one slide.
        patchiness: How much of a large tumor focus looks benign; see `SlideContent`.
        mimic_share: (lowest, highest) share of the tissue in benign look-alikes.
        mimic_grade: Mean atypia of benign epithelium; the closer to `grade`, the harder the task.
        density_contrast: How much denser tumor nuclei lie than benign ones; 0 = no difference.
        stain_jitter: Spread of stain and scanner between slides; 1 = as between hospitals.
        tiles: (lowest, highest) number of 128 um tiles with tissue per slide.
        mpp: (lowest, highest) micrometers per pixel.
        n_slides: Number of slides in the full cohort.
        paired: Share of the cases that have two slides.
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

    def draw_content(self, label: str, tissue_share: float, rng: np.random.Generator) -> SlideContent:
        """Draw the content of one slide.

        Args:
            label: Class of the slide.
            tissue_share: Share of the slide that is tissue.
            rng: Source of the random numbers.
        """
        index = self.classes.index(label)
        low, high = self.tumor_share[index]
        kind = self.architectures[index]
        mixture = Mixture(kind) if isinstance(kind, str) else kind
        content = SlideContent(
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
        return replace(content, other_share=float(rng.uniform(0, mixture.most))) if mixture.other else content


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
    """Look up a preset by its name; a preset is returned as it is.

    Raises:
        CohortError: No preset has this name.
    """
    if isinstance(preset, CohortPreset):
        return preset
    if preset not in PRESETS:
        raise CohortError(f"{preset}: no such preset; choose one of {', '.join(PRESETS)}")
    return PRESETS[preset]
