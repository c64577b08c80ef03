"""Fields of a slide put together on a GPU from tiles that were decoded there."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hdmil_lib.errors import SlideError
from hdmil_lib.slides.codestreams import jpeg_fits
from hdmil_lib.slides.gpu_decoding import NvImageCodec, complete_stream
from hdmil_lib.slides.resampling import to_device
from hdmil_lib.slides.stored_tiles import StoredTiles

LARGEST_DIFFERENCE = 8.0
"""Largest mean difference between both decoders, in levels. On real tissue, chroma that is repeated instead
of interpolated gave up to 2.2, and RGB taken for YCbCr at least 47."""

FIELDS_AT_A_TIME = 64
"""Number of fields that are put together at a time; it limits the memory of their indices."""


class TilesOnDevice:
    """The JPEG tiles of a slide, each decoded once by a GPU while its neighbors are read.

    What the GPU cannot decode, libjpeg-turbo decodes; what both cannot is damaged.
    """

    def __init__(self, stored: StoredTiles, decoder: NvImageCodec):
        self._stored, self._decoder = stored, decoder
        self._held: list[OrderedDict[int, Tensor]] = [OrderedDict() for _ in stored.levels]
        self._can_read: dict[int, bool] = {}

    def can_read(self, level: int) -> bool:
        """Whether the GPU decodes this level, with the colors of libjpeg-turbo; found out on one tile."""
        with self._decoder.running():
            if level not in self._can_read:
                self._can_read[level] = self._stored.levels[level].is_jpeg and self._agrees(level)
            return self._can_read[level]

    def read(
        self, level: int, corners: np.ndarray, size: tuple[int, int]
    ) -> tuple[Tensor, dict[int, SlideError]]:
        """Read rectangles of one size, within `running`; they may reach beyond the level.

        Args:
            level: Index of the level.
            corners: (left, top) of the rectangles in pixels of the level, int64 (n, 2).
            size: (width, height) of the rectangles.

        Returns:
            RGB pixels on the device, uint8 (n, height, width, 3), white where the slide has none, and the
            errors of those rectangles that have a damaged tile under them, by their row.
        """
        stored = self._stored.levels[level]
        under = [
            [row * stored.columns + column for row, column in stored.under(left, top, *size)]
            for left, top in corners.tolist()
        ]
        wanted = list(dict.fromkeys(index for below in under for index in below))
        errors = self._decode(level, wanted)
        held = self._held[level]
        white = torch.full(stored.shape, 255, dtype=torch.uint8, device=self._decoder.device)
        tiles = torch.stack([white, *(held.get(index, white) for index in wanted)])
        places = np.zeros(stored.rows * stored.columns, np.int64)
        places[wanted] = np.arange(len(wanted)) + 1
        extent = (stored.page.imagewidth, stored.page.imagelength)
        table = to_device(places.reshape(stored.rows, stored.columns), self._decoder.device)
        parts = to_device(corners, self._decoder.device).split(FIELDS_AT_A_TIME)
        fields = torch.cat([_put_together(tiles, table, part, size, extent) for part in parts])
        broken = {i: [errors[t] for t in below if t in errors] for i, below in enumerate(under)}
        return fields, {i: found[0] for i, found in broken.items() if found}

    def _decode(self, level: int, wanted: Sequence[int]) -> dict[int, SlideError]:
        """Hold these tiles, decoding those that are not held, and return the errors of damaged ones."""
        stored, held = self._stored.levels[level], self._held[level]
        for index in wanted:
            if index in held:
                held.move_to_end(index)
        while len(held) > stored.n_held:
            held.popitem(last=False)
        errors: dict[int, SlideError] = {}
        missing = [index for index in wanted if index not in held]
        for index, tile in zip(missing, self._on_gpu(level, missing), strict=True):
            try:
                held[index] = self._on_cpu(level, index) if tile is None else tile
            except SlideError as error:
                errors[index] = error
        return errors

    def _on_gpu(self, level: int, indices: Sequence[int]) -> list[Tensor | None]:
        """Tiles as the GPU decodes them; None for those that it cannot decode."""
        stored = self._stored.levels[level]
        shared = (stored.page.jpegtables, stored.stores_rgb)
        streams = {i: complete_stream(self._stored.compressed(level, i), *shared) for i in indices}
        good = {i: s for i, s in streams.items() if s is not None and jpeg_fits(s, stored.shape)}
        tiles = dict(zip(good, self._decoder.decode(list(good.values())), strict=True))
        found = [tiles.get(index) for index in indices]
        return [None if tile is None or tile.shape != stored.shape else tile for tile in found]

    def _on_cpu(self, level: int, index: int) -> Tensor:
        return to_device(self._stored.decode(level, index), self._decoder.device)

    def _agrees(self, level: int) -> bool:
        """Whether both decoders see the same colors in the tile with most bytes of those that are whole."""
        for index in np.argsort(self._stored.levels[level].sizes)[:-4:-1].tolist():
            try:
                expected = self._stored.decode(level, index).astype(np.float32)
            except SlideError:
                continue
            tile = self._on_gpu(level, [index])[0]
            if tile is None:
                return False
            return float(np.abs(tile.cpu().numpy() - expected).mean()) <= LARGEST_DIFFERENCE
        return False


def _put_together(
    tiles: Tensor, table: Tensor, corners: Tensor, size: tuple[int, int], extent: tuple[int, int]
) -> Tensor:
    """Copy rectangles of a level out of its tiles.

    Args:
        tiles: Decoded tiles of which the first is white, uint8 (T, h, w, 3).
        table: Place in `tiles` of each tile of the level, int64 (rows, columns).
        corners: (left, top) of the rectangles, int64 (n, 2).
        size: (width, height) of the rectangles.
        extent: (width, height) of the level.

    Returns:
        RGB pixels, uint8 (n, height, width, 3); white outside of the level.
    """
    _, height, width, _ = tiles.shape
    x, y = (c[:, None] + torch.arange(s, device=c.device) for c, s in zip(corners.T, size, strict=True))
    across, down = (x >= 0) & (x < extent[0]), (y >= 0) & (y < extent[1])
    x, y = x.clamp(0, extent[0] - 1)[:, None, :], y.clamp(0, extent[1] - 1)[:, :, None]
    place = table[y // height, x // width] * (down[:, :, None] & across[:, None, :])  # 0 is the white tile
    return tiles.view(-1, 3)[(place * height + y % height) * width + x % width]
