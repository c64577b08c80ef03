"""Prediction of slide files and bags."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hdmil_lib import devices
from hdmil_lib.bags import Bag, EncoderIdentity
from hdmil_lib.encoders.attributes import scanned_part
from hdmil_lib.encoders.encoding import encode_tiles
from hdmil_lib.errors import BagError, SlideError
from hdmil_lib.inference.prediction import Prediction, stage
from hdmil_lib.inference.tables import finished, in_order, made_with, origin_of, rows_of, table_of
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.hdmil import HDMIL
from hdmil_lib.models.info import ModelInfo
from hdmil_lib.sharing import Shard, SharedRun, WorkList, run_folder
from hdmil_lib.slides import Slide, TileGrid
from hdmil_lib.slides.listing import SlideFile, Source, list_slides, names_of
from hdmil_lib.slides.presets import described
from hdmil_lib.storage import readable, write_table

if TYPE_CHECKING:
    import pandas as pd

    from hdmil_lib.encoders.loading import Encoder


def predict(model: HDMIL, slide: str | Path | Bag, **options: Any) -> Prediction:
    """Classify a slide file or a bag; see `HDMIL.predict`."""
    if isinstance(slide, Bag):
        return predict_bag(model, slide, **options)
    return predict_slide(model, slide, **options)


@contextmanager
def running_on(model: HDMIL, device: str | torch.device) -> Iterator[None]:
    """Put a model on a device in evaluation mode, as `HDMIL.predict` says, and then back where it was.

    Raises:
        HDMILError: There is no such device.
    """
    home, there = model.device, devices.prefer(device, model.device)
    model.eval()
    if there != home:
        model.to(there)
    try:
        yield
    finally:
        if there != home:
            model.to(home)


@torch.inference_mode()
def predict_slide(
    model: HDMIL,
    slide_path: str | Path,
    *,
    all_tiles: bool = False,
    device: str | torch.device = "auto",
    mpp: float | tuple[float, float] | None = None,
    n_readers: int = 2,
    strict: bool = False,
    allow_upsampling: bool = False,
    progress: bool = False,
) -> Prediction:
    """Classify a slide file; tiles that LIPN does not keep are never read at full resolution.

    Args:
        model: The model; it is set to evaluation mode.
        slide_path: The slide file.
        all_tiles: Whether every tile is read and LIPN is not used (HDMIL†).
        device: Device on which networks and encoder run; see `HDMIL.predict`.
        mpp: Micrometers per level-0 pixel, if the file does not say or is wrong.
        n_readers: Number of threads that read ahead while the encoder runs; with 0 the stages do not overlap,
            so that their seconds add up.
        strict: Whether a damaged tile is an error; otherwise it is listed in `Prediction.broken`.
        allow_upsampling: Whether the slide may be much coarser than the model's tiles.
        progress: Whether a bar over the tiles is shown.

    Raises:
        SlideError: The slide cannot be read, has no scale, is smaller than a tile or has no tissue; a
            tile is damaged, or with `strict=False` all are.
        CheckpointError: The model does not know its encoder, or the encoder has changed.
        HDMILError: There is no such device.
    """
    seconds: dict[str, float] = {}
    with running_on(model, device), stage(seconds, "total"), Slide(slide_path, mpp) as slide:
        encoder, info = model.encoder, model.known_info
        with stage(seconds, "thumbnail"):
            grid = grid_of(slide, info, allow_upsampling)
        mask, rows = None, np.arange(len(grid))
        if not all_tiles:
            with stage(seconds, "lipn"):
                patches, bag = (
                    torch.from_numpy(grid.patches).to(model.device),
                    Segments([len(grid)], model.device),
                )
                lipn_logits = model.lipn_logits(patches) if model.looks_again else None
                kept = model.screen(patches, bag, lipn_logits)
            if lipn_logits is not None:
                with stage(seconds, "look"):
                    scores = look_scores(model, slide, grid, kept, lipn_logits, encoder, n_readers=n_readers)
                    kept = model.look_again(scores, kept, bag)
            mask = kept.cpu().numpy()
            rows = np.flatnonzero(mask.any(axis=1))
        features = encode_tiles(
            slide, grid, rows, encoder, n_readers=n_readers, strict=strict, seconds=seconds, progress=progress
        )
        whole = ~np.isnan(features).all(axis=1)
        if not whole.any():
            raise SlideError(f"{slide.path}: none of the {len(rows)} tiles to read can be read")
        result = _classify(model, features[whole], rows[whole], mask, len(grid), seconds)
    return Prediction(
        slide_id=readable(slide.name),
        classes=model.classes,
        coords=grid.coords,
        tile_size_level0=grid.tile_size_level0,
        shape=grid.shape,
        rowcol=grid.rowcol,
        thumbnail=grid.thumbnail,
        tile_um=grid.tile_um,
        slide_size=slide.dimensions,
        bounds=scanned_part(slide),
        seconds=seconds,
        broken=rows[~whole],
        **result,
    )


@torch.inference_mode()
def predict_bag(
    model: HDMIL, bag: Bag, *, all_tiles: bool = False, device: str | torch.device = "auto"
) -> Prediction:
    """Classify a slide from its bag.

    Raises:
        BagError: The bag was made by another encoder or of other tiles, or has no patches.
        CheckpointError: The model does not know its encoder.
        HDMILError: There is no such device.
    """
    check_bag(model, bag)
    seconds: dict[str, float] = {}
    with running_on(model, device), stage(seconds, "total"):
        features = torch.from_numpy(np.asarray(bag.features, dtype=np.float32)).to(model.device)
        given: dict[str, Any] = {"patches": None}
        if not all_tiles:
            given["patches"] = torch.from_numpy(bag.known_patches).to(model.device)
            if model.looks_again and model.look is not None and model.look.side in bag.looks:
                looks = np.asarray(bag.looks[model.look.side], dtype=np.float32)
                given["looks"] = torch.from_numpy(looks).to(model.device)
        output = model(features, **given, all_tiles=all_tiles)
    return Prediction(
        slide_id=bag.slide_id,
        classes=model.classes,
        coords=bag.coords,
        tile_size_level0=_tile_size_level0(bag, model.known_info.tile_size),
        shape=bag.shape,
        rowcol=bag.rowcol,
        thumbnail=bag.thumbnail,
        tile_um=bag.tile_um,
        slide_size=_slide_size(bag),
        bounds=_bounds(bag),
        seconds=seconds,
        probabilities=output.probabilities[0].cpu().numpy(),
        attention=output.attention.cpu().numpy(),
        mask=output.mask.cpu().numpy(),
    )


def predict_many(
    model: HDMIL,
    slides: Source | Sequence[Source],
    *,
    out: str | Path,
    all_tiles: bool = False,
    device: str | torch.device | Sequence[str | torch.device] = "auto",
    retry_failed: bool = False,
    shard: Shard | None = None,
    run: SharedRun | None = None,
    progress: bool = True,
    **options: Any,
) -> "pd.DataFrame":
    """Classify many slides into a CSV or parquet file, one row per slide, written after every slide.

    Slides that are in the file without an error are skipped, so an interrupted run resumes if started again;
    those whose file or scale has changed since are classified again. All rows are of one model. If a slide
    fails, its row holds the error and the run continues. Several GPUs take the slides in turn, and so do
    several processes that write the same file; see `hdmil_lib.sharing`.

    Args:
        model: The model.
        slides: A folder, a CSV file with a column `path`, slide files, or several of these.
        out: The file, CSV unless its suffix is .parquet.
        all_tiles: Whether every tile is read and LIPN is not used (HDMIL†).
        device: Device or devices, as `devices.resolve_all` takes them; "auto" is the model's GPU, or all.
        retry_failed: Whether slides are tried again that were set aside since they ended processes.
        shard: The part of the slides to classify; all by default.
        run: The part of this process in a run, entered, if these slides are only some of its slides.
        progress: Whether a bar over slides is shown.
        **options: Further options of `predict_slide`.

    Returns:
        The table with the columns of `Prediction.to_row`, `made_with`, which stands for the model and the
            slide's file, and `error`, which is empty for predicted slides.

    Raises:
        SlideError: No slide is named, or two have the same name.
        CheckpointError: `out` is a folder, another kind of table, or a table of other classes or of
            another model; or the model does not know its encoder.
        HDMILError: There is no such device.
    """
    from tqdm.auto import tqdm

    moved = device != "auto" or model.device.type == "cpu"
    targets = devices.resolve_all(device) if moved else [model.device]

    files, out, mpp = list_slides(slides), Path(out), options.get("mpp")
    by_name = {name: file for file, name in names_of(files).items()}
    if shard is not None:
        by_name = dict(shard.of(list(by_name.items())))
    origin = origin_of(model, all_tiles)
    done = finished(out, model.classes, origin, by_name, mpp)
    todo_names = [name for name in by_name if name not in done]
    n_failed, showing = 0, Lock()
    bar = tqdm(total=len(by_name), initial=len(by_name) - len(todo_names), unit="slide", disable=not progress)

    def work(own: HDMIL, target: torch.device) -> None:
        """Classify slides until none is left."""
        nonlocal n_failed
        with running_on(own, target):
            own.encoder  # noqa: B018  loaded first, so that a missing encoder is noticed at once
            while (taken := todo.take()) is not None:
                name, reason = taken
                start, settled, status = time.perf_counter(), False, "skipped"
                try:
                    row, made = (
                        rows_of(out, model.classes).get(name, {}),
                        made_with(origin, by_name[name], mpp),
                    )
                    if row.get("made_with") != made:  # no other process has done it meanwhile
                        given = {"all_tiles": all_tiles, "device": target, **options}
                        row = _row_of(own, by_name[name], reason, given)
                        if not row["error"]:
                            row |= {"made_with": made}
                        with shared.exclusive(".table"):
                            rows = rows_of(out, model.classes) | {name: row}
                            write_table(out, in_order(rows.values()))
                        status = "failed" if row["error"] else "done"
                    settled = reason is None
                finally:
                    shared.release(name, settled=settled)
                spent = time.perf_counter() - start
                shared.record(name, status, row.get("n_read", 0), spent, row["error"])
                with showing:
                    n_failed += status == "failed"
                    bar.update()
                    bar.set_postfix(failed=n_failed, refresh=False)

    with bar, nullcontext(run) if run else SharedRun(run_folder(out), todo_names) as shared:
        if retry_failed:
            shared.forget_deaths(todo_names)
        todo = WorkList(shared, todo_names)
        if len(targets) == 1:
            work(model, targets[0])
        else:
            copies = [model, *(model.replica() for _ in targets[1:])]
            with ThreadPoolExecutor(len(targets)) as pool:
                try:
                    list(pool.map(work, copies, targets))
                except BaseException:
                    todo.clear()  # the other threads end with their slide
                    raise
    return table_of(out, model.classes, list(by_name))


def _row_of(model: HDMIL, file: SlideFile, reason: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The row of a slide in the table: its prediction, or why there is none."""
    name = readable(file.slide_id)
    try:
        if reason is not None:
            raise SlideError(reason)
        given = options | {"mpp": file.scale(options.get("mpp"))}
        return predict_slide(model, file.path, **given).to_row() | {"slide_id": name, "error": ""}
    except Exception as error:  # any error concerns this slide only
        message = readable(" ".join(str(error).split())) or type(error).__name__
        return {"slide_id": name, "error": message}


