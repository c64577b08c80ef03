"""OME-TIFF and plain TIFF files: OpenSlide opens them not at all, or without their pyramid and scale."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from struct import unpack

import imagecodecs
import numpy as np
import tifffile

from hdmil_lib.errors import HDMILError, SlideError
from hdmil_lib.slides.codestreams import checked, jpeg2000_header
from hdmil_lib.slides.colors import Converter, converter
from hdmil_lib.slides.decoded import DecodedImage, check_size, decode_once
from hdmil_lib.slides.image import Image
from hdmil_lib.slides.ome import largest_image, ome_xml
from hdmil_lib.slides.stored_tiles import StoredLevel, StoredTiles, all_pages, is_readable, jpeg_level
from hdmil_lib.system_errors import refusal

C = tifffile.COMPRESSION

STREAMS = (C.NONE, C.LZW, C.ADOBE_DEFLATE, C.DEFLATE, C.PACKBITS, C.ZSTD, C.LZMA)
"""Compressions whose output tifffile limits to the size of a tile or strip."""

JPEG_2000 = checked(imagecodecs.jpeg2k_decode, jpeg2000_header)
"""The decoders of the other pictures compare the sizes before they decode, that of JPEG 2000 after it."""

PICTURES: dict[int, Callable[..., np.ndarray]] = {
    C.WEBP: imagecodecs.webp_decode,
    **dict.fromkeys((C.JPEG2000, C.JPEG_2000_LOSSY, C.APERIO_JP2000_RGB), JPEG_2000),
    C.JPEGXL: imagecodecs.jpegxl_decode,
}
"""Compressions whose tiles are pictures with a header of their own, held to the size of the tile."""

LARGEST_STRIP = 2**28
"""Largest number of samples of a strip, which is decoded in memory, and of pixels of a tile."""

MOST_TILES = 2**23
"""Largest number of tiles of a level: 740,000 x 740,000 pixels in tiles of 256."""

REDUCED, MASK = 1, 4
"""Bits of the tag NewSubfileType."""

Decoder = Callable[..., np.ndarray]
"""Takes the bytes of the planes of a tile or strip, its index, (height, width); returns its samples."""


def is_ome(path: Path) -> bool:
    """Whether a file is a TIFF with OME-XML, whose pyramid and physical size OpenSlide does not know."""
    try:
        with tifffile.TiffFile(path) as file:
            return ome_xml(file) is not None
    except Exception:  # a damaged directory can end in any of Python's errors
        return False


def has_color(path: Path) -> bool:
    """Whether the samples of the first page have one meaning as a color image; True where it is not known."""
    try:
        with tifffile.TiffFile(path) as file:
            page = _page(file.pages[0])
    except Exception:  # a damaged directory can end in any of Python's errors
        return True
    try:
        converter(page)
    except ValueError:
        return False
    return True


def tiff_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of the largest page of a TIFF file; None if it cannot be found out."""
    try:
        with tifffile.TiffFile(path) as file:
            return max(((p.imagewidth, p.imagelength) for p in all_pages(file)), key=max, default=None)
    except Exception:  # a damaged directory can end in any of Python's errors
        return None


def check_tiles(path: Path) -> None:
    """Refuse a TIFF file whose tiles would take more memory than there can be in one: OpenSlide trusts them.

    Raises:
        SlideError: A tile says that it is longer than the file, or there are larger or more tiles than in any
            slide.
    """
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page for page in all_pages(file) if page.is_tiled]
            longest = max((max(page.databytecounts, default=0) for page in pages), default=0)
            most = max((page.tilewidth * page.tilelength for page in pages), default=0)
            number = max((math.prod(page.chunked) for page in pages), default=0)
    except Exception:  # a damaged directory can end in any of Python's errors; its reader says so
        return
    size = path.stat().st_size
    if longest > size or most > LARGEST_STRIP or number > MOST_TILES:
        raise SlideError(
            f"{path}: its directory speaks of {number:,} tiles of up to {most:,} pixels and {longest:,} "
            f"bytes in a file of {size:,} bytes. It is damaged; copy or download it again."
        )


def open_tiff(path: Path) -> Image:
    """Open a TIFF or BigTIFF file, tiled or in strips; the pyramid of an OME-TIFF is in its SubIFDs.

    The tiles of a tiled file are decoded when they are read. A file in strips is decoded once, or read where
    it lies if it is not compressed.

    Raises:
        SlideError: It is damaged, too large for strips, or stores what is not one color picture.
        HDMILError: The system refused to read it.
    """
    try:
        with tifffile.TiffFile(path) as file:
            return _open(path, file)
    except SlideError:
        raise
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    except Exception as error:  # a damaged directory can end in any of Python's errors
        if isinstance(error, OSError) and error.errno:
            raise HDMILError(f"{path}: {refusal(error)}") from error
        raise _unreadable(path, "its directory is damaged or cut off") from error


