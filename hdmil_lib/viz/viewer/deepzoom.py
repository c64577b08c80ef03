"""A slide as deep zoom tiles: JPEG squares of 256 pixels at scales that halve, read on request."""

import io
import math
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import numpy as np
from PIL import Image

from hdmil_lib.errors import SlideError
from hdmil_lib.slides.reader import LEVEL_TOLERANCE, Slide

SIDE, QUALITY = 256, 85
CACHE_BYTES = 64 * 2**20
COARSEST = 8
"""Level whose longer side has 129 to 256 pixels, so that it is one tile; coarser ones are not needed."""
MAX_REDUCTION = 16
"""Most stored pixels along each axis that are averaged into one; coarser tiles come from the thumbnail."""
THUMBNAIL_MPP = 8.0
GRAY = 160
"""Level of what cannot be read."""


@dataclass(frozen=True)
class DeepZoomTile:
    """One tile.

    Attributes:
        jpeg: The picture; plain gray where the file is damaged.
        error: What is wrong with the file there, or an empty text.
    """

    jpeg: bytes
    error: str = ""


class DeepZoom:
    """The bounds of a slide as deep zoom tiles, of which the last used ones are kept.

    It may be used from several threads. The pixels of the finest level are squares, also where the slide's
    are not: their side is the smaller one of the slide's pixels. Level k has a scale of
    `2 ** (max_level - k)` times that.

    Attributes:
        slide: The slide.
        mpp: Micrometers per pixel of the finest level.
        width: Width of the finest level in pixels.
        height: Height of the finest level in pixels.
        max_level: Number of the finest level.
        cache_bytes: Most bytes of JPEG that are kept.
        n_bytes: Bytes of JPEG that are kept now.
    """

    def __init__(self, slide: Slide, thumbnail: np.ndarray | None = None, cache_bytes: int = CACHE_BYTES):
        """Lay the levels over a slide; nothing is read yet.

        Args:
            slide: The slide, which must stay open.
            thumbnail: The bounds at 8 um/px, uint8 (H, W, 3), if it was made before; else it is made when it
                is needed.
            cache_bytes: Most bytes of JPEG that are kept.
        """
        self.slide, self.mpp = slide, min(slide.mpp)
        self.width, self.height = (
            max(1, math.ceil(extent * mpp / self.mpp - 1e-6))
            for extent, mpp in zip(slide.bounds[2:], slide.mpp, strict=True)
        )
        self.max_level = max(0, math.ceil(math.log2(max(self.width, self.height))))
        self._thumbnail = None if thumbnail is None else _padded(thumbnail)
        self._cache: OrderedDict[tuple[int, int, int], DeepZoomTile] = OrderedDict()
        self.cache_bytes, self.n_bytes = cache_bytes, 0
        self._cache_lock, self._thumbnail_lock = Lock(), Lock()

    def size(self, level: int) -> tuple[int, int]:
        """(width, height) of a level in pixels."""
        scale = 2 ** (self.max_level - level)
        return math.ceil(self.width / scale), math.ceil(self.height / scale)

    def tile(self, level: int, x: int, y: int) -> DeepZoomTile:
        """A tile as JPEG, from memory if it was read before.

        Args:
            level: Its level, from 0, the coarsest, to `max_level`.
            x: Its column.
            y: Its row.

        Raises:
            ValueError: There is no such tile.
        """
        key = (level, x, y)
        with self._cache_lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        try:
            tile = DeepZoomTile(jpeg_bytes(self.pixels(level, x, y)))
        except SlideError as error:
            gray = np.full((*self._tile_size(level, x, y)[::-1], 3), GRAY, np.uint8)
            tile = DeepZoomTile(jpeg_bytes(gray), str(error))
        self._keep(key, tile)
        return tile

    def pixels(self, level: int, x: int, y: int) -> np.ndarray:
        """The pixels of a tile, uint8 (h, w, 3), with sides of 256 except at the right and lower edge.

        Raises:
            ValueError: There is no such tile.
            SlideError: The file is damaged there.
        """
        size = self._tile_size(level, x, y)
        mpp = self.mpp * 2 ** (self.max_level - level)
        if self._reduction(mpp) > (
            1.02 if self._thumbnail is not None and mpp >= THUMBNAIL_MPP else MAX_REDUCTION
        ):
            return self._from_thumbnail(x * SIDE * mpp, y * SIDE * mpp, size, mpp)
        left, top = (
            start + place * SIDE * mpp / own
            for start, place, own in zip(self.slide.bounds[:2], (x, y), self.slide.mpp, strict=True)
        )
        return self.slide.read_field(left, top, size, mpp)

    def overview(self, longest: int) -> Image.Image:
        """A picture of the bounds, its longer side at most this many pixels; its tiles are kept for later."""
        level = min(self.max_level, max(COARSEST, math.ceil(math.log2(longest))))
        width, height = self.size(level)
        picture = Image.new("RGB", (width, height), "white")
        for y in range(math.ceil(height / SIDE)):
            for x in range(math.ceil(width / SIDE)):
                picture.paste(Image.open(io.BytesIO(self.tile(level, x, y).jpeg)), (x * SIDE, y * SIDE))
        picture.thumbnail((longest, longest), Image.Resampling.BOX)
        return picture

    def clear(self) -> None:
        """Forget all tiles and the thumbnail."""
        with self._cache_lock:
            self._cache.clear()
            self.n_bytes = 0
        self._thumbnail = None

    def _tile_size(self, level: int, x: int, y: int) -> tuple[int, int]:
        if not 0 <= level <= self.max_level:
            raise ValueError(f"there is no level {level}, only 0 to {self.max_level}")
        width, height = self.size(level)
        if not (0 <= x * SIDE < width and 0 <= y * SIDE < height):
            raise ValueError(f"level {level} of {width} x {height} pixels has no tile ({x}, {y})")
        return min(SIDE, width - x * SIDE), min(SIDE, height - y * SIDE)

    def _reduction(self, mpp: float) -> float:
        """Pixels of the coarsest level that is fine enough, per pixel of this scale."""
        levels = [self.slide.mpp[0] * level.downsample_x for level in self.slide.levels]
        return mpp / max([own for own in levels if own <= mpp * LEVEL_TOLERANCE] or levels[:1])

    def _from_thumbnail(self, left: float, top: float, size: tuple[int, int], mpp: float) -> np.ndarray:
        """Average a field from the thumbnail; `left` and `top` in um."""
        with self._thumbnail_lock:
            if self._thumbnail is None:
                picture, readable = self.slide.thumbnail_with_gaps(THUMBNAIL_MPP)
                picture[~readable] = GRAY
                self._thumbnail = _padded(picture)
            image = self._thumbnail
        u, v = left / THUMBNAIL_MPP, top / THUMBNAIL_MPP
        step = mpp / THUMBNAIL_MPP
        box = (u, v, u + size[0] * step, v + size[1] * step)
        return np.array(image.resize(size, Image.Resampling.BICUBIC, box=box))

    def _keep(self, key: tuple[int, int, int], tile: DeepZoomTile) -> None:
        with self._cache_lock:
            if key not in self._cache:
                self._cache[key] = tile
                self.n_bytes += len(tile.jpeg)
            while self.n_bytes > self.cache_bytes:
                self.n_bytes -= len(self._cache.popitem(last=False)[1].jpeg)


def jpeg_bytes(pixels: np.ndarray) -> bytes:
    """RGB pixels, uint8 (h, w, 3), as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def _padded(thumbnail: np.ndarray) -> Image.Image:
    """The thumbnail, with room for coarse pixels that reach beyond its right and lower edge."""
    room = 1 + max(thumbnail.shape) // 64
    return Image.fromarray(np.pad(thumbnail, ((0, room), (0, room), (0, 0)), mode="edge"))
