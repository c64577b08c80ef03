"""Sizes in the headers of JPEG and JPEG 2000 streams, read before anything is decoded.

A decoder takes memory for the size that the stream itself states: a stored tile of a few bytes can ask for
gigabytes. What holds the tile says how large it must be.
"""

from collections.abc import Callable
from struct import unpack_from
from typing import NamedTuple

import numpy as np

MOST_PARTS = 4096
"""Largest number of parts ("tiles") into which a JPEG 2000 stream may be divided; each takes memory."""

JPEG_START, JPEG_END, JPEG_2000_START = b"\xff\xd8", b"\xff\xd9", b"\xff\x4f"
"""First and last markers of the streams."""

JP2_BOX, STREAM_BOX = b"jP  ", b"jp2c"
"""Types of the first box of a JP2 file and of the one that holds the stream."""

FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Second bytes of the JPEG markers that state the size (SOF0 to SOF15)."""

FILLING = 1024
"""Number of bytes that are put in the place of those that may be missing."""

ALONE = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))
"""Bytes after 0xFF that are followed by no length."""


class Header(NamedTuple):
    """What a stream states of its image.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        samples: Number of samples per pixel.
    """

    height: int
    width: int
    samples: int


def jpeg_header(stream: bytes) -> Header:
    """The size in the frame header (SOF) of a JPEG stream.

    Raises:
        ValueError: It is no JPEG stream, or has no frame header before its image.
    """
    if stream[:2] != JPEG_START:
        raise ValueError("it is no JPEG stream")
    at = 2
    while 0 < (at := stream.find(0xFF, at)) < len(stream) - 9:  # decoders skip what lies between markers
        kind = stream[at + 1]
        if kind in FRAME_HEADERS:
            height, width, samples = unpack_from(">HHB", stream, at + 5)
            return Header(height, width, samples)
        if kind == 0xFF:  # markers may be preceded by any number of these
            at += 1
        elif kind in ALONE:
            at += 2
        else:
            at += 2 + unpack_from(">H", stream, at + 2)[0]
    raise ValueError("the header of its JPEG stream is damaged")


def jpeg2000_header(stream: bytes) -> Header:
    """The size in the header (SIZ) of a JPEG 2000 stream, which may be in a JP2 file.

    Raises:
        ValueError: It is no JPEG 2000 stream, states no size, or is divided into more than `MOST_PARTS`.
    """
    at = _stream_in_boxes(stream) if stream[4:8] == JP2_BOX else 0
    if stream[at : at + 4] != JPEG_2000_START + b"\xff\x51" or len(stream) < at + 42:
        raise ValueError("the header of its JPEG 2000 stream is damaged")
    right, bottom, left, top, *part, samples = unpack_from(">8IH", stream, at + 8)
    width, height, part_width, part_height = right - left, bottom - top, *part[:2]
    if width < 1 or height < 1 or part_width < 1 or part_height < 1:
        raise ValueError("the header of its JPEG 2000 stream is damaged")
    n_parts = -(-width // part_width) * -(-height // part_height)
    if n_parts > MOST_PARTS:
        raise ValueError(f"its JPEG 2000 stream has {n_parts:,} parts, more than the {MOST_PARTS:,} allowed")
    return Header(height, width, samples)


def check_header(header: Header, shape: tuple[int, ...]) -> None:
    """Hold the header of a stream to what its file says.

    Args:
        header: From `jpeg_header` or `jpeg2000_header`.
        shape: (height, width) or (height, width, samples) of what is to be decoded.

    Raises:
        ValueError: They differ.
    """
    height, width, samples = (*shape, 1)[:3]
    if (header.height, header.width) != (height, width):
        raise ValueError(
            f"its header says {header.width} x {header.height} pixels, the file {width} x {height}"
        )
    if header.samples != samples:
        raise ValueError(f"its header says {header.samples} samples per pixel, the file {samples}")


def jpeg_fits(stream: bytes, shape: tuple[int, ...]) -> bool:
    """Whether the header of a JPEG stream says this (height, width, samples)."""
    try:
        check_header(jpeg_header(stream), shape)
    except ValueError:
        return False
    return True


def checked(
    decode: Callable[..., np.ndarray], header: Callable[[bytes], Header]
) -> Callable[..., np.ndarray]:
    """A decoder that is called only if the header of the stream has the size of the result.

    Args:
        decode: Function of a stream and `out`, the array for the result.
        header: `jpeg_header` or `jpeg2000_header`.

    Returns:
        A function of the same arguments; it raises a ValueError where the sizes differ.
    """

    def decode_checked(stream: bytes, *, out: np.ndarray) -> np.ndarray:
        check_header(header(stream), out.shape)
        return decode(stream, out=out)

    return decode_checked


def checked_jpeg(decode: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A decoder of JPEG streams that is called only for the size of the result, and tells what was cut off.

    libjpeg makes up what is missing, and imagecodecs does not pass on its warning. A stream without an end
    marker may still be whole: then it decodes to the same picture whatever follows.

    Args:
        decode: Function of a stream and `out`, the array for the result.

    Returns:
        A function of the same arguments; it raises a ValueError where the sizes differ or a part is missing.
    """

    def decode_whole(stream: bytes, *, out: np.ndarray) -> np.ndarray:
        if JPEG_END in stream:
            return decode(stream, out=out)
        start = stream.rstrip(b"\0")
        decode(start + b"\x55" * FILLING + JPEG_END, out=out)
        again = decode(start + b"\xaa" * FILLING + JPEG_END, out=np.empty_like(out))
        if not np.array_equal(again, out):
            raise ValueError("its JPEG stream was cut off")
        return out

    return checked(decode_whole, jpeg_header)


def _stream_in_boxes(data: bytes) -> int:
    """Position of the stream in a JP2 file; the end of the data if it has none."""
    at = 0
    while at + 8 <= len(data):
        length, kind = unpack_from(">I4s", data, at)
        head = 8
        if length == 1 and at + 16 <= len(data):
            length, head = unpack_from(">Q", data, at + 8)[0], 16
        if kind == STREAM_BOX:
            return at + head
        if length < head:
            break
        at += length
    return len(data)
