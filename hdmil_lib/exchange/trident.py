"""TRIDENT's files: `patches/<slide>_patches.h5` and `features_<encoder>/<slide>.h5` side by side."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from hdmil_lib.errors import BagError, HDMILError
from hdmil_lib.exchange.foreign import (
    ForeignFolder,
    Tiles,
    check_coords,
    feature_matrix,
    files_by_stem,
    geometry,
    only_one,
    read_h5,
    read_pt,
)

PREFIX = "features_"
"""Prefix of the folders of features; the name of the encoder follows."""


def open_folder(folder: Path, patches: Path | None = None) -> ForeignFolder:
    """Find the slides in a folder that TRIDENT wrote.

    Args:
        folder: A job's folder, the folder of one of its magnifications (`20x_256px_0px_overlap`), or that of
            one encoder (`features_uni_v1`).
        patches: Folder of the patch coordinates; by default `patches` beside that of the features.

    Raises:
        HDMILError: There are no features, or those of several encoders.
    """
    own = [folder] if folder.name.startswith(PREFIX) else []
    chosen = only_one(own or _feature_folders(folder), "features", folder)
    if chosen is None:
        raise HDMILError(
            f"{folder}: no folder {PREFIX}* in it; give the job's folder that TRIDENT wrote (--job_dir)"
        )
    features = files_by_stem(chosen, ".pt") | files_by_stem(chosen, ".h5")
    coords = files_by_stem(patches or chosen.parent / "patches", ".h5", "_patches")
    slides = {
        slide_id: partial(_read, slide_id, features.get(slide_id), coords.get(slide_id))
        for slide_id in sorted({*features, *coords})
    }
    return ForeignFolder(chosen, chosen.name.removeprefix(PREFIX), slides)


def _feature_folders(folder: Path) -> Iterator[Path]:
    for depth in (f"{PREFIX}*", f"*/{PREFIX}*"):
        yield from (path for path in sorted(folder.glob(depth)) if path.is_dir())


def _read(slide_id: str, path: Path | None, patches: Path | None) -> Tiles:
    if path is None:
        raise BagError(f"{patches}: has coordinates, but no features; run TRIDENT's task `feat` on it")
    arrays, attrs = read_h5(path) if path.suffix == ".h5" else ({"features": read_pt(path)}, {})
    if "features" not in arrays:
        raise BagError(f"{path}: holds no features; run TRIDENT's task `feat` on this slide again")
    features = feature_matrix(path, arrays["features"])
    if patches is not None:
        of_patches, more = read_h5(patches)
        attrs = more | attrs
        arrays.setdefault("coords", of_patches.get("coords", np.empty(0)))
    if "coords" not in arrays:
        raise BagError(f"{path}: has features, but no coordinates; name the folder of them (--patches)")
    coords = check_coords(path, arrays["coords"], len(features))
    return Tiles(features, coords, geometry(attrs, slide_id, path))
