"""Which files are slides: folders are walked, readers are asked, and each slide is listed once.

In a folder a PNG or JPEG file, or a TIFF without stored tiles, is a slide if one of its sides has at least
`LARGE_IMAGE` pixels, and if it is in color and is not named after another slide of the folder: tiles, masks,
thumbnails and figures are not. A file that is named itself is always taken for a slide.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hdmil_lib.errors import CohortError, HDMILError, SlideError
from hdmil_lib.slides.formats import FOREIGN, KEY_FILES, image_size, named_images, series_of
from hdmil_lib.slides.openslide_file import detect
from hdmil_lib.slides.scale import FromTable, IfUnknown
from hdmil_lib.storage import read_table, readable

SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".svslide", *KEY_FILES, ".bif", ".dcm"),
    *(".czi", ".btf", *FOREIGN),
)
"""Suffixes of slides: such files are listed even if no reader knows them, so that they are reported."""

NO_SLIDES = (
    *(".csv", ".txt", ".json", ".geojson", ".xml", ".h5", ".pt", ".md", ".py"),
    *(".ini", ".dat", ".npz", ".npy", ".pdf", ".zip"),
)
"""Suffixes that are passed over without asking."""

LARGE_IMAGE = 4096
"""Pixels that the longer side of an image without stored tiles must have to be a slide of its folder."""


@dataclass(frozen=True)
class SlideFile:
    """A slide to be read.

    Attributes:
        path: Its file; for DICOM one of its files.
        slide_id: Its name: that of a table, of the container of a DICOM series, else of the file.
        mpp: Micrometers per level-0 pixel that a table says.
    """

    path: Path
    slide_id: str
    mpp: float | None = None

    def scale(self, mpp: float | tuple[float, float] | None) -> float | tuple[float, float] | None:
        """The `mpp` with which this slide is opened: what the caller forces, the table says, or fills in."""
        if self.mpp is None or (mpp is not None and not isinstance(mpp, IfUnknown)):
            return mpp
        return FromTable(self.mpp)


Source = str | Path | SlideFile


def names_of(files: Sequence[SlideFile], error: type[HDMILError] = SlideError) -> dict[SlideFile, str]:
    """Names of slides as text that can be printed and stored.

    Raises:
        HDMILError: Of the given class: two slides have the same name.
    """
    names = {file: readable(file.slide_id) for file in files}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise error(
            f"several slides are called {twice[0]!r}; name them in a CSV with the columns slide_id and path"
        )
    return names


def slide_files(sources: Source | Sequence[Source]) -> list[Path]:
    """Paths of `list_slides`."""
    return [slide.path for slide in list_slides(sources)]


def list_slides(sources: Source | Sequence[Source]) -> list[SlideFile]:
    """List the slides of files, folders and tables, each once, in their order.

    Folders are searched with all folders below. Hidden files, such as those that macOS writes beside others,
    are passed over, and images as the module says. Links to folders are followed, each folder once. A file
    that is reached on two ways under one name is one slide, and so are the files of a DICOM series.

    Args:
        sources: A slide file, folder, CSV file with a column `path` (relative to it) and optionally
            `slide_id` and `mpp`, or several of these; slides that are listed already stay as they are.

    Raises:
        SlideError: A folder or table names no slide, or nothing is named.
        CohortError: A table is missing, cannot be read, has no column `path`, or gives a file two names.
    """
    if isinstance(sources, str | Path | SlideFile):
        sources = [sources]
    slides: list[SlideFile] = []
    for given in sources:
        if isinstance(given, SlideFile):
            slides.append(given)
            continue
        source = Path(given)
        if source.is_dir():
            found = _in_folder(source)
        elif source.suffix.lower() == ".csv":
            found = _in_table(source)
        else:
            found = [SlideFile(source, source.stem)]
        if not found:
            raise SlideError(f"{source}: no slides in it; {_what_is_known(source)}")
        slides += found
    if not slides:
        raise SlideError("no slides are named; give slide files, a folder, or a CSV with a column `path`")
    return _one_per_series(_once(slides))


def _once(slides: Iterable[SlideFile]) -> list[SlideFile]:
    """The slides without repetitions: of a path, however it is written, or of a file under the same name."""
    kept: list[SlideFile] = []
    seen: set[object] = set()
    for slide in slides:
        path = os.path.join(os.path.realpath(slide.path.parent), slide.path.name)
        file = (os.path.realpath(path), slide.slide_id)
        if not seen & {path, file}:
            kept.append(slide)
        seen |= {path, file}
    return kept


def _what_is_known(source: Path) -> str:
    """What would have been a slide."""
    n_small = sum(image_size(path) is not None for path in _walk(source, set())) if source.is_dir() else 0
    if n_small:
        return (
            f"{n_small} images in it have no side of {LARGE_IMAGE} pixels, no color, or the name of a slide. "
            "If they are slides, name the files, or list them in a CSV with a column `path`"
        )
    return f"known suffixes are {', '.join(SLIDE_SUFFIXES)}, and whatever a reader knows"


def _in_folder(folder: Path, seen: Iterable[str] = ()) -> list[SlideFile]:
    """Slide files of a folder and of those below it, sorted; folders that were seen are passed over."""
    slides: list[Path] = []
    images: list[Path] = []
    for path in _walk(folder, {*seen}):
        if path.suffix.lower() in NO_SLIDES:
            continue
        if detect(path) is not None or path.suffix.lower() in FOREIGN:
            slides.append(path)
        elif size := image_size(path):
            if max(size) >= LARGE_IMAGE:
                images.append(path)
        elif path.suffix.lower() in SLIDE_SUFFIXES:
            slides.append(path)
    slides += [path for path in images if not any(_belongs(path, slide) for slide in slides)]
    return [SlideFile(path, path.stem) for path in sorted(slides)]


def _belongs(image: Path, slide: Path) -> bool:
    """Whether an image beside a slide has its name, or is a part of it: .vms files list their JPEGs."""
    if image.parent != slide.parent:
        return False
    if image.name in named_images(slide).values():
        return True
    return image.stem == slide.stem or image.stem.startswith(tuple(slide.stem + mark for mark in "_-. "))


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Files that are not hidden; the data folder of a .mrxs file belongs to that file.

    Args:
        folder: The folder, with all below.
        seen: Folders that were walked already, with links resolved: a link may lead back to one. It grows.
    """
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise SlideError(
            f"{folder}: the folder cannot be read ({error.strerror}); change its permissions or name files"
        ) from error
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.with_suffix(".mrxs").is_file():
                yield from _below(path, seen)
        elif path.is_file() or path.is_symlink():
            yield path


