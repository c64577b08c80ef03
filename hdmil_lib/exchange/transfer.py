"""Import and export of whole folders, slide by slide; runs can be interrupted and resumed."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hdmil_lib.bags import (
    Bag,
    EncoderIdentity,
    bag_info,
    grid_positions,
    read_bag,
    read_tile_labels,
    write_bag,
)
from hdmil_lib.errors import BagError, HDMILError, nearest
from hdmil_lib.exchange import clam, torchmil, trident
from hdmil_lib.exchange.foreign import ForeignFolder, Tiles
from hdmil_lib.storage import readable, write_table

if TYPE_CHECKING:
    import pandas as pd

    from hdmil_lib.cohort import Cohort

SOURCES = {"clam": clam.open_folder, "trident": trident.open_folder, "torchmil": torchmil.open_folder}
"""Functions that find the slides in a folder of a tool, by its name."""
TARGETS = ("clam", "torchmil")
"""Tools for which bags are written."""
LABELS = "cohort.csv"
"""Name of the label table that is written beside bags whose slides have labels."""


def import_bags(
    folder: str | Path,
    tool: str,
    out: str | Path,
    *,
    encoder: str | None = None,
    patches: str | Path | None = None,
    tile_size: int | None = None,
    progress: bool = True,
) -> "pd.DataFrame":
    """Write bags `<out>/<slide_id>.h5` from features of another tool; a slide that fails stops no other.

    Bags have no patches; see `add_patches`. Where slides have labels, `<out>/cohort.csv` is written, with
    each slide as a case of its own. Existing bags of the same encoder are skipped.

    Args:
        folder: Folder of the tool; see `open_folder` of `exchange.clam`, `.trident` and `.torchmil`.
        tool: "clam", "trident" or "torchmil".
        out: Folder of the bags.
        encoder: Name of the encoder of the features, where the files do not say. Bags of encoders with
            different names cannot be mixed.
        patches: Folder of the tool's coordinates, where it is not found in `folder`.
        tile_size: Side of a tile in level-0 pixels, where the files do not say.
        progress: Whether a bar over slides is shown.

    Returns:
        One row per slide: slide_id, status ("done", "skipped" or "failed"), n_tiles, error.

    Raises:
        HDMILError: The tool is unknown, there are no features or those of several encoders, or the encoder
            is not known.
    """
    folder, out = Path(folder), Path(out)
    if tool not in SOURCES:
        raise HDMILError(
            f"cannot read files of {tool!r}{nearest(tool, SOURCES)}; choose {', '.join(SOURCES)}"
        )
    if not folder.is_dir():
        raise HDMILError(f"{folder}: no such folder; give the one that {tool} wrote")
    found = SOURCES[tool](folder, Path(patches) if patches is not None else None)
    _check_encoder_is_known(found, encoder)
    labels: dict[str, str] = {}

    def run(slide_id: str) -> tuple[str, int]:
        path = out / f"{slide_id}.h5"
        tiles = found.slides[slide_id]()
        own = _encoder_of(found, tiles, encoder, tool)
        if tiles.label is not None:
            labels[slide_id] = tiles.label
        if path.is_file():
            return "skipped", _check_existing(path, own, tiles)
        write_bag(path, _bag(slide_id, tiles, own, tool, tile_size), tiles.tile_labels)
        return "done", len(tiles.features)

    report = run_each(found.slides, run, f"{tool} to bags", progress)
    if labels:
        _write_labels(out / LABELS, labels)
    return report


def export_bags(
    bags: str | Path, tool: str, out: str | Path, *, cohort: "Cohort | None" = None, progress: bool = True
) -> "pd.DataFrame":
    """Write the features of bags for another tool; a bag that fails stops no other.

    Slides that are in `out` already are skipped.

    Args:
        bags: Folder of bags.
        tool: "clam" (`h5_files` and `pt_files`) or "torchmil" (`features`, `coords`, `labels`).
        out: Folder of the files.
        cohort: Labels; with it only its slides are written, for torchmil with their labels.
        progress: Whether a bar over slides is shown.

    Returns:
        One row per slide, as from `import_bags`.

    Raises:
        HDMILError: The tool is unknown, or there are no bags.
    """
    bags, out = Path(bags), Path(out)
    if tool not in TARGETS:
        raise HDMILError(
            f"cannot write files for {tool!r}{nearest(tool, TARGETS)}; choose {', '.join(TARGETS)}"
        )
    names = bag_names(bags) if cohort is None else cohort.slide_ids
    labels = {} if cohort is None else cohort.label_of

    def run(slide_id: str) -> tuple[str, int]:
        path = bags / f"{slide_id}.h5"
        done = clam.is_written(slide_id, out) if tool == "clam" else torchmil.is_written(slide_id, out)
        if done:
            return "skipped", bag_info(path)["n_tiles"]
        bag = read_bag(path)
        if bag.slide_id != slide_id:
            raise BagError(f"{path}: says that it is of slide {bag.slide_id!r}; was it renamed?")
        if tool == "clam":
            clam.write_slide(bag, out)
        else:
            torchmil.write_slide(bag, out, label=labels.get(slide_id), tile_labels=read_tile_labels(path))
        return "done", len(bag)

    return run_each(names, run, f"bags to {tool}", progress)


def bag_names(folder: Path) -> list[str]:
    """Names of the slides of a folder of bags, sorted.

    Raises:
        HDMILError: There are no bags.
    """
    names = sorted(path.stem for path in folder.glob("*.h5") if not path.name.startswith("."))
    if not names:
        raise HDMILError(f"{folder}: no bags (*.h5) in it; give the folder that `hdmil extract` wrote")
    return names


def run_each(
    names: Iterable[str], run: Callable[[str], tuple[str, int]], title: str, progress: bool
) -> "pd.DataFrame":
    """Run a function on every slide; any error is that slide's alone.

    Args:
        names: Names of the slides.
        run: Function from a name to a status ("done" or "skipped") and the number of tiles.
        title: Title of the bar.
        progress: Whether a bar over slides is shown.

    Returns:
        One row per slide: slide_id, status ("done", "skipped" or "failed"), n_tiles, error.
    """
    import pandas as pd

    records = []
    for slide_id in tqdm(list(names), desc=title, unit="slide", disable=not progress):
        try:
            status, n_tiles, message = *run(slide_id), ""
        except Exception as error:
            status, n_tiles, message = "failed", 0, " ".join(str(error).split()) or type(error).__name__
        records.append((readable(slide_id), status, n_tiles, message))
    return pd.DataFrame(records, columns=["slide_id", "status", "n_tiles", "error"])


def _check_encoder_is_known(found: ForeignFolder, named: str | None) -> None:
    """Check, before any bag is written, that the first slide's encoder is known."""
    if named is None and found.encoder is None:
        with suppress(BagError):  # a damaged file is reported with the others
            _encoder_of(found, next(iter(found.slides.values()))(), None, "")


