"""PNG and JPEG files, which Pillow decodes as a whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image as PillowImage
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from hdmil_lib.errors import HDMILError, SlideError
from hdmil_lib.slides.colors import cmyk_to_rgb
from hdmil_lib.slides.decoded import MOST_PIXELS, check_size, decode_once
from hdmil_lib.slides.image import Image
from hdmil_lib.system_errors import refusal

SIGNATURES: dict[bytes, type[ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
}
"""First bytes of the files, and what reads them."""

ROWS = 1024
"""Number of rows that are converted at a time."""

COLOR_MODES = ("RGB", "RGBA", "CMYK")


def is_raster(path: Path) -> bool:
    """Whether a file starts as PNG and JPEG files do."""
    with path.open("rb") as file:
        return _reader(file) is not None


def color_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of a PNG or JPEG file in color, from its header; None for anything else."""
    try:
        with _opened(path) as image:
            return image.size if image.mode in COLOR_MODES else None
    except SlideError:
        return None


def open_raster(path: Path) -> Image:
    """Decode a PNG or JPEG file once; its levels are this one.

    Gray is repeated, 16 bits become 8, palettes are looked up, CMYK is multiplied and transparent pixels are
    laid on white. A rotation in the Exif data is not applied: pixels are where the file stores them.

    Raises:
        SlideError: It is damaged, or has more pixels than Pillow decodes, which is twice its
            `MAX_IMAGE_PIXELS`.
        HDMILError: The system refused to read it.
    """
    with _opened(path) as image:
        width, height = image.size
        guard = PillowImage.MAX_IMAGE_PIXELS
        check_size(path, width, height, MOST_PIXELS if guard is None else min(MOST_PIXELS, 2 * guard))
        try:
            image.load()
        except Exception as error:  # Pillow's decoders raise their own types of errors
            raise _failed(path, "cannot be decoded", error) from error
        decoded = decode_once(path, width, height, _rows(image))
        return Image(str(image.format).lower(), _resolution(image), [decoded.size], decoded)


def _reader(file: IO[bytes]) -> type[ImageFile] | None:
    start = file.read(8)
    return next((reader for first, reader in SIGNATURES.items() if start.startswith(first)), None)


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    """The header of a file, without `Image.open`, which warns of sizes that are checked here anyway."""
    with path.open("rb") as file:
        reader = _reader(file)
        if reader is None:
            raise SlideError(f"{path}: neither PNG nor JPEG.")
        file.seek(0)
        try:
            image = reader(file)
        except Exception as error:  # a damaged header can end in any of Python's errors
            raise _failed(path, "its header cannot be read", error) from error
        yield image


def _failed(path: Path, what: str, error: Exception) -> HDMILError:
    """A SlideError about a damaged file, or another error where the system refused to read it."""
    if isinstance(error, OSError) and error.errno:
        return HDMILError(f"{path}: {refusal(error)}")
    return SlideError(
        f"{path}: {what}: {error}. The file is damaged or incomplete; copy or download it again."
    )


def _rows(image: PillowImage.Image) -> Iterator[np.ndarray]:
    for top in range(0, image.height, ROWS):
        yield _rgb(image.crop((0, top, image.width, min(top + ROWS, image.height))))


def _rgb(image: PillowImage.Image) -> np.ndarray:
    """RGB pixels of an image of any of the modes of PNG and JPEG, uint8 (h, w, 3)."""
    if image.mode == "CMYK":
        return cmyk_to_rgb(np.asarray(image))
    if image.mode.startswith("I"):
        return (
            ((np.asarray(image, np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)[..., None].repeat(3, 2)
        )
    if "A" in image.getbands() or "transparency" in image.info:
        white = PillowImage.new("RGBA", image.size, "white")
        return np.asarray(PillowImage.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _resolution(image: ImageFile) -> dict[str, str]:
    """The pixels per inch that a file states."""
    if "dpi" not in image.info:
        return {}
    name, (x, y) = str(image.format).lower(), image.info["dpi"]
    return {f"{name}.XResolution": str(x), f"{name}.YResolution": str(y), f"{name}.ResolutionUnit": "inch"}