def _unreadable(path: Path, why: str) -> SlideError:
    return SlideError(
        f"{path}: not a slide that can be read: {why}. If it opens in another program, convert it to a tiled "
        "pyramidal RGB TIFF; otherwise copy or download it again."
    )


def _open(path: Path, file: tifffile.TiffFile) -> Image:
    if not _ends(file):
        raise ValueError("it was cut off before its last directory")
    xml = ome_xml(file)
    if xml is None:
        main, properties, vendor = _largest(file), {}, "tiff"
    else:
        image = largest_image(xml)
        if image.page >= len(file.pages):
            raise ValueError(f"its OME-XML speaks of directory {image.page}, which it does not have")
        main, properties, vendor = _page(file.pages[image.page]), image.properties, "ome-tiff"
        if (main.imagewidth, main.imagelength) != (image.width, image.height):
            raise ValueError(
                f"its OME-XML says {image.width} x {image.height} pixels, its directory {main.imagewidth} x "
                f"{main.imagelength}"
            )
    _check(main)
    properties = _resolution(main) | properties
    if not main.is_tiled:
        decoded = _decoded(path, main)
        return Image(vendor, properties, [decoded.size], decoded)
    pages = [main, *_reduced(file, main)]
    tiles = StoredTiles(path, [_tiled_level(page) for page in pages])
    return Image(vendor, properties, [(p.imagewidth, p.imagelength) for p in pages], tiles)


def _page(page: tifffile.TiffPage | tifffile.TiffFrame) -> tifffile.TiffPage:
    return page if isinstance(page, tifffile.TiffPage) else page.aspage()


def _largest(file: tifffile.TiffFile) -> tifffile.TiffPage:
    """The page with most pixels; files without OME-XML do not say which of several is meant."""
    pages = [page for page in all_pages(file) if not int(page.subfiletype) & MASK]
    sizes = [(page.imagewidth, page.imagelength) for page in pages]
    index = max(range(len(pages)), key=lambda i: sizes[i][0] * sizes[i][1])
    if (n := sizes.count(sizes[index])) > 1:
        raise ValueError(f"it is a stack of {n} images of one size; export one of them")
    return pages[index]


def _ends(file: tifffile.TiffFile) -> bool:
    """Whether the last directory says so; in a file that was cut off another one was to follow."""
    layout, stream, last = file.tiff, file.filehandle, file.pages[-1].offset
    stream.seek(last)
    n_tags = unpack(layout.tagnoformat, stream.read(layout.tagnosize))[0]
    stream.seek(last + layout.tagnosize + n_tags * layout.tagsize)
    return unpack(layout.offsetformat, stream.read(layout.offsetsize))[0] == 0


def _check(page: tifffile.TiffPage) -> None:
    """Refuse, in words, what is not one color picture."""
    converter(page)
    if page.imagedepth != 1:
        raise ValueError("it stores a volume")
    if page.compression not in (C.JPEG, *STREAMS, *PICTURES):
        name = getattr(page.compression, "name", str(page.compression))
        raise ValueError(f"its compression {name} is not known")
    if page.compression == C.JPEG and page.bitspersample != 8:
        raise ValueError("it stores JPEG of more than 8 bits")
    if page.imagewidth < 1 or page.imagelength < 1:
        raise ValueError("its directory says that it has no pixels")


def _reduced(file: tifffile.TiffFile, main: tifffile.TiffPage) -> list[tifffile.TiffPage]:
    """The coarser levels of an image: its SubIFDs, or pages that say that they are reduced; finest first."""
    candidates = [
        *(main.pages or ()),
        *(page for page in all_pages(file) if int(page.subfiletype) & REDUCED),
    ]
    levels: dict[int, tifffile.TiffPage] = {}
    for page in map(_page, candidates):
        ratios = main.imagewidth / max(1, page.imagewidth), main.imagelength / max(1, page.imagelength)
        is_level = min(ratios) > 1 and _same_shape(main, page, max(ratios)) and page.is_tiled
        if is_level and not int(page.subfiletype) & MASK:
            _check(page)
            levels.setdefault(page.imagewidth, page)
    return [levels[width] for width in sorted(levels, reverse=True)]


def _same_shape(main: tifffile.TiffPage, page: tifffile.TiffPage, ratio: float) -> bool:
    """Whether a page can be the same picture, up to two pixels: sizes are rounded at each level."""
    return (
        abs(main.imagewidth / ratio - page.imagewidth) <= 2
        and abs(main.imagelength / ratio - page.imagelength) <= 2
    )


