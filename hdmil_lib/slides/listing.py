"""Which files are slides: folders are walked, readers are asked, and each slide is listed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import openslide

from hdmil_lib.errors import CohortError, SlideError
from hdmil_lib.slides.scale import IfUnknown
from hdmil_lib.storage import read_table

SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".svslide", ".vms", ".vmu", ".bif", ".dcm"),
    *(".czi", ".btf"),
)
"""Suffixes of slides. Other files in a folder are slides if OpenSlide knows their format."""

NO_SLIDES = (
    *(".csv", ".txt", ".json", ".geojson", ".xml", ".h5", ".pt", ".png", ".jpg", ".jpeg", ".md", ".py"),
    *(".ini", ".dat", ".npz", ".npy", ".pdf", ".zip"),
)
"""Suffixes that are passed over without asking."""

Source = str | Path


@dataclass(frozen=True)
class SlideFile:
    """A slide to be read.

    Attributes:
        path: Its file; for DICOM one of its files.
        slide_id: Its name: that of a table, else of the file.
        mpp: Micrometers per level-0 pixel that a table says.
    """

    path: Path
    slide_id: str
    mpp: float | None = None

    def scale(self, mpp: float | tuple[float, float] | None) -> float | tuple[float, float] | None:
        """The `mpp` with which this slide is opened: what the caller forces, the table says, or fills in."""
        if self.mpp is None or (mpp is not None and not isinstance(mpp, IfUnknown)):
            return mpp
        return self.mpp


def slide_files(sources: Source | Sequence[Source]) -> list[Path]:
    """Paths of `list_slides`."""
    return [slide.path for slide in list_slides(sources)]


def list_slides(sources: Source | Sequence[Source]) -> list[SlideFile]:
    """List the slides of files, folders and tables, each once, in their order.

    Folders are searched with all folders below. Hidden files, such as those that macOS writes beside others,
    are passed over. The files of a DICOM series are one slide.

    Args:
        sources: A slide file, folder, CSV file with a column `path` (relative to it) and optionally
            `slide_id` and `mpp`, or several of these.

    Raises:
        SlideError: A folder or table names no slide, or nothing is named.
        CohortError: A table is missing, cannot be read, or has no column `path`.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    slides: dict[Path, SlideFile] = {}
    for source in map(Path, sources):
        if source.is_dir():
            found = [SlideFile(path, path.stem) for path in _in_folder(source)]
        elif source.suffix.lower() == ".csv":
            found = _in_table(source)
        else:
            found = [SlideFile(source, source.stem)]
        if not found:
            raise SlideError(
                f"{source}: no slides in it; known suffixes are {', '.join(SLIDE_SUFFIXES)}, and whatever "
                "OpenSlide reads"
            )
        for slide in found:
            slides.setdefault(slide.path, slide)
    if not slides:
        raise SlideError("no slides are named; give slide files, a folder, or a CSV with a column `path`")
    return list(slides.values())


def _in_folder(folder: Path) -> list[Path]:
    """Slide files of a folder and of those below it, sorted."""
    paths = [path for path in _walk(folder) if _is_slide(path)]
    dicom = [path for path in paths if path.suffix.lower() in ("", ".dcm")]
    return sorted({*paths} - {*dicom} | {*_one_per_series(dicom)})


def _walk(folder: Path) -> Iterator[Path]:
    """Files that are not hidden; the data folder of a .mrxs file belongs to that file."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.with_suffix(".mrxs").is_file():
                yield from _below(path)
        else:
            yield path


def _below(folder: Path) -> list[Path]:
    """Files below a folder; the folder itself if it is called like a slide and holds none, to be reported."""
    found = list(_walk(folder))
    named = folder.suffix.lower() in SLIDE_SUFFIXES
    return [folder] if named and not any(map(_is_slide, found)) else found


def _is_slide(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in SLIDE_SUFFIXES:
        return True
    if suffix in NO_SLIDES:
        return False
    try:
        return openslide.OpenSlide.detect_format(path) is not None
    except openslide.OpenSlideError:
        return False


def _one_per_series(paths: Sequence[Path]) -> list[Path]:
    """The first file of each DICOM series; files that cannot be opened stay, so that they are reported."""
    series: dict[object, Path] = {}
    for path in sorted(paths):
        try:
            with openslide.OpenSlide(path) as slide:
                key: object = slide.properties.get(openslide.PROPERTY_NAME_QUICKHASH1) or path
        except openslide.OpenSlideError:
            key = path
        series.setdefault(key, path)
    return list(series.values())


def _in_table(source: Path) -> list[SlideFile]:
    table = read_table(source)
    if "path" not in table:
        raise CohortError(f"{source}: missing column path; it has {', '.join(table.columns)}")
    slides = []
    for row in table[table["path"].notna()].to_dict("records"):
        path = source.parent / row["path"]
        name = row.get("slide_id")
        slide_id = name if isinstance(name, str) else path.stem
        if not is_file_name(slide_id):
            raise CohortError(
                f"{source}: slide_id {slide_id!r} cannot be the name of a bag; leave out slashes, control "
                "characters and dots in front"
            )
        slides.append(SlideFile(path, slide_id, _number(row, source)))
    return slides


def is_file_name(name: str) -> bool:
    """Whether a name can be that of a file in any folder, and of no other."""
    return name.isprintable() and not name.startswith(".") and not any(c in name for c in "/\\")


def _number(row: dict, source: Path) -> float | None:
    value = row.get("mpp")
    if not isinstance(value, str):
        return None
    try:
        return float(value)
    except ValueError:
        raise CohortError(
            f"{source}: mpp of {row['path']} is {value!r}, expected a number of um/px"
        ) from None
