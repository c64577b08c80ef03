"""Slides to bags: tiles are streamed through an encoder, runs can be interrupted and resumed."""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from hdmil_lib.errors import BagError, HDMILError, SlideError
from hdmil_lib.features.bagstore import Bag, bag_info, read_bag, write_bag
from hdmil_lib.features.encoders import Encoder
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.slides.synthesis import TUMOR, truth_path, tumor_share

TILE_SIZE, TILE_MPP = 256, 0.5


def encode_tiles(
    slide: Slide,
    grid: TileGrid,
    rows: Sequence[int],
    encoder: Encoder,
    *,
    progress: bool = False,
    **options: Any,
) -> np.ndarray:
    """Read and encode the given tiles, and only these (paper, section 3.3: the fast path).

    Args:
        slide: The open slide.
        grid: Its tiles.
        rows: Rows of the grid to encode, (n,).
        encoder: Turns uint8 tiles (B, H, W, 3) into float32 (B, D).
        progress: Show a bar.
        options: Of `encode_blocks`.

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


def calibration_tiles(
    slide_paths: Sequence[str | Path],
    n_tiles: int = 96,
    *,
    mpp: float | tuple[float, float] | None = None,
) -> np.ndarray:
    """Tiles from which an int8 encoder takes the ranges of its numbers, spread over some slides.

    Args:
        slide_paths: Slides like those to come.
        n_tiles: How many, of all slides together.
        mpp: Micrometres per level-0 pixel of all slides, where the files do not say.

    Returns:
        About as many as asked for, at most; uint8 (n, 256, 256, 3), evenly from the slides and over each.

    Raises:
        SlideError: A slide cannot be read or holds no tissue.
    """
    tiles = []
    for path in slide_paths:
        with Slide(path, mpp) as slide:
            grid = TileGrid.from_slide(slide, tile_size=TILE_SIZE, mpp=TILE_MPP)
            rows = np.linspace(0, len(grid) - 1, min(len(grid), n_tiles // len(slide_paths))).astype(int)
            tiles += [grid.read_tile(slide, row) for row in rows]
    return np.stack(tiles)


def encode_blocks(
    slide: Slide,
    grid: TileGrid,
    rows: Sequence[int],
    encoder: Encoder,
    *,
    batch_size: int | None = None,
    n_readers: int = 2,
    strict: bool = True,
    seconds: dict[str, float] | None = None,
) -> Iterator[np.ndarray]:
    """Features of the given tiles, block by block, while the next ones are read.

    Threads read ahead while the encoder runs, at most `n_readers` + 1 blocks, so memory does not grow
    with the slide. To stop early, close the iterator: what is not being read yet is not read.

    Args:
        slide: The open slide.
        grid: Its tiles.
        rows: Rows of the grid to encode, (n,).
        encoder: Turns uint8 tiles (B, H, W, 3) into float32 (B, D).
        batch_size: Tiles a block and an encoder call; the encoder's `batch_size` by default, or else 32.
        n_readers: Reading threads; 0 reads in this thread, so that the seconds of both stages add up.
        strict: A tile that cannot be read is an error; otherwise its features are nan.
        seconds: Accumulates "crop", the time spent reading in all threads, and "features", the time
            spent in the encoder.

    Yields:
        float32 (b, D), in the order of `rows`.

    Raises:
        SlideError: A tile cannot be read, and `strict`.
    """
    seconds = {} if seconds is None else seconds
    batch_size = batch_size or getattr(encoder, "batch_size", 32)
    # Closed here and now: readers must be gone before an error, or Ctrl-C, lets the slide be closed.
    with closing(_read_batches(slide, grid, rows, batch_size, n_readers, strict)) as batches:
        for tiles, whole, crop_seconds in batches:
            start = time.perf_counter()
            if whole.all():
                features = encoder(tiles)
            else:
                features = np.full((len(tiles), encoder.dim), np.nan, np.float32)
                if whole.any():
                    features[whole] = encoder(tiles[whole])
            seconds["features"] = seconds.get("features", 0.0) + time.perf_counter() - start
            seconds["crop"] = seconds.get("crop", 0.0) + crop_seconds
            yield features


def extract_slide(
    slide_path: str | Path,
    encoder: Encoder,
    out_path: str | Path,
    *,
    mpp: float | tuple[float, float] | None = None,
    batch_size: int | None = None,
    min_tissue: float = 0.25,
    truth_value: int = TUMOR,
    progress: bool = False,
) -> Bag:
    """Turn one slide into a bag file. Where `<stem>.truth.png` lies beside it, tile labels are stored too.

    Args:
        slide_path: A slide that OpenSlide reads.
        encoder: From `load_encoder`.
        out_path: The .h5 file to write, whole or not at all.
        mpp: Micrometres per level-0 pixel where the file does not say, or says it wrongly.
        batch_size: Tiles an encoder call; the encoder's by default.
        min_tissue: Least share of tissue in a tile.
        truth_value: Value of the truth mask that tile labels count; another one for composed slides.
        progress: Show a bar.

    Returns:
        The bag as written.

    Raises:
        SlideError: The slide cannot be read or holds no tissue.
        BagError: The features are not finite.
    """
    with Slide(slide_path, mpp=mpp) as slide:
        grid = TileGrid.from_slide(slide, tile_size=TILE_SIZE, mpp=TILE_MPP, min_tissue=min_tissue)
        rows = range(len(grid))
        features = encode_tiles(slide, grid, rows, encoder, batch_size=batch_size, progress=progress)
        attrs = _settings(encoder, min_tissue) | _geometry(slide, grid)
        attrs |= {"precision": encoder.precision, "engine": encoder.engine}
        truth = truth_path(slide_path)
        tile_labels = tumor_share(truth, grid.rowcol, truth_value) if truth.is_file() else None
        write_bag(out_path, Bag(slide.name, features, grid.coords, grid.patches, attrs), tile_labels)
    return read_bag(out_path)


def extract_slides(
    paths: Sequence[str | Path],
    encoder: Encoder,
    out_dir: str | Path,
    *,
    mpp: float | tuple[float, float] | None = None,
    batch_size: int | None = None,
    min_tissue: float = 0.25,
    truth_value: int = TUMOR,
    overwrite: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Turn slides into bags `out_dir/<slide_id>.h5`; a slide that fails does not stop the others.

    A bag that the same encoder made with the same settings is skipped, so an interrupted run is
    resumed by starting it again.

    Args:
        paths: Slides with distinct names.
        encoder: From `load_encoder`.
        out_dir: Folder of the bags.
        mpp: Micrometres per level-0 pixel of all slides, where the files do not say.
        batch_size: Tiles an encoder call; the encoder's by default.
        min_tissue: Least share of tissue in a tile.
        truth_value: Value of the truth masks that tile labels count.
        overwrite: Extract again what is there, whoever made it.
        progress: Show bars of slides and tiles.

    Returns:
        A row a slide: slide_id, status ("done", "skipped" or "failed"), n_tiles, seconds, error.

    Raises:
        BagError: Two slides have the same name, so one bag would replace the other.
    """
    paths = [Path(path) for path in paths]
    twice = [name for name, count in Counter(path.stem for path in paths).items() if count > 1]
    if twice:
        raise BagError(f"Several slides are called {twice[0]!r}; rename them, or use a folder of bags each.")

    def run(path: Path) -> tuple[str, int]:
        out_path = Path(out_dir) / f"{path.stem}.h5"
        if out_path.is_file() and not overwrite:
            return "skipped", _check_made_by(out_path, _settings(encoder, min_tissue) | _given_scale(mpp))
        options = dict(mpp=mpp, batch_size=batch_size, min_tissue=min_tissue, truth_value=truth_value)
        return "done", len(extract_slide(path, encoder, out_path, **options, progress=progress))

    records = []
    bar = tqdm(paths, desc="slides", unit="slide", disable=not progress)
    for path in bar:
        start = time.perf_counter()
        error = ""
        try:
            status, n_tiles = run(path)
        except (HDMILError, OSError) as caught:
            status, n_tiles, error = "failed", 0, str(caught)
        records.append((path.stem, status, n_tiles, time.perf_counter() - start, error))
        _show_rate(bar, records)
    return pd.DataFrame(records, columns=["slide_id", "status", "n_tiles", "seconds", "error"])