def check_bag(model: HDMIL, bag: Bag) -> None:
    """Check that a bag was made by the encoder of a model, from tiles like those that it was trained on.

    Raises:
        BagError: The bag was made by another encoder, or says that its tiles have another size or scale.
    """
    info = model.known_info
    wanted = EncoderIdentity(info.encoder, info.encoder_weights)
    if bag.encoder != wanted:
        raise BagError(
            f"bag {bag.slide_id} holds features of {bag.encoder}, the model was trained on {wanted}; extract "
            "the slide with that encoder"
        )
    tiles = int(bag.attrs.get("patch_size", info.tile_size)), float(bag.attrs.get("tile_mpp", info.tile_mpp))
    if "tile_mpp" in bag.attrs and tiles != (info.tile_size, info.tile_mpp):
        raise BagError(
            f"bag {bag.slide_id} is of tiles of {tiles[0]} pixels at {tiles[1]:g} um/px, the model was "
            f"trained on {info.tile_size} at {info.tile_mpp:g}; extract the slide with "
            f"--tile-size {info.tile_size} --tile-mpp {info.tile_mpp:g}"
        )


def _tile_size_level0(bag: Bag, tile_size: int) -> tuple[int, int]:
    """Width and height of a bag's tiles in level-0 pixels, rounded; square if the bag has no scale."""
    attrs = bag.attrs
    if {"mpp_x", "mpp_y", "patch_size", "tile_mpp"} <= set(attrs):
        side = attrs["patch_size"] * attrs["tile_mpp"]  # in um
        return round(side / attrs["mpp_x"]), round(side / attrs["mpp_y"])
    width = int(attrs.get("patch_size_level0", tile_size))
    return width, width


