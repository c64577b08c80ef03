"""Which reader takes a file: OpenSlide, or one of ours for what OpenSlide does not open."""

import os
from pathlib import Path
from typing import NamedTuple

from hdmil_lib.errors import SlideError
from hdmil_lib.slides.image import Image
from hdmil_lib.slides.openslide_file import CONVERT, OpenSlideFile, detect
from hdmil_lib.slides.raster import color_size, is_raster, open_raster
from hdmil_lib.slides.tiff_image import check_tiles, has_color, is_ome, open_tiff, tiff_size

GENERIC = "generic-tiff"
"""OpenSlide's name of tiled TIFF files without a vendor; of OME-TIFF it reads the finest level alone."""

FOREIGN = {
    ".vsi": "Olympus",
    ".isyntax": "Philips",
    ".i2syntax": "Philips",
    ".kfb": "KFBIO",
    ".sdpc": "SQRAY",
}
"""Suffixes of slides that no reader knows, and whose they are. A .vsi file is a TIFF with previews alone."""

KEY_FILES = (".vms", ".vmu")
"""Suffixes of Hamamatsu's files that name those with the pixels."""

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_file(path: Path) -> OpenSlideFile | Image:
    """Open a slide with the reader that knows most of it.

    OpenSlide takes the formats that it knows. `tiff_image` takes OME-TIFF, TIFF in strips and compressions of
    TIFF that OpenSlide lacks; `raster` PNG and JPEG.

    Raises:
        SlideError: No reader knows the file, or it is damaged.
    """
    vendor = detect(path)
    if vendor in (None, GENERIC) and (maker := FOREIGN.get(path.suffix.lower())):
        raise SlideError(f"{path}: not supported: {path.suffix} files of {maker}. {CONVERT}")
    if vendor == GENERIC and (is_ome(path) or not has_color(path)):
        return open_tiff(path)  # which says what is wrong with the colors
    if vendor == GENERIC:
        try:
            return OpenSlideFile(path)
        except SlideError:  # a compression that it lacks, or damage, of which our reader knows more
            return open_tiff(path)
    if vendor is None and is_raster(path):
        return open_raster(path)
    if vendor is None and is_tiff(path):
        return open_tiff(path)
    return OpenSlideFile(path)


def check_file(path: Path) -> None:
    """Raise a SlideError if a file is missing, closed to us, empty, without its other files or hostile."""
    if path.is_dir():
        raise SlideError(f"{path}: is a folder without slides, not a slide. Check the path of the slide.")
    if path.is_symlink() and not path.is_file():
        raise SlideError(f"{path}: links to {path.readlink()}, which is not there. Mend the link.")
    if not path.is_file():
        raise SlideError(f"{path}: no such file. Check the path of the slide.")
    if not os.access(path, os.R_OK):
        raise SlideError(f"{path}: no permission to read it. Change its permissions.")
    if path.stat().st_size == 0:
        raise SlideError(f"{path}: is empty. Copy or download it again.")
    if path.name.startswith("._"):
        raise SlideError(f"{path}: written by macOS beside {path.name[2:]}, not a slide; name that file.")
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        raise SlideError(
            f"{path}: its folder {path.stem}/ is missing, which holds the pixels; copy it beside the file."
        )
    needed = [name for key, name in named_images(path).items() if key.count(",") < 2]  # not other depths
    if missing := [name for name in needed if not (path.parent / name).is_file()]:
        raise SlideError(f"{path}: {missing[0]} is missing, which holds pixels; copy it beside the file.")
    if is_tiff(path):
        check_tiles(path)


def named_images(path: Path) -> dict[str, str]:
    """Names of the files with the pixels of a .vms or .vmu file, by their keys; none for other files."""
    if path.suffix.lower() not in KEY_FILES:
        return {}
    try:
        with path.open(errors="replace") as file:
            pairs = [line.strip().split("=", 1) for line in file.read(2**20).splitlines() if "=" in line]
    except OSError:  # `check_file` says why when the slide is opened
        return {}
    return {key: name for key, name in pairs if key.startswith(("ImageFile", "MapFile")) and name}


def is_tiff(path: Path) -> bool:
    """Whether a file starts as TIFF and BigTIFF files do."""
    with path.open("rb") as file:
        return file.read(4) in TIFF_SIGNATURES


def image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of a color PNG or JPEG, or of a TIFF, from its header; None for anything else."""
    try:
        return tiff_size(path) if is_tiff(path) else color_size(path)
    except OSError:
        return None


class Series(NamedTuple):
    """The DICOM series of a file.

    Attributes:
        uid: Its identifier.
        container: Name of the glass slide; may be empty.
    """

    uid: str
    container: str


def series_of(path: Path) -> Series | None:
    """The DICOM series to which a slide file belongs; None for other files and damaged ones."""
    try:
        with path.open("rb") as file:
            file.seek(128)
            if file.read(4) != b"DICM":
                return None
    except OSError:  # `check_file` says why when the slide is opened
        return None
    try:
        slide = OpenSlideFile(path)
    except SlideError:
        return None
    slide.close()
    uid = slide.properties.get("dicom.SeriesInstanceUID")
    return Series(uid, slide.properties.get("dicom.ContainerIdentifier", "").strip()) if uid else None
