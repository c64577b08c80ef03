"""Extraction of features: slides are turned into bags; runs can be interrupted and resumed."""

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hdmil_lib.bags import Bag, EncoderIdentity, read_bag, write_bag
from hdmil_lib.config import torch_threads
from hdmil_lib.encoders import made_by
from hdmil_lib.encoders.made_by import TILE_MPP, TILE_SIZE, wanted_decoder
from hdmil_lib.errors import BagError, HDMILError, SlideError
from hdmil_lib.sharing import Shard, SharedRun, WorkList, run_folder
from hdmil_lib.slides import Slide, TileGrid, TissueSettings, tissue_settings
from hdmil_lib.slides.listing import SlideFile, Source, list_slides, names_of
from hdmil_lib.slides.quality import ink_notes
from hdmil_lib.storage import readable

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from hdmil_lib.encoders.loading import Encoder
    from hdmil_lib.slides.gpu_decoding import NvImageCodec

TileLabels = Callable[[Path, TileGrid], np.ndarray | None]
"""Function from a slide file and its grid to the share of tumor in each tile, or None if it is unknown."""


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
    tissue: TissueSettings | str | None = None,
) -> np.ndarray:
    """Tiles evenly spread over slides, with which an int8 encoder is calibrated.

    Args:
        slides: Slides like those to be encoded, as `extract` takes them.
        n_tiles: Largest number of tiles in total.
        n_slides: Largest number of slides, the first ones.
        mpp: Micrometers per level-0 pixel of all slides, if the files do not say.
        tissue: Settings of the tissue mask, or the name of a preset; None takes the defaults.

    Returns:
        The tiles, uint8 (n, 256, 256, 3).

    Raises:
        SlideError: A slide cannot be read or holds no tissue.
    """
    tiles = []
    files = list_slides(slides)[:n_slides]
    for file in files:
        with Slide(file.path, file.scale(mpp)) as slide:
            grid = TileGrid.from_slide(slide, tile_size=TILE_SIZE, mpp=TILE_MPP, tissue=tissue)
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
        seconds: Dictionary to which the times are added: "crop" for reading, summed over threads, and
            "features" for the encoder.

    Yields:
        float32 (b, D), in the order of `rows`.

    Raises:
        SlideError: A tile cannot be read, and `strict`.
    """
    seconds = {} if seconds is None else seconds
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
    min_tissue: float | None = None,
    tissue: TissueSettings | str | None = None,
    looks: Sequence[int] = (),
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
        min_tissue: Smallest share of tissue in a tile; that of `tissue` if not given.
        tissue: Settings of the tissue mask, or the name of a preset; None takes the defaults.
        looks: Further sides, in pixels, at which each tile is read and encoded: 64 is a look at 2 um/px.
        tile_labels: Function that gives the share of tumor in each tile, stored for teaching and evaluation.
        progress: Whether a bar is shown.

    Returns:
        The bag as written.

    Raises:
        SlideError: The slide cannot be read or holds no tissue.
        BagError: The features are not finite.
    """
    with Slide(slide_path, mpp=mpp, name=slide_id) as slide:
        settings = tissue_settings(tissue, min_tissue=min_tissue)
        grid = TileGrid.from_slide(slide, tile_size=TILE_SIZE, mpp=TILE_MPP, tissue=settings)
        rows = range(len(grid))
        features = encode_tiles(slide, grid, rows, encoder, batch_size=batch_size, progress=progress)
        coarse = {side: encode_tiles(slide, grid.at(side), rows, encoder.at(side)) for side in looks}
        attrs = made_by.settings(encoder, settings) | _geometry(slide, grid, settings)
        attrs |= {"precision": encoder.precision, "engine": encoder.engine}
        if revision := getattr(encoder, "revision", ""):
            attrs["encoder_revision"] = revision
        attrs["decoded_by"] = "cpu" if _gpu_decoder(slide, grid, encoder) is None else "nvjpeg"
        labels = None if tile_labels is None else tile_labels(Path(slide_path), grid)
        bag = Bag(
            slide_id=readable(slide.name),
            features=features,
            coords=grid.coords,
            rowcol=grid.rowcol,
            shape=grid.shape,
            patches=grid.patches,
            encoder=EncoderIdentity(encoder.name, encoder.weights_hash),
            attrs=attrs,
            looks=coarse,
        )
        write_bag(out_path, bag, labels)
    return read_bag(out_path)