def _slide_size(bag: Bag) -> tuple[int, int] | None:
    """Width and height of a bag's slide in level-0 pixels, if the bag says."""
    attrs = bag.attrs
    if not {"level0_width", "level0_height"} <= set(attrs):
        return None
    return int(attrs["level0_width"]), int(attrs["level0_height"])


def _bounds(bag: Bag) -> tuple[int, int, int, int] | None:
    """The scanned part of a bag's slide, if the bag names one."""
    found = np.asarray(bag.attrs.get("scanned_part", ()))
    if found.shape != (4,) or found.dtype.kind not in "iu":
        return None
    x, y, width, height = found.tolist()
    return x, y, width, height


def grid_of(slide: Slide, info: ModelInfo, allow_upsampling: bool = False) -> TileGrid:
    """The tiles of a slide, cut and chosen as those on which a model was trained.

    Raises:
        SlideError: The slide has no tiles of that kind.
    """
    return TileGrid.from_slide(
        slide,
        tile_size=info.tile_size,
        mpp=info.tile_mpp,
        patch_size=info.patch_size,
        tissue=described(info.tissue, info.min_tissue),
        allow_upsampling=allow_upsampling,
    )


def look_scores(
    model: HDMIL,
    slide: Slide,
    grid: TileGrid,
    mask: torch.Tensor,
    lipn_logits: torch.Tensor,
    encoder: "Encoder",
    *,
    n_readers: int,
) -> torch.Tensor:
    """Scores of the second look on the tiles that LIPN keeps, (N,), on the model's device.

    Tiles that LIPN does not keep are not looked at; theirs is -inf. One whose look is damaged has inf: it is
    reported where it is read in full.

    Args:
        model: A model with a second look.
        slide: The open slide.
        grid: Its N tiles.
        mask: LIPN's selection, bool (N, C).
        lipn_logits: LIPN's logits, (N, C).
        encoder: Encoder of the model.
        n_readers: Number of threads that read ahead.
    """
    assert model.look is not None
    shown = mask.any(1)
    rows = np.flatnonzero(shown.cpu().numpy())
    coarse, own = grid.at(model.look.side), encoder.at(model.look.side)
    features = encode_tiles(slide, coarse, rows, own, n_readers=n_readers, strict=False)
    whole = ~np.isnan(features).all(axis=1)
    scores = torch.full((len(grid),), torch.inf, device=model.device).masked_fill(~shown, -torch.inf)
    seen = torch.from_numpy(rows[whole]).to(model.device)
    looks = torch.from_numpy(features[whole]).to(model.device)
    scores[seen] = model.look(looks, lipn_logits[seen].amax(1))
    return scores


def _classify(
    model: HDMIL,
    features: np.ndarray,
    rows: np.ndarray,
    mask: np.ndarray | None,
    n_tiles: int,
    seconds: dict[str, float],
) -> dict[str, np.ndarray]:
    """Classify from the features (n, D) of the tiles `rows`; return fields of a `Prediction`."""
    with stage(seconds, "dmin"):
        own = None
        if mask is not None and model.pooling == "lipn":
            own = torch.from_numpy(mask[rows]).to(model.device)
        output = model.dmin(torch.from_numpy(features).to(model.device), mask=own)
        logits = output.logits if mask is None else model.calibrated(output.logits)
        probabilities = logits[0].softmax(0).cpu().numpy()
    attention = np.full((n_tiles, model.n_classes), np.nan, dtype=np.float32)
    attention[rows] = output.attention.cpu().numpy()
    if mask is None:
        mask = np.ones_like(attention) if output.mask is None else output.mask.cpu().numpy()
    return {"probabilities": probabilities, "attention": attention, "mask": mask.astype(bool)}
