"""Tiles of an open slide are read by threads and encoded, block by block."""

import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hdmil_lib.encoders.attributes import wanted_decoder
from hdmil_lib.errors import SlideError
from hdmil_lib.slides import Slide, TileGrid

if TYPE_CHECKING:
    from torch import Tensor

    from hdmil_lib.encoders.loading import Encoder
    from hdmil_lib.slides.gpu_decoding import NvImageCodec


def encode_tiles(
    slide: Slide,
    grid: TileGrid,
    rows: Sequence[int] | np.ndarray,
    encoder: "Encoder",
    *,
    progress: bool = False,
    **options: Any,
) -> np.ndarray:
    """Read and encode the given tiles only (paper, section 3.3).

    Args:
        slide: The open slide.
        grid: Tiles of the slide.
        rows: Rows of the grid to encode, (n,).
        encoder: The encoder.
        progress: Whether a bar is shown.
        **options: Options of `encode_blocks`.

    Returns:
        float32 (n, D), in the order of `rows`.

    Raises:
        SlideError: A tile cannot be read, and `strict`.
    """
    features, done = np.empty((len(rows), encoder.dim), np.float32), 0
    with (
        tqdm(total=len(rows), desc=slide.name, unit="tile", leave=False, disable=not progress) as bar,
        closing(encode_blocks(slide, grid, rows, encoder, **options)) as blocks,
    ):
        for block in blocks:
            features[done : done + len(block)] = block
            done += len(block)
            bar.update(len(block))
    return features


def encode_blocks(
    slide: Slide,
    grid: TileGrid,
    rows: Sequence[int] | np.ndarray,
    encoder: "Encoder",
    *,
    batch_size: int | None = None,
    n_readers: int = 2,
    strict: bool = True,
    broken: list[int] | None = None,
    seconds: dict[str, float] | None = None,
) -> Generator[np.ndarray, None, None]:
    """Features of the given tiles, block by block.

    Threads read ahead while the encoder runs, at most `n_readers` + 1 blocks, so memory does not grow
    with the slide. To stop early, close the generator; then no further tiles are read.

    Args:
        slide: The open slide.
        grid: Tiles of the slide.
        rows: Rows of the grid to encode, (n,).
        encoder: The encoder.
        batch_size: Number of tiles per block and encoder call; the encoder's `batch_size` by default.
        n_readers: Number of reading threads; with 0 tiles are read in this thread, so that the seconds of
            both stages add up.
        strict: Whether a tile that cannot be read is an error; otherwise its features are nan.
        broken: List to which the positions in `rows` of the tiles are added that cannot be read.
        seconds: Dictionary to which the times are added: "crop" for reading, summed over threads, and
            "features" for the encoder.

    Yields:
        float32 (b, D), in the order of `rows`.

    Raises:
        SlideError: A tile cannot be read, and `strict`.
    """
    seconds, broken, n_done = {} if seconds is None else seconds, [] if broken is None else broken, 0
    batch_size = batch_size or encoder.batch_size
    decoder = gpu_decoder(slide, grid, encoder)
    # After an error or Ctrl-C the readers must end before the slide is closed, hence the `closing`.
    with closing(_read_batches(slide, grid, rows, batch_size, n_readers, strict, decoder)) as batches:
        for tiles, whole, crop_seconds in batches:
            start = time.perf_counter()
            if whole.all():
                features = encoder(tiles)
            else:
                features = np.full((len(tiles), encoder.dim), np.nan, np.float32)
                if whole.any():
                    features[whole] = encoder(tiles[whole])
            broken += (n_done + np.flatnonzero(~whole)).tolist()
            n_done += len(whole)
            seconds["features"] = seconds.get("features", 0.0) + time.perf_counter() - start
            seconds["crop"] = seconds.get("crop", 0.0) + crop_seconds
            yield features


def _read_batches(
    slide: Slide,
    grid: TileGrid,
    rows: Sequence[int] | np.ndarray,
    batch_size: int,
    n_readers: int,
    strict: bool,
    decoder: "NvImageCodec | None",
) -> "Generator[tuple[np.ndarray | Tensor, np.ndarray, float], None, None]":
    """Batches of tiles in order, a mask of the tiles that could be read, and the seconds of reading.

    A batch must be used before the next one is taken, since its memory is reused. With a decoder it is on the
    decoder's GPU, in memory of its own.
    """

    def read_tile(row: int, out: np.ndarray) -> bool:
        try:
            grid.read_tile(slide, row, out)
        except SlideError:
            if strict:
                raise
            return False
        return True

    def read(
        batch: Sequence[int] | np.ndarray, out: np.ndarray
    ) -> "tuple[np.ndarray | Tensor, np.ndarray, float]":
        start = time.perf_counter()
        if decoder is not None:
            tiles, errors = grid.read_tiles(slide, batch, decoder)
            if errors and strict:
                raise min(errors.items())[1]
            whole = np.isin(np.arange(len(batch)), list(errors), invert=True)
            return tiles, whole, time.perf_counter() - start
        whole = np.array([read_tile(int(row), tile) for row, tile in zip(batch, out, strict=False)])
        return out[: len(batch)], whole, time.perf_counter() - start

    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    n_on_host = 0 if decoder is not None else min(batch_size, len(rows))
    shape = (n_on_host, grid.tile_size, grid.tile_size, 3)
    memory = deque(np.empty((n_readers + 1, *shape), np.uint8))
    if n_readers == 0:
        for batch in batches:
            yield read(batch, memory[0])
        return
    with ThreadPoolExecutor(n_readers) as pool:
        waiting: deque = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(read, batch, memory[0]))
                memory.rotate(-1)
                if len(waiting) > n_readers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def gpu_decoder(slide: Slide, grid: TileGrid, encoder: "Encoder") -> "NvImageCodec | None":
    """The decoder of the encoder's GPU if the encoder asks for it and the slide allows it, else None."""
    if wanted_decoder(encoder) != "nvjpeg":
        return None
    from hdmil_lib.slides.gpu_decoding import nvjpeg

    decoder = nvjpeg(encoder.device)
    return decoder if slide.can_decode(grid.mpp, decoder) else None
