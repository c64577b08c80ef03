"""JPEG tiles of TIFF slides decoded on an NVIDIA GPU, many per call, by nvImageCodec (nvJPEG).

The pixels differ from those of libjpeg-turbo, which OpenSlide and `StoredTiles` use, by a few levels: nvJPEG
rounds its cosine transform and interpolates chroma in its own way. Features differ with them, so that
`load_encoder(decoder=...)` must ask for it, and bags record it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any

import imagecodecs
import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hdmil_lib.errors import HDMILError

START, END = b"\xff\xd8", b"\xff\xd9"
"""First and last marker of a JPEG stream."""

RGB_MARKER = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""Adobe's marker with the transform 0: the three components are red, green and blue."""


class NvImageCodec:
    """nvImageCodec on one GPU; made by `nvjpeg`.

    Attributes:
        device: The GPU.
    """

    def __init__(self, module: Any, device: torch.device):
        """Start the decoders of a GPU.

        Args:
            module: The module `nvidia.nvimgcodec`.
            device: The GPU.
        """
        kinds = (module.HW_GPU_ONLY, module.HYBRID_CPU_GPU, module.GPU_ONLY)  # what these cannot, we can
        backends = [module.Backend(kind) for kind in kinds]
        self._module, self.device = module, device
        # Chroma is interpolated, as libjpeg-turbo does, and not repeated.
        self._decoder = module.Decoder(
            device_id=device.index, backends=backends, options=":fancy_upsampling=1"
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Work on the stream of this decoder, one thread at a time; at the end all of it is done."""
        with self._lock, torch.cuda.stream(self._stream):
            yield
            if self._stream is not None:
                self._stream.synchronize()

    def decode(self, streams: Sequence[bytes]) -> list[Tensor | None]:
        """Decode JPEG streams in one call, within `running`.

        Returns:
            RGB pixels on the device, uint8 (h, w, 3), for each stream; None for those that it cannot decode.
        """
        if not streams:
            return []
        images = self._decoder.decode(
            [self._module.CodeStream(stream) for stream in streams],
            params=self._module.DecodeParams(apply_exif_orientation=False),
            cuda_stream=0 if self._stream is None else self._stream.cuda_stream,
        )
        return [None if image is None else from_dlpack(image) for image in images]


@cache
def nvjpeg(device: torch.device) -> NvImageCodec:
    """The decoder of a GPU, started once.

    Raises:
        HDMILError: The device is no NVIDIA GPU, or nvImageCodec is not installed or does not work there.
    """
    if device.type != "cuda" or torch.version.hip:
        raise HDMILError(f"decoder='nvjpeg' needs an NVIDIA GPU, not {device}; use decoder='cpu'.")
    example = bytes(imagecodecs.jpeg8_encode(np.zeros((16, 16, 3), np.uint8)))
    try:
        decoder = NvImageCodec(import_module("nvidia.nvimgcodec"), device)
        with decoder.running():
            works = decoder.decode([example])[0] is not None
    except (ImportError, RuntimeError) as error:
        raise _not_working(device, str(error)) from error
    if not works:
        raise _not_working(device, "it cannot decode a JPEG image")
    return decoder


def complete_stream(tile: bytes, tables: bytes | None, stores_rgb: bool) -> bytes | None:
    """Make a JPEG stream that says all by itself of a stored tile.

    Args:
        tile: Bytes of the tile, whose tables may be missing.
        tables: The tables that the tiles of a level share, a JPEG stream without an image (tag JPEGTables).
        stores_rgb: Whether the tile stores red, green and blue.

    Returns:
        The stream; None if the tile is no whole JPEG stream.
    """
    tile = tile.rstrip(b"\0")  # some writers fill tiles up
    if not (tile.startswith(START) and tile.endswith(END)):
        return None
    shared = tables or b""
    return START + RGB_MARKER * stores_rgb + shared[len(START) : -len(END)] + tile[len(START) :]


def _not_working(device: torch.device, why: str) -> HDMILError:
    return HDMILError(
        f"nvImageCodec does not work on {device}: {why}. Run `pip install 'hdmil[gpu]'`, or use "
        "decoder='cpu'."
    )