def extract(
    slides: Source | Sequence[Source],
    encoder: "Encoder | Sequence[Encoder]",
    out: str | Path,
    *,
    mpp: float | tuple[float, float] | None = None,
    batch_size: int | None = None,
    min_tissue: float | None = None,
    tissue: TissueSettings | str | None = None,
    looks: Sequence[int] = (),
    tile_labels: TileLabels | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
    run: SharedRun | None = None,
    progress: bool = True,
) -> "pd.DataFrame":
    """Turn slides into bags `<out>/<slide_id>.h5`; a slide that fails does not stop the others.

    Existing bags of the same encoder and settings are skipped, so an interrupted run resumes if started
    again. Several processes, also of several machines, may fill one folder: each slide is done by one of
    them, and all end when all slides are done. See `hdmil_lib.sharing`.

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
        min_tissue: Smallest share of tissue in a tile; that of `tissue` if not given.
        tissue: Settings of the tissue mask, or the name of a preset; None takes the defaults.
        looks: Further sides at which each tile is encoded; see `extract_slide`.
        tile_labels: Function that gives the share of tumor in each tile; see `extract_slide`.
        overwrite: Whether existing bags are extracted again.
        shard: The part of the slides to extract; all by default.
        run: The part of this process in a run, entered, if these slides are only some of its slides.
        progress: Whether bars over slides and tiles are shown; with several encoders over slides alone.

    Returns:
        One row per slide, in the order of the slides: slide_id, status ("done", "skipped" or "failed"),
            n_tiles, seconds, error; mpp (of level 0, along x), mpp_source, and note, what is odd about it.

    Raises:
        SlideError: No slide is named, or a folder or table names none.
        BagError: Two slides have the same name, or `out` cannot be a folder.
        HDMILError: The encoders are not copies of one, or a tissue setting is out of its range.
    """
    import pandas as pd

    encoders = _copies_of_one(encoder)
    settings = tissue_settings(tissue, min_tissue=min_tissue)
    files, out = list_slides(slides), Path(out)
    by_name = {name: file for file, name in names_of(files, BagError).items()}
    if shard is not None:
        by_name = dict(shard.of(list(by_name.items())))
    try:  # before the first slide is encoded
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BagError(
            f"{out}: cannot be a folder ({error.strerror}); choose another for the bags"
        ) from error

    def bag_of(file: SlideFile, own: "Encoder") -> tuple[str, int, Mapping[str, Any]]:
        out_path, scale = out / f"{file.slide_id}.h5", file.scale(mpp)
        if out_path.is_file() and not overwrite:
            info = made_by.check_made_by(out_path, made_by.settings(own, settings), looks, scale)
            return "skipped", info["n_tiles"], info
        bag = extract_slide(
            file.path,
            own,
            out_path,
            slide_id=file.slide_id,
            mpp=scale,
            batch_size=batch_size,
            tissue=settings,
            looks=looks,
            tile_labels=tile_labels,
            progress=progress and len(encoders) == 1,
        )
        return "done", len(bag), bag.attrs

    records = dict[str, tuple]()
    bar = tqdm(total=len(by_name), desc="slides", unit="slide", disable=not progress)
    showing = Lock()

    def work(own: "Encoder") -> None:
        """Extract slides until none is left."""
        while (taken := todo.take()) is not None:
            name, message = taken
            start, about, settled = time.perf_counter(), dict[str, Any](), False
            try:
                if message is not None:
                    raise SlideError(message)
                status, n_tiles, made = bag_of(by_name[name], own)
                message, about, settled = "", dict(made), True
            except Exception as error:  # any error concerns this slide only
                settled = message is None
                status, n_tiles, message = "failed", 0, readable(str(error)) or type(error).__name__
            except BaseException:
                todo.clear()  # the other encoders end with their slide
                raise
            finally:
                shared.release(name, settled=settled)
            spent = time.perf_counter() - start
            with showing:
                scale = (about.get(key) for key in ("mpp_x", "mpp_source", "mpp_note"))
                records[name] = (name, status, n_tiles, spent, message, *scale)
                shared.record(name, status, n_tiles, spent, message)
                _show_rate(bar, list(records.values()))
                bar.update()

    with bar, nullcontext(run) if run else SharedRun(run_folder(out), list(by_name)) as shared:
        todo = WorkList(shared, by_name)
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
    return pd.DataFrame([records[name] for name in by_name], columns=columns)


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


def _geometry(slide: Slide, grid: TileGrid, tissue: TissueSettings) -> dict[str, Any]:
    """TRIDENT's attributes of `coords`, with rounded magnifications, and the exact scale."""
    return {
        "patch_size_level0": grid.tile_size_level0[0],
        "level0_magnification": round(10 / slide.mpp[0]),
        "target_magnification": round(10 / grid.mpp),
        "overlap": 0,
        "level0_width": slide.dimensions[0],
        "level0_height": slide.dimensions[1],
        "mpp_x": slide.mpp[0],
        "mpp_y": slide.mpp[1],
        "mpp_source": slide.scale.source,
        "mpp_note": "; ".join((*slide.scale.notes, *ink_notes(grid, tissue))),
    }


def _show_rate(bar: tqdm, records: list[tuple]) -> None:
    """Show tiles per second and the number of failed slides beside the bar."""
    n_tiles, spent = (sum(r[column] for r in records if r[1] == "done") for column in (2, 3))
    failed = sum(r[1] == "failed" for r in records)
    shown = {"tiles/s": f"{n_tiles / spent:.0f}" if spent else "-", "failed": failed}
    bar.set_postfix(shown, refresh=False)
