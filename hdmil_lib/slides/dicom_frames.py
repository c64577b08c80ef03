"""The frames of a DICOM series as stored tiles: each is decoded once, as those of a TIFF slide are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import imagecodecs
import numpy as np

from hdmil_lib.slides.codestreams import checked, checked_jpeg, jpeg2000_header
from hdmil_lib.slides.stored_tiles import StoredLevel, StoredTiles

if TYPE_CHECKING:
    from pydicom import Dataset

JPEG_BASELINE, *JPEG_2000 = (f"1.2.840.10008.1.2.4.{number}" for number in (50, 90, 91))
"""Transfer syntaxes of frames that are read here."""

TAGS = (
    *("ImageType", "DimensionOrganizationType", "NumberOfFrames", "NumberOfOpticalPaths"),
    *("TotalPixelMatrixColumns", "TotalPixelMatrixRows", "TotalPixelMatrixFocalPlanes", "Columns", "Rows"),
    *("SamplesPerPixel", "BitsAllocated", "PhotometricInterpretation"),
)
"""What of the header is read."""

HEADER = 2**16
"""Number of bytes of a file in which the identifier of its series is looked for before it is parsed."""


@dataclass(frozen=True)
class FrameLayout:
    """How the frames of an instance lie on its image, by the names that tifffile has for tiles."""

    imagewidth: int
    imagelength: int
    tilewidth: int
    tilelength: int
    jpegtables: bytes | None = None


def open_frames(
    path: Path, properties: Mapping[str, str], sizes: Sequence[tuple[int, int]]
) -> StoredTiles | None:
    """Open the series of a DICOM file whose levels have these (width, height).

    None if a level is stored in another way than as JPEG or JPEG 2000 frames of the whole image in their
    order, one fragment each, or if this is not sure. OpenSlide then reads it.
    """
    uid = properties.get("dicom.SeriesInstanceUID", "")
    try:
        levels: dict[tuple[int, int], StoredLevel] = {}
        for instance in _instances(path.parent, uid):
            level = _level(instance)
            if level is not None:
                size = level.page.imagewidth, level.page.imagelength
                if size in levels:
                    return None
                levels[size] = level
        if not all(size in levels for size in sizes):
            return None
        return StoredTiles(path, [levels[size] for size in sizes])
    except Exception:  # a damaged header can end in any of Python's errors
        return None


def _instances(folder: Path, uid: str) -> Iterator[Path]:
    """The DICOM files of a folder in which the identifier of the series occurs."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(HEADER)
            if start[128:132] == b"DICM" and uid.encode() in start:
                yield path


def _level(path: Path) -> StoredLevel | None:
    from pydicom import dcmread  # a tenth of a second that other slides need not wait for

    with path.open("rb") as file:
        header = dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
        decode = _decoder(header)
        if decode is None:
            return None
        layout = FrameLayout(
            *(header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows, header.Columns, header.Rows)
        )
        offsets, lengths = _fragments(file)
    is_jpeg = header.file_meta.TransferSyntaxUID == JPEG_BASELINE
    stores_rgb = is_jpeg and header.PhotometricInterpretation == "RGB"
    level = StoredLevel(layout, offsets, lengths, decode, is_jpeg, stores_rgb, path=path)
    is_whole = header.NumberOfFrames == level.n_tiles and bool((lengths > 0).all())
    is_whole = is_whole and offsets[-1] + lengths[-1] <= path.stat().st_size
    return level if level.is_sound and is_whole else None


def _decoder(header: "Dataset") -> Callable[..., np.ndarray] | None:
    """What decodes the frames of an instance; None if they are of another kind, or of a label or overview."""
    is_plain = (
        header.get("DimensionOrganizationType") == "TILED_FULL"
        and header.ImageType[2] == "VOLUME"
        and header.SamplesPerPixel == 3
        and header.BitsAllocated == 8
        and header.get("NumberOfOpticalPaths", 1) == header.get("TotalPixelMatrixFocalPlanes", 1) == 1
    )
    syntax, colors = header.file_meta.TransferSyntaxUID, header.PhotometricInterpretation
    if is_plain and syntax == JPEG_BASELINE and colors in ("RGB", "YBR_FULL_422", "YBR_FULL"):
        stored = "RGB" if colors == "RGB" else "YCBCR"
        decode = partial(imagecodecs.jpeg8_decode, colorspace=stored, outcolorspace="RGB")
        return checked_jpeg(decode)
    if is_plain and syntax in JPEG_2000 and colors in ("RGB", "YBR_RCT", "YBR_ICT"):
        return checked(imagecodecs.jpeg2k_decode, jpeg2000_header)
    return None


def _fragments(file: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths of the fragments of a file that stands before its pixel data."""
    from pydicom.encaps import parse_basic_offsets, parse_fragments

    file.seek(12, 1)  # tag, value representation and length of the element
    parse_basic_offsets(file)
    items = np.array(parse_fragments(file)[1], np.int64)
    file.seek(items[-1] + 4)
    last = int.from_bytes(file.read(4), "little")
    return items + 8, np.append(np.diff(items) - 8, last)
