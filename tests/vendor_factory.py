"""Small TIFF slides built directory by directory, with the marks and oddities of scanners."""

import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from PIL import Image

JPEG, APERIO_YCBCR, APERIO_RGB = 7, 33003, 33005
"""Compressions of tiles."""


@dataclass
class Directory:
    """A tiled image of a TIFF file.

    Attributes:
        pixels: RGB pixels, uint8 (h, w, 3).
        tile: Side of its tiles.
        compression: `JPEG`, `APERIO_YCBCR` or `APERIO_RGB`.
        colors: How JPEG tiles store their colors, "ycbcr" or "rgb".
        photometric: What the directory says of the colors, if it is not "ycbcr" as that of other JPEG tiles.
        empty: Tiles of which the file has no bytes.
        size: (width, height) that the directory says, if it is not that of the pixels.
        options: Further arguments of `TiffWriter.write`.
        jpeg: Options with which Pillow writes JPEG tiles, such as "progressive"; none for imagecodecs.
    """

    pixels: np.ndarray
    tile: int = 64
    compression: int = JPEG
    colors: str = "ycbcr"
    photometric: str = ""
    empty: Collection[int] = ()
    size: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    jpeg: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape that the directory says."""
        return (*self.size[::-1], 3) if self.size else self.pixels.shape

    @property
    def n_tiles(self) -> int:
        """Number of tiles."""
        return -(-self.shape[0] // self.tile) * -(-self.shape[1] // self.tile)

    def streams(self) -> Iterator[bytes]:
        """The encoded tiles, row by row; beyond the pixels they are gray."""
        w, side = self.shape[1], self.tile
        for index in range(self.n_tiles):
            row, column = divmod(index, -(-w // side))
            y, x = row * side, column * side
            tile = np.full((side, side, 3), 128, np.uint8)
            part = self.pixels[y : y + side, x : x + side]
            tile[: part.shape[0], : part.shape[1]] = part
            yield b"" if index in self.empty else self._encoded(tile)

    def _encoded(self, tile: np.ndarray) -> bytes:
        if self.jpeg:
            Image.fromarray(tile).save(stream := BytesIO(), "JPEG", quality=90, **self.jpeg)
            return stream.getvalue()
        if self.compression == JPEG:
            return imagecodecs.jpeg8_encode(tile, level=90, colorspace="rgb", outcolorspace=self.colors)
        options = {"level": 45, "codecformat": "j2k"}
        return imagecodecs.jpeg2k_encode(tile, mct=self.compression == APERIO_RGB, **options)


def write_tiff(path: Path, directories: Sequence[Directory], **options: Any) -> Path:
    """Write directories one after the other; `options` are for the first one, such as its description."""
    with tifffile.TiffWriter(path, bigtiff=path.suffix == ".scn") as file:
        for index, page in enumerate(directories):
            given = {"description": "", "software": False, "metadata": None, "datetime": False}
            given |= {"subfiletype": int(index > 0)} | page.options | (options if index == 0 else {})
            file.write(
                page.streams(),
                shape=page.shape,
                dtype=np.uint8,
                tile=(page.tile, page.tile),
                compression=page.compression,
                photometric=page.colors if page.compression == JPEG else "rgb",
                **given,
            )
    for index, page in enumerate(directories):
        if page.photometric:
            set_tag(path, index, "PhotometricInterpretation", tifffile.PHOTOMETRIC[page.photometric.upper()])
    return path


def set_tag(path: Path, directory: int, name: str, value: Any) -> None:
    """Overwrite a tag of a directory."""
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[directory].tags[name].overwrite(value)


def blobs(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Blobs of color, rough enough to reveal a wrong position, uint8 (height, width, 3)."""
    noise = np.random.default_rng(seed).integers(0, 256, (-(-height // 10), -(-width // 10), 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def shrunk(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """The picture in another size."""
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def aperio(path: Path, directories: Sequence[Directory]) -> Path:
    """Write an Aperio slide of 0.5 um/px."""
    h, w, _ = directories[0].shape
    return write_tiff(
        path, directories, description=f"Aperio Image Library v1\r\n{w}x{h}|AppMag = 20|MPP = 0.5"
    )


def trestle(path: Path, directories: Sequence[Directory], overlaps: Sequence[int] = ()) -> Path:
    """Write a Trestle slide; `overlaps` are those of neighboring tiles in x and y, level by level."""
    stated = " ".join(("OverlapsXY=", *map(str, overlaps)))
    resolution = {"resolution": (0.5, 0.5), "resolutionunit": "none"}  # they store um/px in these tags
    return write_tiff(path, directories, software="MedScan", description=stated, **resolution)


def philips(path: Path, directories: Sequence[Directory]) -> Path:
    """Write a Philips TIFF whose levels halve from 0.5 um/px; their sizes may be padded."""
    spacings = [f'"{0.0005 * 2**level}" "{0.0005 * 2**level}"' for level in range(len(directories))]
    levels = "".join(
        '<DataObject ObjectType="PixelDataRepresentation">'
        f'<Attribute Name="DICOM_PIXEL_SPACING">{spacing}</Attribute></DataObject>'
        for spacing in spacings
    )
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>'
        f'<Attribute Name="DICOM_PIXEL_SPACING">{spacings[0]}</Attribute>'
        f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{levels}</Array></Attribute>'
        "</DataObject></Array></Attribute></DataObject>"
    )
    return write_tiff(path, directories, software="Philips DP v1.0", description=xml)


def leica(
    path: Path,
    images: Sequence[Sequence[Directory]],
    offsets: Sequence[tuple[int, int]],
    size: tuple[int, int],
) -> Path:
    """Write a Leica SCN file of 0.5 um/px, with an overview of the whole slide.

    Args:
        path: The file, which must end in .scn.
        images: The levels of each of its images, finest first.
        offsets: (x, y) of the images on the slide, in pixels.
        size: (width, height) of the slide in pixels.
    """
    nm, parts, first = 500, [], 0
    overview = Directory(blobs(size[0] // 10, size[1] // 10))
    images, places = [*images, [overview]], [*offsets, (0, 0)]
    for levels, (x, y) in zip(images, places, strict=True):
        h, w = (size[1], size[0]) if levels[0] is overview else levels[0].shape[:2]
        dimensions = "".join(
            f'<dimension ifd="{first + i}" sizeX="{level.shape[1]}" sizeY="{level.shape[0]}"/>'
            for i, level in enumerate(levels)
        )
        first += len(levels)
        parts.append(
            f'<image><view sizeX="{w * nm}" sizeY="{h * nm}" offsetX="{x * nm}" offsetY="{y * nm}"/>'
            f"<pixels>{dimensions}</pixels><scanSettings><objectiveSettings><objective>20</objective>"
            "</objectiveSettings><illuminationSettings><illuminationSource>brightfield</illuminationSource>"
            "</illuminationSettings></scanSettings></image>"
        )
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection sizeX="{size[0] * nm}" sizeY="{size[1] * nm}">{"".join(parts)}</collection></scn>'
    )
    scale = {"resolution": (20_000, 20_000), "resolutionunit": "centimeter"}
    return write_tiff(path, [level for image in images for level in image], description=xml, **scale)


def ventana(
    path: Path, directories: Sequence[Directory], overlap: tuple[int, int] = (0, 0), origin: int = 0
) -> Path:
    """Write a Ventana BIF file of 0.5 um/px, whose levels halve.

    Args:
        path: The file.
        directories: Its levels; the first one has whole tiles only.
        overlap: That of neighboring tiles, in x and y.
        origin: Number of columns and rows of tiles to the left of and above the part that was scanned.
    """
    scan = b'<iScan Z-layers="1" Magnification="20" ScanRes="0.5"/>'
    main, tile = directories[0], directories[0].tile
    columns, rows = main.shape[1] // tile - origin, main.shape[0] // tile - origin

    def number(column: int, row: int) -> int:
        """Tiles are counted from the bottom, every second row from the right."""
        up = rows - 1 - row
        return up * columns + (columns - 1 - column if up % 2 else column) + 1

    def joint(direction: str, first: int, second: int, x: int, y: int) -> str:
        return (
            f'<TileJointInfo Confidence="100" Direction="{direction}" Tile1="{first}" Tile2="{second}" '
            f'OverlapX="{x}" OverlapY="{y}"/>'
        )

    joints = [
        *(
            joint("RIGHT", number(c - 1, r), number(c, r), overlap[0], 0)
            for r in range(rows)
            for c in range(1, columns)
        ),
        *(
            joint("UP", number(c, r), number(c, r - 1), 0, overlap[1])
            for r in range(1, rows)
            for c in range(columns)
        ),
    ]
    stitching = (
        f'<EncodeInfo><SlideStitchInfo><ImageInfo AOIScanned="1" NumRows="{rows}" NumCols="{columns}" '
        f'Width="{tile}" Height="{tile}" Pos-X="0" Pos-Y="0">{"".join(joints)}</ImageInfo>'
        f'</SlideStitchInfo><AoiOrigin><AOI0 OriginX="{origin * tile}" OriginY="{origin * tile}"/>'
        "</AoiOrigin></EncodeInfo>"
    ).encode()
    for level, page in enumerate(directories):
        page.options["description"] = f"level={level} mag={20 / 2**level:g} quality=90"
    main.options["extratags"] = [(700, 1, len(stitching), stitching, True)]
    overview = Directory(blobs(64, 64), options={"extratags": [(700, 1, len(scan), scan, True)]})
    return write_tiff(path, [overview, *directories])


def hamamatsu(path: Path, levels: Sequence[np.ndarray]) -> Path:
    """Write an NDPI file of 0.5 um/px whose levels halve: each is one JPEG image in one strip."""
    with tifffile.TiffWriter(path) as file:
        for level, pixels in enumerate(levels):
            marks = [
                *((271, 2, 0, "Hamamatsu", True), (272, 2, 0, "C9600-12", True), (65420, 4, 1, 1, True)),
                *((65421, 11, 1, 20 / 2**level, True), (65422, 9, 1, 0, True), (65423, 9, 1, 0, True)),
                (65424, 9, 1, 0, True),
            ]
            file.write(
                iter([imagecodecs.jpeg8_encode(pixels, level=90)]),
                shape=pixels.shape,
                dtype=np.uint8,
                rowsperstrip=pixels.shape[0],
                compression=JPEG,
                photometric="ycbcr",
                resolution=(20_000 / 2**level,) * 2,
                resolutionunit="centimeter",
                metadata=None,
                extratags=marks,
            )
    return path


def zeiss(path: Path, pixels: np.ndarray, compression: int = 0) -> Path:
    """Write a CZI file of one piece at 0.5 um/px.

    Args:
        path: The file.
        pixels: RGB pixels, uint8 (h, w, 3), which are stored as they are.
        compression: Its number in the directory: 0 is none, 1 JPEG, 2 LZW.
    """
    h, w, _ = pixels.shape
    xml = (
        "<ImageDocument><Metadata><Information><Image>"
        f"<SizeX>{w}</SizeX><SizeY>{h}</SizeY><SizeS>1</SizeS></Image></Information><Scaling><Items>"
        '<Distance Id="X"><Value>5e-7</Value></Distance><Distance Id="Y"><Value>5e-7</Value></Distance>'
        "</Items></Scaling></Metadata></ImageDocument>"
    ).encode()
    sizes = {"X": w, "Y": h, "S": 1}
    dimensions = b"".join(
        struct.pack("<4siifi", axis.encode(), 0, size, 0.0, size) for axis, size in sizes.items()
    )

    def segment(name: str, content: bytes) -> bytes:
        return struct.pack("<16sqq", name.encode(), len(content), len(content)) + content

    def entry(position: int) -> bytes:
        return struct.pack("<2siqiib5xi", b"DV", 3, position, 0, compression, 0, len(sizes)) + dimensions

    data = np.ascontiguousarray(pixels[..., ::-1]).tobytes()
    start = len(segment("", bytes(80)))
    block = struct.pack("<iiq", 0, 0, len(data)) + entry(start)
    block = segment("ZISRAWSUBBLOCK", block.ljust(256, b"\0") + data)
    directory = segment("ZISRAWDIRECTORY", struct.pack("<i124x", 1) + entry(start))
    metadata = segment("ZISRAWMETADATA", struct.pack("<ii248x", len(xml), 0) + xml)
    attachments = segment("ZISRAWATTDIR", struct.pack("<i252x", 0))
    places = np.cumsum([start, len(block), len(directory), len(metadata)]).tolist()
    header = struct.pack("<iiii32xiqqiq", 1, 0, 0, 0, 0, *places[1:3], 0, places[3])
    path.write_bytes(segment("ZISRAWFILE", header) + block + directory + metadata + attachments)
    return path