def _resolution(page: tifffile.TiffPage) -> dict[str, str]:
    """The resolution of a page and its unit, by OpenSlide's names of these properties."""
    values = {axis: page.tags.valueof(f"{axis}Resolution") for axis in "XY"}
    found = {f"tiff.{axis}Resolution": str(v[0] / v[1]) for axis, v in values.items() if v and v[1]}
    unit = getattr(page.tags.valueof("ResolutionUnit", 2), "name", "inch").lower()
    if page.is_imagej and "unit=micron" in page.description:
        unit = "micron"
    return found | {"tiff.ResolutionUnit": unit} if found else {}


def _tiled_level(page: tifffile.TiffPage) -> StoredLevel:
    if is_readable(page) and page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR):
        level = jpeg_level(page)
    else:
        planes = page.samplesperpixel if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else 1
        places = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
        shape = page.tilelength, page.tilewidth
        decode = partial(_into, decode=_decoder(page), to_rgb=converter(page), shape=shape)
        level = StoredLevel(page, *places, decode, False, False, planes)
    if not level.is_sound:
        raise ValueError("its directory does not say where all tiles are, or their size is not credible")
    if (level.offsets + level.sizes).max() > page.parent.filehandle.size:
        raise ValueError("it was cut off: tiles of its directory lie behind its end")
    return level


def _into(
    *parts: bytes, out: np.ndarray, decode: Decoder, to_rgb: Converter, shape: tuple[int, int]
) -> np.ndarray:
    """Decode a tile into `out`, uint8 (h, w, 3)."""
    out[:] = to_rgb(decode(parts, 0, shape))
    return out


def _decoder(page: tifffile.TiffPage) -> Decoder:
    """What decodes a tile or strip of a page to samples, (h, w, samples)."""
    dtype, planar = page.dtype, page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    samples = 1 if planar else page.samplesperpixel
    if page.compression in STREAMS:
        stream = page.decode

        def decode(data: bytes, index: int, shape: tuple[int, int]) -> np.ndarray:
            pixels = stream(data, index)[0]
            return np.asarray(pixels).reshape(*shape, samples)
    else:
        picture = PICTURES.get(page.compression) or jpeg_level(page).decode

        def decode(data: bytes, index: int, shape: tuple[int, int]) -> np.ndarray:
            out = np.empty(shape if samples == 1 else (*shape, samples), dtype)
            return picture(data, out=out).reshape(*shape, samples)

    def decode_all(parts: tuple[bytes, ...], index: int, shape: tuple[int, int]) -> np.ndarray:
        return np.concatenate([decode(part, index, shape) for part in parts], axis=-1)

    return decode_all


def _decoded(path: Path, page: tifffile.TiffPage) -> DecodedImage:
    """An image in strips: read where it lies if it is not compressed, else decoded once."""
    width, height, planar = (
        page.imagewidth,
        page.imagelength,
        page.planarconfig == tifffile.PLANARCONFIG.SEPARATE,
    )
    if page.is_memmappable:
        shape = (page.samplesperpixel, height, width) if planar else (height, width, page.samplesperpixel)
        if page.dataoffsets[0] + page.nbytes > page.parent.filehandle.size:
            raise ValueError("it was cut off: its pixels reach behind its end")
        kind = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
        samples = np.memmap(path, kind, mode="r", offset=page.dataoffsets[0], shape=shape)
        return DecodedImage(np.moveaxis(samples, 0, -1) if planar else samples, converter(page))
    check_size(path, width, height)
    return decode_once(path, width, height, _strips(path, page))


def _strips(path: Path, page: tifffile.TiffPage) -> Iterator[np.ndarray]:
    """RGB pixels of the strips of a page, from the top on, uint8 (h, w, 3)."""
    height, rows = page.imagelength, min(page.rowsperstrip, page.imagelength)
    n_strips = -(-height // max(1, rows))
    planes = page.samplesperpixel if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else 1
    if rows < 1 or not len(page.dataoffsets) == len(page.databytecounts) == planes * n_strips:
        raise ValueError("its directory does not say where all strips are")
    if rows * page.imagewidth * page.samplesperpixel > LARGEST_STRIP:
        raise ValueError(
            f"a strip has {rows} x {page.imagewidth} pixels, which are too many to be decoded at once"
        )
    decode, to_rgb, file = _decoder(page), converter(page), page.parent.filehandle
    for strip in range(n_strips):
        parts = []
        for index in range(strip, planes * n_strips, n_strips):
            file.seek(page.dataoffsets[index])
            parts.append(file.read(page.databytecounts[index]))
        shape = (min(rows, height - strip * rows), page.imagewidth)
        try:
            yield to_rgb(decode(tuple(parts), strip, shape))
        except Exception as error:  # each codec raises its own types of errors
            raise SlideError(
                f"{path}: cannot read its rows from {strip * rows} on: {error}. The file is damaged or "
                "incomplete; copy or download it again."
            ) from error
