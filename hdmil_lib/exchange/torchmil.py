"""torchmil's folders: `features`, `coords`, `labels` and `patch_labels`, with one .npy file per slide."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from hdmil_lib.bags import Bag
from hdmil_lib.errors import BagError, HDMILError
from hdmil_lib.exchange.foreign import (
    ForeignFolder,
    Tiles,
    check_coords,
    feature_matrix,
    files_by_stem,
    only_one,
    read_npy,
)
from hdmil_lib.storage import write_whole

PREFIX = "features_"
LEVEL0 = "coords_level0"
"""Folder of level-0 coordinates that `write_slide` adds; torchmil's `coords` may count tiles."""


def open_folder(folder: Path, patches: Path | None = None) -> ForeignFolder:
    """Find the slides in folders as `torchmil.datasets.ProcessedMILDataset` reads them.

    Args:
        folder: Folder with `features` and `coords`, or one whose folder `patches_<size>` holds them, or the
            folder of the features of one encoder (`features/features_<encoder>`).
        patches: Folder of the coordinates; by default `coords` beside that of the features.

    Raises:
        HDMILError: There are no features, or those of several encoders.
    """
    own = [folder] if files_by_stem(folder, ".npy") else []
    chosen = only_one(own or _feature_folders(folder), "features", folder)
    if chosen is None:
        raise HDMILError(f"{folder}: no features/*.npy in it; give the folder that holds torchmil's folders")
    root = chosen.parent.parent if chosen.parent.name == "features" else chosen.parent
    coords = patches or next((root / name for name in (LEVEL0, "coords") if (root / name).is_dir()), None)
    if coords is None:
        raise HDMILError(f"{root}: no folder coords; name the folder of the coordinates (--patches)")
    features = files_by_stem(chosen, ".npy")
    slides = {slide_id: partial(_read, slide_id, path, root, coords) for slide_id, path in features.items()}
    named = chosen.name.removeprefix(PREFIX) if chosen.name.startswith(PREFIX) else None
    return ForeignFolder(chosen, named, slides)


def write_slide(
    bag: Bag, out: Path, *, label: int | None = None, tile_labels: np.ndarray | None = None
) -> None:
    """Write a bag for `torchmil.datasets.ProcessedMILDataset`.

    `coords` holds the (column, row) of the tiles on their grid, so that torchmil's default distance of 1.5
    finds the neighbors; `coords_level0` holds their pixels.

    Args:
        bag: The bag.
        out: Folder of the folders.
        label: Class index of the slide.
        tile_labels: Share of tumor in each tile, (N,); tiles with half or more get the label 1.
    """
    arrays = {
        "coords": bag.rowcol[:, ::-1],
        LEVEL0: bag.coords,
        "labels": None if label is None else np.array([label]),
        "patch_labels": None if tile_labels is None else (tile_labels >= 0.5).astype(np.int64),
        "features": np.asarray(bag.features, np.float32),
    }
    for folder, values in arrays.items():
        if values is not None:
            write_whole(out / folder / f"{bag.slide_id}.npy", partial(_save, values))


def is_written(slide_id: str, out: Path) -> bool:
    """Whether a slide is in a folder that `write_slide` writes; the features are written last."""
    return (out / "features" / f"{slide_id}.npy").is_file()


def _save(values: np.ndarray, path: Path) -> None:
    np.save(path, np.ascontiguousarray(values))


def _feature_folders(folder: Path) -> Iterator[Path]:
    for place in ("features", "features/*", "patches_*/features", "patches_*/features/*"):
        yield from (path for path in sorted(folder.glob(place)) if files_by_stem(path, ".npy"))


def _read(slide_id: str, path: Path, root: Path, coords_folder: Path) -> Tiles:
    features = feature_matrix(path, read_npy(path))
    coords_path = coords_folder / path.name
    if not coords_path.is_file():
        raise BagError(f"{path}: has features, but no coordinates in {coords_folder}")
    coords = check_coords(coords_path, read_npy(coords_path), len(features))
    tile_labels = None
    for folder in ("patch_labels", "inst_labels"):
        if (given := root / folder / path.name).is_file():
            tile_labels = _tile_labels(given, len(features))
    label_path, label = root / "labels" / path.name, None
    if label_path.is_file():
        values = np.ravel(read_npy(label_path))
        if len(values) != 1:
            raise BagError(f"{label_path}: holds {len(values)} labels, expected one")
        label = f"{values[0]:g}" if values.dtype.kind == "f" else str(values[0])
    return Tiles(features, coords, {}, None, tile_labels, label)


def _tile_labels(path: Path, n_tiles: int) -> np.ndarray | None:
    """Labels of the tiles, (N,), or None where torchmil marks them as unknown by a negative number."""
    values = np.ravel(read_npy(path))
    if values.shape != (n_tiles,) or values.dtype.kind not in "fiub":
        raise BagError(f"{path}: holds {values.size} labels of type {values.dtype} for {n_tiles} tiles")
    return None if (values < 0).any() else values.astype(np.float32)
