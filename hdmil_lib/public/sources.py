"""Where the slides of public cohorts lie and what their labels are."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from hdmil_lib.errors import CohortError
from hdmil_lib.public.buckets import list_bucket
from hdmil_lib.public.transfer import Client, RemoteFile

IDC_TABLE = Path(__file__).with_name("data") / "idc_slides.csv"


@dataclass(frozen=True)
class Addresses:
    """Servers that are asked, each with a slash at its end.

    Attributes:
        camelyon: Bucket of Camelyon16 and Camelyon17 in the Registry of Open Data on AWS.
        idc: Bucket of the Imaging Data Commons.
        gdc: Programming interface of the Genomic Data Commons, which knows the diagnoses of TCGA.
    """

    camelyon: str = "https://camelyon-dataset.s3.us-west-2.amazonaws.com/"
    idc: str = "https://idc-open-data.s3.amazonaws.com/"
    gdc: str = "https://api.gdc.cancer.gov/"


ADDRESSES = Addresses()

Located = dict[str, RemoteFile]
"""Files by their path below the folder of the slides."""


@dataclass(frozen=True)
class RemoteSlide:
    """A slide on a server.

    Attributes:
        slide_id: Its name.
        case_id: The patient, or the slide itself where patients are not published.
        label: Its class.
        size: Length of its files in bytes, about where `approximate`.
        n_files: Number of its files.
        locate: Function that finds its files.
        split: Its part of the official split, "train" or "test", where there is one.
        extra: Further columns of the label table.
    """

    slide_id: str
    case_id: str
    label: str
    size: int
    n_files: int
    locate: Callable[[Client], Located] = field(repr=False, compare=False)
    split: str | None = None
    extra: dict[str, str] = field(default_factory=dict)


def camelyon16(client: Client, addresses: Addresses) -> list[RemoteSlide]:
    """Slides of Camelyon16: the class is in the name, that of the test slides in `evaluation/reference.csv`.

    Raises:
        CohortError: The bucket cannot be read, or a test slide has no class.
    """
    base, folder = addresses.camelyon, "CAMELYON16/"
    reference = _reference_labels(client.read(f"{base}{folder}evaluation/reference.csv"))
    classes = {"normal": "normal", "tumor": "tumor"}
    slides = []
    for name, remote in _camelyon_images(client, base, folder).items():
        kind = name.split("_")[0]
        label = classes.get(kind) or reference.get(name)
        if label is None:
            raise CohortError(f"{base}{folder}evaluation/reference.csv: has no class of {name}")
        split = "train" if kind in classes else "test"
        slides.append(_single(name, name, label, remote, split=split))
    return slides


def camelyon17(client: Client, addresses: Addresses) -> list[RemoteSlide]:
    """Slides of the patients of Camelyon17 whose findings are published, in `stages.csv`.

    Raises:
        CohortError: The bucket cannot be read.
    """
    base, folder = addresses.camelyon, "CAMELYON17/"
    stages = {}
    for row in _rows(client.read(f"{base}{folder}stages.csv")):
        path, stage = PurePosixPath(row[0]), row[1].lower()
        if path.suffix == ".tif" and stage in ("negative", "itc", "micro", "macro"):
            stages[path.stem] = stage
    slides = []
    for name, remote in _camelyon_images(client, base, folder).items():
        if name in stages:
            label = "normal" if stages[name] == "negative" else "tumor"
            case = "_".join(name.split("_")[:2])
            slides.append(_single(name, case, label, remote, extra={"stage": stages[name]}))
    return slides


def idc(labels: dict[str, str], client: Client, addresses: Addresses) -> list[RemoteSlide]:
    """Slides of collections of the Imaging Data Commons, one class per collection, from the table here.

    Args:
        labels: Class by collection.
        client: Not used: the table is here.
        addresses: Servers.
    """
    return [
        _series(row, labels[row["collection"]], addresses)
        for row in _idc_rows()
        if row["collection"] in labels
    ]


def tcga_brca(client: Client, addresses: Addresses) -> list[RemoteSlide]:
    """Slides of TCGA-BRCA of invasive ductal (IDC) and lobular (ILC) carcinoma.

    The class is the morphology of the primary diagnosis at the Genomic Data Commons: 8500/3 or 8520/3.

    Raises:
        CohortError: The Genomic Data Commons cannot be read.
    """
    classes = {"8500/3": "IDC", "8520/3": "ILC"}
    found = _morphologies(client, addresses.gdc, "TCGA-BRCA")
    slides = []
    for row in _idc_rows():
        kinds = found.get(row["patient"], set()) if row["collection"] == "tcga_brca" else set()
        if len(kinds) == 1 and (label := classes.get(next(iter(kinds)))):
            slides.append(_series(row, label, addresses))
    return slides


def _camelyon_images(client: Client, base: str, folder: str) -> dict[str, RemoteFile]:
    """The slides in a folder of the bucket by name, with the MD5 sums of its `checksums.md5`."""
    sums = {}
    for line in client.read(f"{base}{folder}checksums.md5").decode("utf-8", "replace").splitlines():
        digest, _, name = line.strip().partition(" ")
        if len(digest) == 32:
            sums[name.strip().lstrip("*").removeprefix("./")] = digest
    images = {}
    for key, remote in list_bucket(client, base, f"{folder}images/").items():
        path = PurePosixPath(key)
        if path.suffix == ".tif":
            md5 = sums.get(key.removeprefix(folder)) or sums.get(path.name) or sums.get(key, "")
            images[path.stem] = RemoteFile(remote.url, remote.size, remote.etag, md5)
    if not images:
        raise CohortError(f"{base}{folder}images/: no slides are listed; the bucket has changed")
    return images


def _reference_labels(content: bytes) -> dict[str, str]:
    """Classes of the slides in a table whose first column names them, whatever the others are called."""
    words = {
        **dict.fromkeys(("normal", "negative"), "normal"),
        **dict.fromkeys(("tumor", "positive", "macro", "micro", "itc"), "tumor"),
    }
    labels = {}
    for row in _rows(content):
        said = {words[cell.lower()] for cell in row[1:] if cell.lower() in words}
        if len(said) == 1:
            labels[PurePosixPath(row[0]).stem] = said.pop()
    return labels


def _rows(content: bytes) -> Iterable[list[str]]:
    """Rows of a CSV file with two columns or more."""
    text = io.StringIO(content.decode("utf-8-sig", "replace"))
    return ([cell.strip() for cell in row] for row in csv.reader(text) if len(row) > 1)


def _single(
    name: str,
    case: str,
    label: str,
    remote: RemoteFile,
    split: str | None = None,
    extra: dict[str, str] | None = None,
) -> RemoteSlide:
    """A slide in one file."""
    located = {PurePosixPath(remote.url).name: remote}
    return RemoteSlide(name, case, label, remote.size, 1, lambda client: located, split, extra or {})


def _idc_rows() -> list[dict[str, str]]:
    with IDC_TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def _series(row: dict[str, str], label: str, addresses: Addresses) -> RemoteSlide:
    """A slide whose levels are the files of a DICOM series. One of CPTAC is named by its series as well."""
    tcga = row["collection"].startswith("tcga")
    slide_id = f"{row['patient']}-{row['name'] if tcga else row['series'][:8]}"
    return RemoteSlide(
        slide_id,
        row["patient"],
        label,
        round(1e6 * float(row["megabytes"])),
        int(row["files"]),
        partial(_files_of_series, addresses.idc, row["series"], slide_id),
    )


def _files_of_series(base: str, series: str, slide_id: str, client: Client) -> Located:
    files = list_bucket(client, base, f"{series}/")
    if not files:
        raise CohortError(f"{base}{series}/: is empty; this series has left the Imaging Data Commons")
    return {f"{slide_id}/{PurePosixPath(key).name}": remote for key, remote in files.items()}


def _morphologies(client: Client, base: str, project: str) -> dict[str, set[str]]:
    """Morphologies (ICD-O-3) of the primary diagnosis of each case of a project."""
    wanted = {"op": "in", "content": {"field": "project.project_id", "value": [project]}}
    fields = "submitter_id,diagnoses.morphology,diagnoses.diagnosis_is_primary_disease"
    found: dict[str, set[str]] = {}
    while True:
        params = {"filters": json.dumps(wanted), "fields": fields, "format": "JSON"}
        content = client.read(f"{base}cases", {**params, "size": "1000", "from": str(len(found))})
        try:
            data = json.loads(content)["data"]
            cases = {case["submitter_id"]: _primary(case.get("diagnoses", [])) for case in data["hits"]}
            total = int(data["pagination"]["total"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CohortError(
                f"{base}cases: the answer is no list of cases ({error!r}); try again"
            ) from error
        found |= cases
        if len(found) >= total or not cases:
            return found


def _primary(diagnoses: list[dict]) -> set[str]:
    """Morphologies of the diagnoses that are marked as primary, or of all where none is."""
    marked = [d for d in diagnoses if str(d.get("diagnosis_is_primary_disease")).lower() == "true"]
    return {d["morphology"] for d in marked or diagnoses if d.get("morphology")}
