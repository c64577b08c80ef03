"""Extraction of features: slides are turned into bags; runs can be interrupted and resumed."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hdmil_lib.bags import Bag, EncoderIdentity, read_bag, write_bag
from hdmil_lib.config import torch_threads
from hdmil_lib.encoders import failures
from hdmil_lib.encoders.attributes import (
    check_made_by,
    geometry,
    settings_of,
    wanted_decoder,
)
from hdmil_lib.encoders.encoding import encode_tiles, gpu_decoder
from hdmil_lib.errors import BagError, HDMILError, SlideError
from hdmil_lib.sharing import Shard, SharedRun, WorkList, run_folder
from hdmil_lib.slides import Slide, TileGrid, TileSettings, TissueSettings, tissue_settings
from hdmil_lib.slides.fingerprint import fingerprint
from hdmil_lib.slides.listing import SlideFile, Source, list_slides, names_of
from hdmil_lib.slides.tiling import DEFAULT_TILES
from hdmil_lib.storage import readable, remove_stale

if TYPE_CHECKING:
    import pandas as pd

    from hdmil_lib.encoders.loading import Encoder

TileLabels = Callable[[Path, TileGrid], np.ndarray | None]
"""Function from a slide file and its grid to the share of tumor in each tile, or None if it is unknown."""

MAX_BROKEN = 0.1
"""Share of the tiles of a slide that may be unreadable; such tiles are left out of the bag."""


def spread_tiles(
    slides: Source | Sequence[Source],
    n_tiles: int = 96,
    n_slides: int = 8,
    *,
    mpp: float | tuple[float, float] | None = None,
    tissue: TissueSettings | str | None = None,
    tiles: TileSettings = DEFAULT_TILES,
) -> np.ndarray:
    """Tiles evenly spread over slides, with which an int8 encoder is calibrated.

    Args:
        slides: Slides like those to be encoded, as `extract` takes them.
        n_tiles: Largest number of tiles in total.
        n_slides: Largest number of slides, the first ones.
        mpp: Micrometers per level-0 pixel of all slides, if the files do not say.
        tissue: Settings of the tissue mask, or the name of a preset; None takes the defaults.
        tiles: Side and scale of the tiles.

    Returns:
        The tiles, uint8 (n, side, side, 3).

    Raises:
        SlideError: A slide cannot be read or holds no tissue.
    """
    read = []
    files = list_slides(slides)[:n_slides]
    for file in files:
        with Slide(file.path, file.scale(mpp)) as slide:
            grid = tiles.grid(slide, tissue)
            rows = np.linspace(0, len(grid) - 1, min(len(grid), n_tiles // len(files))).astype(int)
            read += [grid.read_tile(slide, row) for row in rows]
    return np.stack(read)


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
    tiles: TileSettings = DEFAULT_TILES,
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
        min_tissue: Smallest share of tissue in a tile; that of `tissue` if not given.
        tissue: Settings of the tissue mask, or the name of a preset; None takes the defaults.
        tiles: Side and scale of the tiles.
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
        settings = tissue_settings(tissue, min_tissue=min_tissue)
        grid = tiles.grid(slide, settings)
        rows, broken = range(len(grid)), list[int]()
        options: dict[str, Any] = {"strict": max_broken == 0, "broken": broken}
        features = encode_tiles(
            slide, grid, rows, encoder, batch_size=batch_size, progress=progress, **options
        )
        coarse = {
            side: encode_tiles(slide, grid.at(side), rows, encoder.at(side), **options) for side in looks
        }
        n_broken = _check_broken(slide, len(grid), broken, max_broken)
        whole = np.isin(rows, broken, invert=True)
        attrs = settings_of(encoder, settings, tiles) | geometry(slide, grid, settings)
        attrs |= {"precision": encoder.precision, "engine": encoder.engine, "n_broken": n_broken}
        if source is not None:
            attrs["source_fingerprint"] = source
        if revision := getattr(encoder, "revision", ""):
            attrs["encoder_revision"] = revision
        attrs["decoded_by"] = "cpu" if gpu_decoder(slide, grid, encoder) is None else "nvjpeg"
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


def _check_broken(slide: Slide, n_tiles: int, broken: Sequence[int], max_broken: float) -> int:
    """Number of tiles that cannot be read; raises a SlideError if they are more than allowed, or all."""
    n_broken = len(set(broken))
    if n_broken > max_broken * n_tiles or n_broken == n_tiles:
        raise SlideError(
            f"{slide.path}: {n_broken:,} of {n_tiles:,} tiles cannot be read, more than {max_broken:.0%}. "
            "Copy or download the file again, or allow a larger share (--max-broken)."
        )
    return n_broken


def extract(
    slides: Source | Sequence[Source],
    encoder: "Encoder | Sequence[Encoder]",
    out: str | Path,
    *,
    mpp: float | tuple[float, float] | None = None,
    batch_size: int | None = None,
    min_tissue: float | None = None,
    tissue: TissueSettings | str | None = None,
    tiles: TileSettings = DEFAULT_TILES,
    looks: Sequence[int] = (),
    max_broken: float = MAX_BROKEN,
    tile_labels: TileLabels | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    shard: Shard | None = None,
    run: SharedRun | None = None,
    progress: bool = True,
) -> "pd.DataFrame":
    """Turn slides into bags `<out>/<slide_id>.h5`; a slide that fails does not stop the others.

    Existing bags of the same encoder and settings are skipped, so an interrupted run resumes if started
    again. Why a slide cannot be read is kept in `<out>/failed/<slide_id>.json`, and the slide is not tried
    again unless its file or the settings change. Other failures, such as a full disk, are tried again.

    Several processes, also of several machines, may fill one folder: each slide is done by one of
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
        tiles: Side and scale of the tiles.
        looks: Further sides at which each tile is encoded; see `extract_slide`.
        max_broken: Largest share of tiles of a slide that cannot be read; see `extract_slide`.
        tile_labels: Function that gives the share of tumor in each tile; see `extract_slide`.
        overwrite: Whether existing bags are extracted again.
        retry_failed: Whether slides are tried again that could not be read before, or that were set aside
            since they ended processes.
        shard: The part of the slides to extract; all by default.
        run: The part of this process in a run, entered, if these slides are only some of its slides.
        progress: Whether bars over slides and tiles are shown; with several encoders over slides alone.

    Returns:
        One row per slide, in the order of the slides: slide_id, status ("done", "skipped" or "failed"),
            n_tiles, seconds, error; mpp (of level 0, along x), mpp_source, and note, what is odd about it;
            n_broken, the tiles that were left out; and tried, false if nothing was done in this run.

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

    remove_stale(out)

    def bag_of(file: SlideFile, own: "Encoder", source: str | None) -> tuple[str, int, Mapping[str, Any]]:
        out_path, scale = out / f"{file.slide_id}.h5", file.scale(mpp)
        if out_path.is_file() and not overwrite:
            info = check_made_by(
                out_path, settings_of(own, settings, tiles), looks, scale, source, max_broken
            )
            return "skipped", info["n_tiles"], info
        bag = extract_slide(
            file.path,
            own,
            out_path,
            slide_id=file.slide_id,
            mpp=scale,
            batch_size=batch_size,
            tissue=settings,
            tiles=tiles,
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
        scale = file.scale(mpp)
        given = {"mpp": f"{type(scale).__name__} {scale}", "looks": list(looks)}
        tried_with = settings_of(own, settings, tiles) | given
        digest = failures.settings_digest(tried_with | {"max_broken": max_broken})
        if not (retry_failed or overwrite or (out / f"{file.slide_id}.h5").is_file()):
            reason = failures.known_reason(out, file.slide_id, source or failures.NO_FILE, digest)
            if reason is not None:
                return "failed", 0, {}, reason, False
        try:
            status, n_tiles, about = bag_of(file, own, source)
        except Exception as error:  # any error concerns this slide only
            message = readable(" ".join(str(error).split())) or type(error).__name__
            if isinstance(error, SlideError):
                known = source or failures.NO_FILE
                failures.remember(out, file.slide_id, file.path, message, known, digest)
            return "failed", 0, {}, message, True
        return status, n_tiles, about, "", status == "done"

    records = dict[str, tuple]()
    bar = tqdm(total=len(by_name), desc="slides", unit="slide", disable=not progress)
    showing = Lock()

    def work(own: "Encoder") -> None:
        """Extract slides until none is left."""
        while (taken := todo.take()) is not None:
            name, message = taken
            start, settled = time.perf_counter(), message is None
            try:
                outcome = ("failed", 0, {}, message, False) if message else attempt(by_name[name], own)
            except BaseException:
                settled = False
                todo.clear()  # the other encoders end with their slide
                raise
            finally:
                shared.release(name, settled=settled)
            status, n_tiles, about, error, tried = outcome
            spent = time.perf_counter() - start
            with showing:
                scale = (about.get(key) for key in ("mpp_x", "mpp_source", "mpp_note"))
                n_broken = int(about.get("n_broken", 0))
                records[name] = (name, status, n_tiles, spent, error, *scale, n_broken, tried)
                shared.record(name, status, n_tiles, spent, error)
                _show_rate(bar, list(records.values()))
                bar.update()

    with bar, nullcontext(run) if run else SharedRun(run_folder(out), list(by_name)) as shared:
        if retry_failed:
            shared.forget_deaths(by_name)
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
    columns += ["n_broken", "tried"]
    return pd.DataFrame([records[name] for name in by_name], columns=columns)


def _copies_of_one(encoder: "Encoder | Sequence[Encoder]") -> "list[Encoder]":
    """The encoders as a list, checked to give the same features."""
    encoders = list(encoder) if isinstance(encoder, Sequence) else [encoder]
    kinds = {(e.name, e.weights_hash, e.engine, e.precision, wanted_decoder(e)) for e in encoders}
    if len(kinds) != 1 or len(set(map(id, encoders))) < len(encoders):
        raise HDMILError(
            f"{len(encoders)} encoders of {len(kinds)} kinds; give one, or copies of one from Encoder.to."
        )
    return encoders


def _show_rate(bar: tqdm, records: list[tuple]) -> None:
    """Show tiles per second and the number of failed slides beside the bar."""
    n_tiles, spent = (sum(r[column] for r in records if r[1] == "done") for column in (2, 3))
    failed = sum(r[1] == "failed" for r in records)
    shown = {"tiles/s": f"{n_tiles / spent:.0f}" if spent else "-", "failed": failed}
    bar.set_postfix(shown, refresh=False)
