"""One HDF5 file a slide: features, coordinates and patches, whole or absent."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hdmil_lib import __version__
from hdmil_lib.errors import BagError

SCHEMA_VERSION = 1
TRIDENT_ATTRS = (
    "patch_size",
    "patch_size_level0",
    "level0_magnification",
    "target_magnification",
    "overlap",
    "name",
    "level0_width",
    "level0_height",
)
"""Attributes that TRIDENT keeps on the data set `coords`; all others are attributes of the file."""


@dataclass(frozen=True, eq=False)
class Bag:
    """A slide as multiple-instance learning sees it; row i is the same tile in every array.

    Attributes:
        slide_id: Name of the slide.
        features: (N, D), float16 as stored.
        coords: Level-0 (x, y) of the tiles' top-left corners, int64 (N, 2).
        patches: The tiles at low resolution, uint8 (N, 16, 16, 3).
        attrs: Provenance and geometry: encoder, weights_hash, patch_size_level0 and the like.
    """

    slide_id: str
    features: np.ndarray
    coords: np.ndarray
    patches: np.ndarray
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)


def write_bag(
    path: str | Path, bag: Bag, tile_labels: np.ndarray | None = None, *, compress: bool = False
) -> None:
    """Write a bag, readable by CLAM's and TRIDENT's users; a crash leaves the old file or none.

    Args:
        path: The .h5 file; its folder is made.
        bag: What to write; features are stored as float16.
        tile_labels: Share of tumour in each tile, (N,); for teaching and evaluation only.
        compress: Store the patches with gzip: smaller to ship, slower to read.

    Raises:
        BagError: The arrays do not fit together, or features are not finite in float16.
    """
    path = Path(path)
    with np.errstate(over="ignore"):  # an overflow becomes inf and is reported below
        features = np.asarray(bag.features).astype(np.float16)
    arrays = {"features": features, "coords": bag.coords.astype(np.int64), "patches": bag.patches}
    if tile_labels is not None:
        arrays["tile_labels"] = np.asarray(tile_labels, np.float32)
    _check(path, arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with h5py.File(partial, "w") as file:
            for name, values in arrays.items():
                gzip = dict(compression="gzip", compression_opts=9) if compress and name == "patches" else {}
                file.create_dataset(name, data=values, **gzip)
            attrs = {**bag.attrs, "name": bag.slide_id, "slide_id": bag.slide_id}
            attrs |= {"library_version": __version__, "schema_version": SCHEMA_VERSION}
            for key, value in attrs.items():
                (file["coords"] if key in TRIDENT_ATTRS else file).attrs[key] = value
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_bag(path: str | Path) -> Bag:
    """Read a bag; never its tile labels.

    Raises:
        BagError: The file is missing, damaged, inconsistent, or no bag of this library.
    """
    path = Path(path)
    with _open(path) as file:
        arrays = _read(path, file, ("features", "coords", "patches"))
        attrs = _attrs(file)
    _check(path, arrays)
    return Bag(str(attrs.get("slide_id", path.stem)), **arrays, attrs=attrs)


def read_tile_labels(path: str | Path) -> np.ndarray | None:
    """Share of tumour in each tile, float32 (N,), or None where the truth is unknown.

    For teaching and evaluation: nothing that trains may call this.

    Raises:
        BagError: The file is missing or damaged.
    """
    path = Path(path)
    with _open(path) as file:
        return _read(path, file, ("tile_labels",))["tile_labels"] if "tile_labels" in file else None


def bag_info(path: str | Path) -> dict[str, Any]:
    """A bag's attributes with `n_tiles` and `dim`, without reading its arrays.

    Raises:
        BagError: The file is missing, damaged, or no bag.
    """
    path = Path(path)
    with _open(path) as file:
        if "features" not in file or file["features"].ndim != 2:
            raise BagError(f"{path}: holds no features (N, D). {_REMEDY}")
        n_tiles, dim = file["features"].shape
        return _attrs(file) | {"n_tiles": n_tiles, "dim": dim}


def check_same_features(bags: Iterable[Bag]) -> None:
    """Hold that bags can be learnt from together: one encoder, one set of weights, one dimension.

    Raises:
        BagError: Some bags differ from most; the first of them is named.
    """
    kinds = {
        bag.slide_id: (bag.attrs.get("encoder"), bag.attrs.get("weights_hash"), bag.features.shape[1])
        for bag in bags
    }
    usual = Counter(kinds.values()).most_common(1)
    odd = [slide_id for slide_id, kind in kinds.items() if kind != usual[0][0]]
    if odd:
        raise BagError(
            f"Bag {odd[0]!r} holds features of {_describe(kinds[odd[0]])}, {len(kinds) - len(odd)} of "
            f"{len(kinds)} bags those of {_describe(usual[0][0])}. Extract all slides with one encoder."
        )


_REMEDY = "Delete the file and extract the slide again."


def _describe(kind: tuple) -> str:
    encoder, weights_hash, dim = kind
    return f"encoder {encoder} ({weights_hash}), {dim}-d"


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise BagError(f"{path}: no such bag. Extract its slide first (`hdmil extract`).")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise BagError(f"{path}: damaged or not HDF5 ({error}). {_REMEDY}") from error


def _read(path: Path, file: h5py.File, names: Iterable[str]) -> dict[str, np.ndarray]:
    missing = [name for name in names if name not in file]
    if missing:
        raise BagError(f"{path}: lacks {', '.join(missing)}; made by another tool? {_REMEDY}")
    try:
        return {name: file[name][()] for name in names}
    except (OSError, RuntimeError) as error:
        raise BagError(f"{path}: damaged ({error}). {_REMEDY}") from error


def _attrs(file: h5py.File) -> dict[str, Any]:
    coords = file["coords"].attrs if "coords" in file else {}
    return {key: _plain(value) for key, value in (*coords.items(), *file.attrs.items())}


def _plain(value: Any) -> Any:
    """Python's own type for what h5py returns as a numpy scalar."""
    return value.item() if isinstance(value, np.generic) else value


def _check(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    features, coords, patches = (arrays[name] for name in ("features", "coords", "patches"))
    n = len(features)
    shapes = ", ".join(f"{name} {values.shape}" for name, values in arrays.items())
    fits = features.ndim == 2 and coords.shape == (n, 2) and patches.ndim == 4 and patches.shape[3] == 3
    if n == 0 or not fits or any(len(values) != n for values in arrays.values()):
        raise BagError(f"{path}: arrays do not describe the same tiles: {shapes}. {_REMEDY}")
    if patches.dtype != np.uint8:
        raise BagError(f"{path}: patches are {patches.dtype}, not uint8. {_REMEDY}")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise BagError(
            f"{path}: features of {len(bad)} of {n} tiles are NaN or infinite, first in row {bad[0]}. Check "
            "the encoder (float16 holds at most 65504), then extract the slide again."
        )
