"""The public cohorts by name: licenses, sources, and slides that are known to be faulty."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from hdmil_lib.errors import CohortError, nearest
from hdmil_lib.public import sources
from hdmil_lib.public.sources import Addresses, RemoteSlide
from hdmil_lib.public.transfer import Client

CAMELYON_README = "readme of Camelyon16, https://camelyon17.grand-challenge.org/Data/"

CAMELYON_PLUS = (
    "a revision with other labels and fewer slides exists (Camelyon+, doi 10.1038/s41597-025-05586-5); this "
    "is the original, as in the paper"
)


@dataclass(frozen=True)
class Fault:
    """What is known to be wrong with a slide.

    Attributes:
        slide_id: The slide.
        what: What is wrong.
        source: Who says so.
        left_out: Whether the slide is not fetched.
    """

    slide_id: str
    what: str
    source: str
    left_out: bool


@dataclass(frozen=True)
class PublicCohort:
    """A cohort that anyone may download.

    Attributes:
        title: What it holds.
        license: Its license.
        home: Page that describes it.
        classes: Its classes.
        slides: Function that lists its slides.
        faults: Slides that are known to be faulty.
        notes: What to know before using it.
    """

    title: str
    license: str
    home: str
    classes: tuple[str, ...]
    slides: Callable[[Client, Addresses], list[RemoteSlide]]
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()


CAMELYON16_FAULTS = (
    Fault("normal_086", "holds tumor; in the release it is called tumor_111", CAMELYON_README, True),
    Fault("test_049", "is a copy of another slide, and was withdrawn", CAMELYON_README, True),
    Fault("test_114", "its tumor is not outlined in full; its class holds", CAMELYON_README, False),
    Fault(
        "normal_144",
        "is said to hold tumor, and is left out by some; the release calls it normal, and so does this table",
        "Liu et al. 2017, arXiv 1703.02442",
        False,
    ),
)

DSMIL_ISSUE = "https://github.com/binli123/dsmil-wsi/issues/62"
NO_MAGNIFICATION = (
    *("05-4384", "05-4390", "05-4410", "05-4425", "05-5420"),
    *("05-5423", "05-5425", "05-5428", "05-5429", "05-5715"),
)
LUAD_FAULTS = (
    *(
        Fault(f"TCGA-{case}-DX1", "its original magnification is not known", DSMIL_ISSUE, True)
        for case in NO_MAGNIFICATION
    ),
    Fault("TCGA-44-7661-DX1", "is blurred", DSMIL_ISSUE, True),
)

IDC_HOME = "https://portal.imaging.datacommons.cancer.gov/"
ONE_SAMPLE = (
    "slides of paraffin-embedded primary tumor alone (TP, DX); frozen sections, normal tissue and {other} "
    "are left out"
)

COHORTS = {
    "camelyon16": PublicCohort(
        "Camelyon16: lymph nodes with and without metastases of breast cancer, with an official test part",
        "CC0 1.0",
        "https://camelyon17.grand-challenge.org/Data/",
        ("normal", "tumor"),
        sources.camelyon16,
        CAMELYON16_FAULTS,
        ("patients are not published, so every slide counts as a case of its own", CAMELYON_PLUS),
    ),
    "camelyon17": PublicCohort(
        "Camelyon17: five lymph nodes of each of 100 patients of five hospitals",
        "CC0 1.0",
        "https://camelyon17.grand-challenge.org/Data/",
        ("normal", "tumor"),
        sources.camelyon17,
        notes=(
            "the findings of the 100 test patients are not published, so their slides are left out",
            "isolated tumor cells (stage itc) count as tumor here, but not as metastasis in the challenge; "
            "change `label` by the column `stage` to follow it",
            CAMELYON_PLUS,
        ),
    ),
    "nsclc": PublicCohort(
        "TCGA-LUAD and TCGA-LUSC: adenocarcinoma and squamous cell carcinoma of the lung",
        "CC BY 3.0",
        IDC_HOME,
        ("LUAD", "LUSC"),
        partial(sources.idc, {"tcga_luad": "LUAD", "tcga_lusc": "LUSC"}),
        LUAD_FAULTS,
        (ONE_SAMPLE.format(other="the second tumor of TCGA-50-5066"),),
    ),
    "brca": PublicCohort(
        "TCGA-BRCA: invasive ductal and lobular carcinoma of the breast",
        "CC BY 3.0",
        IDC_HOME,
        ("IDC", "ILC"),
        sources.tcga_brca,
        notes=(
            ONE_SAMPLE.format(other="the second tumor of TCGA-E2-A15E"),
            "classes are the morphology of the primary diagnosis at the Genomic Data Commons, 8500/3 and "
            "8520/3; patients with another or with both are left out",
        ),
    ),
    "cptac-nsclc": PublicCohort(
        "CPTAC-LUAD and CPTAC-LSCC: adenocarcinoma and squamous cell carcinoma of the lung",
        "CC BY 4.0",
        IDC_HOME,
        ("LUAD", "LUSC"),
        partial(sources.idc, {"cptac_luad": "LUAD", "cptac_lscc": "LUSC"}),
        notes=(
            "slides of tumor alone; those of normal tissue, and those of which the index does not say what "
            "they show, are left out",
        ),
    ),
}
"""Public cohorts by name."""


def cohort_named(name: str) -> PublicCohort:
    """The public cohort of this name.

    Raises:
        CohortError: There is none.
    """
    if name not in COHORTS:
        hint = nearest(name, COHORTS)
        raise CohortError(f"there is no public cohort {name!r}{hint}; choose from {', '.join(COHORTS)}")
    return COHORTS[name]


def describe(faults: Iterable[Fault]) -> list[str]:
    """Faults in lines: slides with the same fault share one."""
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for fault in faults:
        groups.setdefault((fault.what, fault.source, fault.left_out), []).append(fault.slide_id)
    return [
        f"{', '.join(names)}: {what} ({source}); {'left out' if left_out else 'kept'}"
        for (what, source, left_out), names in groups.items()
    ]