def _below(folder: Path, seen: set[str]) -> list[Path]:
    """Files below a folder; the folder itself if it is called like a slide and holds none, to be reported."""
    if folder.suffix.lower() in SLIDE_SUFFIXES and not _in_folder(folder, seen):
        return [] if os.path.realpath(folder) in seen else [folder]
    return list(_walk(folder, seen))


def _one_per_series(slides: Iterable[SlideFile]) -> list[SlideFile]:
    """The first file of each DICOM series, named by its container; other files stay as they are.

    Where two series have one container, the end of their identifiers is added.
    """
    listed: dict[object, SlideFile] = {}
    for slide in slides:
        series = series_of(slide.path) if slide.path.is_file() else None
        if series is None:
            listed[slide.path] = slide
        elif slide.slide_id == slide.path.stem:
            name = series.container if is_file_name(series.container) else slide.path.parent.resolve().name
            listed.setdefault(series.uid, replace(slide, slide_id=name))
        else:
            listed.setdefault(series.uid, slide)
    names = Counter(slide.slide_id for slide in listed.values())
    return [
        replace(slide, slide_id=f"{slide.slide_id}_{key[-8:]}")
        if isinstance(key, str) and names[slide.slide_id] > 1
        else slide
        for key, slide in listed.items()
    ]


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
    _check_one_name(slides, source)
    return slides


def _check_one_name(slides: Sequence[SlideFile], source: Path) -> None:
    """Refuse a table that gives a file two names, under which it could stand in training and test parts."""
    name_of: dict[Path, str] = {}
    for slide in slides:
        first = name_of.setdefault(slide.path, slide.slide_id)
        if first != slide.slide_id:
            raise CohortError(
                f"{source}: {slide.path.name} is listed as {first!r} and as {slide.slide_id!r}; keep one row "
                "per file, or correct `path`"
            )


def is_file_name(name: str) -> bool:
    """Whether a name can be that of a file in any folder, and of no other."""
    return (
        bool(name) and name.isprintable() and not name.startswith(".") and not any(c in name for c in "/\\")
    )


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