def _read_batches(
    slide: Slide, grid: TileGrid, rows: Sequence[int], batch_size: int, n_readers: int, strict: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Batches of tiles in order, which of them are whole, and the seconds that reading took.

    A batch is to be used before the next is asked for: its memory is filled again.
    """

    def read_tile(row: int, out: np.ndarray) -> bool:
        try:
            grid.read_tile(slide, row, out)
        except SlideError:
            if strict:
                raise
            return False
        return True

    def read(batch: Sequence[int], out: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        start = time.perf_counter()
        whole = [read_tile(int(row), tile) for row, tile in zip(batch, out, strict=False)]
        return out[: len(batch)], np.array(whole), time.perf_counter() - start

    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    shape = (min(batch_size, len(rows)), grid.tile_size, grid.tile_size, 3)
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


def _settings(encoder: Encoder, min_tissue: float) -> dict[str, Any]:
    """The attributes that must agree for a bag to count as already extracted."""
    return {
        "encoder": encoder.name,
        "weights_hash": encoder.weights_hash,
        "patch_size": TILE_SIZE,
        "tile_mpp": TILE_MPP,
        "min_tissue": min_tissue,
    }


def _given_scale(mpp: float | tuple[float, float] | None) -> dict[str, float]:
    if mpp is None:
        return {}
    return dict(zip(("mpp_x", "mpp_y"), map(float, np.broadcast_to(mpp, 2)), strict=True))


def _geometry(slide: Slide, grid: TileGrid) -> dict[str, Any]:
    """TRIDENT's attributes of `coords`, and the exact scale beside their rounded magnifications."""
    return {
        "patch_size_level0": grid.tile_size_level0[0],
        "level0_magnification": round(10 / slide.mpp[0]),
        "target_magnification": round(10 / grid.mpp),
        "overlap": 0,
        "level0_width": slide.dimensions[0],
        "level0_height": slide.dimensions[1],
        "mpp_x": slide.mpp[0],
        "mpp_y": slide.mpp[1],
    }


def _check_made_by(path: Path, wanted: dict[str, Any]) -> int:
    """Number of tiles of a bag that was made with the wanted settings."""
    info = bag_info(path)
    for key, value in wanted.items():
        if info.get(key) != value:
            raise BagError(
                f"{path}: already there, but made with {key} {info.get(key)!r} instead of {value!r}. Use "
                "another folder, or extract again with overwrite."
            )
    return info["n_tiles"]


def _show_rate(bar: tqdm, records: list[tuple]) -> None:
    """Tiles per second over all slides so far, and how many failed, beside the bar."""
    n_tiles, spent = (sum(r[column] for r in records if r[1] == "done") for column in (2, 3))
    failed = sum(r[1] == "failed" for r in records)
    bar.set_postfix({"tiles/s": f"{n_tiles / spent:.0f}" if spent else "-", "failed": failed})
