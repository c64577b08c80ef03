"""What the XML of an OME-TIFF says of its images."""

from dataclasses import dataclass, field
from xml.etree import ElementTree

import tifffile


@dataclass(frozen=True)
class OMEImage:
    """The largest image that an OME-XML describes.

    Attributes:
        page: Index of its directory among those of the file.
        width: Width in pixels.
        height: Height in pixels.
        properties: Its physical size per pixel, the unit of that, and the power of the objective, as far as
            they are stated: `ome.PhysicalSizeX`, `ome.PhysicalSizeXUnit`, the same in y,
            `openslide.objective-power`.
    """

    page: int
    width: int
    height: int
    properties: dict[str, str] = field(default_factory=dict)


def ome_xml(file: tifffile.TiffFile) -> str | None:
    """The OME-XML of a TIFF file; None if it has none."""
    text = file.pages.first.description
    return text if "<OME" in text[:10_000] and text.rstrip().endswith("OME>") else None


def largest_image(xml: str) -> OMEImage:
    """Find the image with most pixels; the others of such files are labels and overviews.

    Raises:
        ValueError: The XML is damaged, or that image has several planes in depth, time or color, so that it
            is not one picture.
    """
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise ValueError("its OME-XML declares entities, which OME files have no use for")
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ValueError(f"its OME-XML is damaged ({error})") from None
    pixels = root.findall("./{*}Image/{*}Pixels")
    if not pixels:
        raise ValueError("its OME-XML describes no image")
    largest = max(pixels, key=lambda p: _count(p, "SizeX") * _count(p, "SizeY"))
    _check_planes(largest)
    before = pixels[: pixels.index(largest)]
    data = largest.find("{*}TiffData")
    in_order = sum(map(_n_planes, before))
    page = in_order if data is None else _count(data, "IFD", in_order)
    stated = {
        f"ome.{key}": largest.get(key, default)
        for axis in "XY"
        if largest.get(f"PhysicalSize{axis}")
        for key, default in ((f"PhysicalSize{axis}", ""), (f"PhysicalSize{axis}Unit", "µm"))
    }
    powers = {o.get("NominalMagnification") for o in root.findall("./{*}Instrument/{*}Objective")} - {None}
    if len(powers) == 1:
        stated["openslide.objective-power"] = str(powers.pop())
    return OMEImage(page, _count(largest, "SizeX"), _count(largest, "SizeY"), stated)


def _check_planes(pixels: ElementTree.Element) -> None:
    for axis, name in (("Z", "depth"), ("T", "time")):
        if (n := _count(pixels, f"Size{axis}", 1)) > 1:
            raise ValueError(f"its image has {n} planes in {name}; export one of them")
    if (n := _n_planes(pixels)) > 1:
        raise ValueError(
            f"its image has {n} channels in planes of their own, not one color picture; export it as RGB"
        )


def _n_planes(pixels: ElementTree.Element) -> int:
    """Number of directories over which an image is spread."""
    channels = pixels.findall("{*}Channel")
    per_plane = _count(channels[0], "SamplesPerPixel", 1) if channels else 1
    n_colors = -(-_count(pixels, "SizeC", 1) // max(1, per_plane))
    return n_colors * _count(pixels, "SizeZ", 1) * _count(pixels, "SizeT", 1)


def _count(element: ElementTree.Element, key: str, default: int = 0) -> int:
    value = element.get(key, str(default))
    if not value.isdecimal() or len(value) > 12:
        raise ValueError(f"its OME-XML says {key}={value[:20]!r}, which is no size")
    return int(value)
