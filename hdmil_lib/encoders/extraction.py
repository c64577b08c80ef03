"""Extraction of features: slides are turned into bags; runs can be interrupted and resumed."""

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hdmil_lib.bags import Bag, EncoderIdentity, read_bag, write_bag
from hdmil_lib.config import torch_threads
from hdmil_lib.encoders import failures
from hdmil_lib.encoders.attributes import (
    TILE_MPP,
    TILE_SIZE,
    check_made_by,
    geometry,
    given_scale,
    settings_of,
    wanted_decoder,
)
from hdmil_lib.errors import BagError, HDMILError, SlideError
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.slides.fingerprint import fingerprint
from hdmil_lib.slides.listing import SlideFile, Source, list_slides
from hdmil_lib.storage import readable, remove_stale

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from hdmil_lib.encoders.loading import Encoder
    from hdmil_lib.slides.gpu_decoding import NvImageCodec

TileLabels = Callable[[Path, TileGrid], np.ndarray | None]
"""Function from a slide file and its grid to the share of tumor in each tile, or None if it is unknown."""

MAX_BROKEN = 0.1
"""Share of the tiles of a slide that may be unreadable; such tiles are left out of the bag."""


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


def spread_tiles(
    slides: Source | Sequence[Source],
    n_tiles: int = 96,
    n_slides: int = 8,
    *,
    mpp: float | tuple[float, float] | None = None,
) -> np.ndarray:
    """Tiles evenly spread over slides, with which an int8 encoder is calibrated.

    Args:
        slides: Slides like those to be encoded, as `extract` takes them.
        n_tiles: Largest number of tiles in total.
        n_slides: Largest number of slides, the first ones.
        mpp: Micrometers per level-0 pixel of all slides, if the files do not say.

    Returns:
        The tiles, uint8 (n, 256, 256, 3).

    Raises:
        SlideError: A slide cannot be read or holds no tissue.
    """
    tiles = []
    files = list_slides(slides)[:n_slides]
    for file in files:
        with Slide(file.path, file.scale(mpp)) as slide:
            grid = TileGrid.from_slide(slide, tile_size=TILE_SIZE, mpp=TILE_MPP)
            rows = np.linspace(0, len(grid) - 1, min(len(grid), n_tiles // len(files))).astype(int)
            tiles += [grid.read_tile(slide, row) for row in rows]
    return np.stack(tiles)


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
    decoder = _gpu_decoder(slide, grid, encoder)
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


def extract_slide(
    slide_path: str | Path,
    encoder: "Encoder",
    out_path: str | Path,
    *,
    slide_id: str | None = None,
    mpp: float | tuple[float, float] | None = None,
    batch_size: int | None = None,
    min_tissue: float = 0.25,
    looks: Sequence[int] = (),
    max_broken: float = MAX_BROKEN,
    tile_labels: TileLabels | None = None,
    progress: bool = False,
) -> Bag:
    """Turn one slide into a bag file.

    Args:
        slide_path: A slide file that OpenSlide can read.
        encoder: Encoder from `load_encoder`.
        out_path: The .h5 file to write, whole or not at all.
        slide_id: Name of the slide; by default that of the file without its suffix.
        mpp: Micrometers per level-0 pixel, as `Slide` takes it.
        batch_size: Number of tiles per encoder call; the encoder's `batch_size` by default.
        min_tissue: Smallest share of tissue in a tile.
        looks: Further sides, in pixels, at which each tile is read and encoded: 64 is a look at 2 um/px.
        max_broken: Largest share of tiles that cannot be read; they are left out, and the bag's attribute
            `n_broken` counts them. With 0, the first one is an error.
        tile_labels: Function that gives the share of tumor in each tile, stored for teaching and evaluation.
        progress: Whether a bar is shown.

    Returns:
        The bag as written.

    Raises:
        SlideError: The slide cannot be read, holds no tissue, or more of its tiles are broken than allowed.
        BagError: The features are not finite.
    """
    source = fingerprint(Path(slide_path))
    with Slide(slide_path, mpp=mpp, name=slide_id) as slide:
        grid = TileGrid.from_slide(slide, tile_size=TILE_SIZE, mpp=TILE_MPP, min_tissue=min_tissue)
        rows, broken = range(len(grid)), list[int]()
        options: dict[str, Any] = {"strict": max_broken == 0, "broken": broken}
        features = encode_tiles(
            slide, grid, rows, encoder, batch_size=batch_size, progress=progress, **options
        )
        coarse = {
            side: encode_tiles(slide, grid.at(side), rows, encoder.at(side), **options) for side in looks
        }
        n_broken = _check_broken(slide, grid, broken, max_broken)
        whole = np.isin(rows, broken, invert=True)
        attrs = settings_of(encoder, min_tissue) | geometry(slide, grid)
        attrs |= {"precision": encoder.precision, "engine": encoder.engine, "n_broken": n_broken}
        attrs["decoded_by"] = "cpu" if _gpu_decoder(slide, grid, encoder) is None else "nvjpeg"
        if source is not None:
            attrs["source_fingerprint"] = source
        labels = None if tile_labels is None else tile_labels(Path(slide_path), grid)
        bag = Bag(
            slide_id=readable(slide.name),
            features=features[whole],
            coords=grid.coords[whole],
            rowcol=grid.rowcol[whole],
            shape=grid.shape,
            patches=grid.patches[whole],
            encoder=EncoderIdentity(encoder.name, encoder.weights_hash),
            attrs=attrs,
            looks={side: values[whole] for side, values in coarse.items()},
        )
        if labels is not None and broken:
            labels = labels[whole]
        write_bag(out_path, bag, labels)
    return read_bag(out_path)


def _check_broken(slide: Slide, grid: TileGrid, broken: Sequence[int], max_broken: float) -> int:
    """Number of tiles and squares that cannot be read; raises a SlideError if they are more than allowed."""
    n_broken = len(set(broken)) + grid.n_unseen
    n_tiles = len(grid) + grid.n_unseen
    if n_broken > max_broken * n_tiles or n_broken == n_tiles:
        raise SlideError(
            f"{slide.path}: {n_broken:,} of {n_tiles:,} tiles cannot be read, more than {max_broken:.0%}. "
            "Copy or download the file again, or allow a larger share (--max-broken)."
        )
    return n_broken


def extract(
    slides: str | Path | Sequence[str | Path],
    encoder: "Encoder | Sequence[Encoder]",
    out: str | Path,
    *,
    mpp: float | tuple[float, float] | None = None,
    batch_size: int | None = None,
    min_tissue: float = 0.25,
    looks: Sequence[int] = (),
    max_broken: float = MAX_BROKEN,
    tile_labels: TileLabels | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    progress: bool = True,
) -> "pd.DataFrame":
    """Turn slides into bags `<out>/<slide_id>.h5`; a slide that fails does not stop the others.

    Existing bags of the same encoder and settings are skipped, so an interrupted run resumes if started
    again. Why a slide cannot be read is kept in `<out>/failed/<slide_id>.json`, and the slide is not tried
    again unless its file or the settings change. Other failures, such as a full disk, are tried again.

    Args:
        slides: A folder, a CSV file with a column `path` and optionally `slide_id` and `mpp`, slide files, or
            several of these; see `list_slides`.
        encoder: Encoder from `load_encoder`; or several copies of one, from `Encoder.to`, which take the
            slides in turn, each in a thread of its own. `tile_labels` is then called from these threads.
        out: Folder of the bags.
        mpp: Micrometers per level-0 pixel of all slides, as `Slide` takes it: a number overrides what the
            files say, `IfUnknown` fills in where they do not. A column `mpp` of a table comes before what the
            files say.
        batch_size: Number of tiles per encoder call; the encoder's `batch_size` by default.
        min_tissue: Smallest share of tissue in a tile.
        looks: Further sides at which each tile is encoded; see `extract_slide`.
        max_broken: Largest share of tiles of a slide that cannot be read; see `extract_slide`.
        tile_labels: Function that gives the share of tumor in each tile; see `extract_slide`.
        overwrite: Whether existing bags are extracted again.
        retry_failed: Whether slides that could not be read before are tried again.
        progress: Whether bars over slides and tiles are shown; with several encoders over slides alone.

    Returns:
        One row per slide, in the order of the slides: slide_id, status ("done", "skipped" or "failed"),
            n_tiles, seconds, error; mpp (of level 0, along x), mpp_source, and note, what is odd about it;
            n_broken, the tiles that were left out; and tried, false if nothing was done in this run.

    Raises:
        SlideError: No slide is named, or a folder or table names none.
        BagError: Two slides have the same name, or `out` cannot be a folder.
        HDMILError: The encoders are not copies of one.
    """
    import pandas as pd

    encoders = _copies_of_one(encoder)
    files, out = list_slides(slides), Path(out)
    twice = [name for name, count in Counter(file.slide_id for file in files).items() if count > 1]
    if twice:
        raise BagError(
            f"several slides are called {twice[0]!r}; name them in a CSV with the columns slide_id and path"
        )
    try:  # before the first slide is encoded
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BagError(
            f"{out}: cannot be a folder ({error.strerror}); choose another for the bags"
        ) from error

    remove_stale(out)

    def run(file: SlideFile, own: "Encoder", source: str | None) -> tuple[str, int, Mapping[str, Any]]:
        out_path, scale = out / f"{file.slide_id}.h5", file.scale(mpp)
        if out_path.is_file() and not overwrite:
            expected = settings_of(own, min_tissue) | given_scale(scale)
            info = check_made_by(out_path, expected, looks, scale, source, max_broken)
            return "skipped", info["n_tiles"], info
        bag = extract_slide(
            file.path,
            own,
            out_path,
            slide_id=file.slide_id,
            mpp=scale,
            batch_size=batch_size,
            min_tissue=min_tissue,
            looks=looks,
            max_broken=max_broken,
            tile_labels=tile_labels,
            progress=progress and len(encoders) == 1,
        )
        failures.forget(out, file.slide_id)
        return "done", len(bag), bag.attrs

    def attempt(file: SlideFile, own: "Encoder") -> tuple[str, int, Mapping[str, Any], str, bool]:
        """Extract a slide; returns status, number of tiles, attributes, error, and whether it was tried."""
        source = fingerprint(file.path)
        tried_with = settings_of(own, min_tissue) | {"mpp": repr(file.scale(mpp)), "looks": list(looks)}
        settings = failures.settings_digest(tried_with | {"max_broken": max_broken})
        if not (retry_failed or overwrite or (out / f"{file.slide_id}.h5").is_file()):
            reason = failures.known_reason(out, file.slide_id, source or failures.NO_FILE, settings)
            if reason is not None:
                return "failed", 0, {}, reason, False
        try:
            status, n_tiles, about = run(file, own, source)
        except Exception as error:  # any error concerns this slide only
            message = readable(" ".join(str(error).split())) or type(error).__name__
            if isinstance(error, SlideError):
                known = source or failures.NO_FILE
                failures.remember(out, file.slide_id, file.path, message, known, settings)
            return "failed", 0, {}, message, True
        return status, n_tiles, about, "", status == "done"

    todo, records = deque(files), dict[SlideFile, tuple]()
    bar = tqdm(total=len(files), desc="slides", unit="slide", disable=not progress)
    showing = Lock()

    def work(own: "Encoder") -> None:
        """Extract slides until none is left."""
        while True:
            try:
                file = todo.popleft()
            except IndexError:
                return
            start = time.perf_counter()
            try:
                status, n_tiles, about, message, tried = attempt(file, own)
            except BaseException:
                todo.clear()  # the other encoders end with their slide
                raise
            with showing:
                scale = (about.get(key) for key in ("mpp_x", "mpp_source", "mpp_note"))
                spent = time.perf_counter() - start
                row = (readable(file.slide_id), status, n_tiles, spent, message, *scale)
                records[file] = (*row, int(about.get("n_broken", 0)), tried)
                _show_rate(bar, list(records.values()))
                bar.update()

    with bar:
        if len(encoders) == 1:
            work(encoders[0])
        else:
            import torch

            # The threads set PyTorch's number of threads for themselves, and at last it is as it was.
            with torch_threads(torch.get_num_threads()), ThreadPoolExecutor(len(encoders)) as pool:
                try:
                    list(pool.map(work, encoders))
                except BaseException:  # Ctrl-C reaches this thread
                    todo.clear()
                    raise
    columns = ["slide_id", "status", "n_tiles", "seconds", "error", "mpp", "mpp_source", "note"]
    columns += ["n_broken", "tried"]
    return pd.DataFrame([records[file] for file in files], columns=columns)


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


def _copies_of_one(encoder: "Encoder | Sequence[Encoder]") -> "list[Encoder]":
    """The encoders as a list, checked to give the same features."""
    encoders = list(encoder) if isinstance(encoder, Sequence) else [encoder]
    kinds = {(e.name, e.weights_hash, e.engine, e.precision, wanted_decoder(e)) for e in encoders}
    if len(kinds) != 1 or len(set(map(id, encoders))) < len(encoders):
        raise HDMILError(
            f"{len(encoders)} encoders of {len(kinds)} kinds; give one, or copies of one from Encoder.to."
        )
    return encoders


def _gpu_decoder(slide: Slide, grid: TileGrid, encoder: "Encoder") -> "NvImageCodec | None":
    """The decoder of the encoder's GPU if the encoder asks for it and the slide allows it, else None."""
    if wanted_decoder(encoder) != "nvjpeg":
        return None
    from hdmil_lib.slides.gpu_decoding import nvjpeg

    decoder = nvjpeg(encoder.device)
    return decoder if slide.can_decode(grid.mpp, decoder) else None


def _show_rate(bar: tqdm, records: list[tuple]) -> None:
    """Show tiles per second and the number of failed slides beside the bar."""
    n_tiles, spent = (sum(r[column] for r in records if r[1] == "done") for column in (2, 3))
    failed = sum(r[1] == "failed" for r in records)
    shown = {"tiles/s": f"{n_tiles / spent:.0f}" if spent else "-", "failed": failed}
    bar.set_postfix(shown, refresh=False)