def _encoder_of(found: ForeignFolder, tiles: Tiles, named: str | None, tool: str) -> EncoderIdentity:
    """The encoder of a slide's features: that of the caller, else of the file, else of the folder.

    Raises:
        HDMILError: None of them names it.
    """
    if named is None and tiles.encoder is not None:
        return tiles.encoder
    name = named or found.encoder
    if name is None:
        raise HDMILError(
            f"{found.path}: does not say which encoder made the features; name it (--encoder), so that those "
            "of two encoders are not mixed"
        )
    return EncoderIdentity(name, f"imported from {tool}")


def _check_existing(path: Path, encoder: EncoderIdentity, tiles: Tiles) -> int:
    """Number of tiles of a bag that is there already.

    Raises:
        BagError: It is of another encoder, or has other tiles.
    """
    info = bag_info(path)
    there = EncoderIdentity(str(info.get("encoder")), str(info.get("weights_hash")))
    if there != encoder or info["n_tiles"] != len(tiles.features):
        raise BagError(
            f"{path}: already there, with {info['n_tiles']} tiles of {there} instead of "
            f"{len(tiles.features)} of {encoder}; use another folder, or delete the bag"
        )
    return info["n_tiles"]


def _bag(slide_id: str, tiles: Tiles, encoder: EncoderIdentity, tool: str, tile_size: int | None) -> Bag:
    attrs: dict[str, Any] = dict(tiles.attrs)
    if tile_size is not None:
        attrs.setdefault("patch_size_level0", tile_size)
    bag = Bag(
        slide_id=slide_id,
        features=tiles.features,
        coords=tiles.coords,
        rowcol=np.empty((0, 2), np.int64),
        shape=(0, 0),
        patches=None,
        encoder=encoder,
        attrs=attrs | {"imported_from": tool},
    )
    if tool == "torchmil" and _counts_tiles(tiles.coords):
        if tile_size is None:
            raise BagError(
                f"{slide_id}: its coordinates count tiles, not pixels; name the side of a tile in level-0 "
                "pixels (--tile-size)"
            )
        bag = replace(bag, coords=tiles.coords * tile_size)
    rowcol, shape = grid_positions(Path(f"{slide_id}.h5"), bag.coords, bag.attrs)
    return replace(bag, rowcol=rowcol, shape=shape)


def _counts_tiles(coords: np.ndarray) -> bool:
    """Whether most neighboring rows and columns are one apart; a tile of one pixel has no features."""
    steps = np.concatenate([np.diff(np.unique(axis)) for axis in coords.T])
    return len(steps) > 0 and np.median(steps) == 1


def _write_labels(path: Path, labels: dict[str, str]) -> None:
    import pandas as pd

    rows = [{"slide_id": s, "case_id": s, "label": label} for s, label in sorted(labels.items())]
    if not path.is_file():
        write_table(path, pd.DataFrame(rows))
