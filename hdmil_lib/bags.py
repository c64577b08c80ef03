"""Bags: features, positions and patches of the tiles of a slide, in one HDF5 file per slide."""

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hdmil_lib.bag_files import (
    ATTRS_DIGEST,
    DIGEST,
    FOREIGN,
    FORMAT,
    LOOK,
    MAX_CELLS,
    PATCH_SIZE,
    REMEDY,
    TRIDENT_ATTRS,
    attributes,
    attributes_digest,
    check_layout,
    check_shapes,
    checked_attributes,
    digest_of,
    look_names,
    open_bag,
    read_data,
    write_attribute,
)
from hdmil_lib.errors import BagError
from hdmil_lib.storage import write_whole
from hdmil_lib.version import __version__

SCHEMA_VERSION = 3
"""2: with grid positions; 3: with digests of every data set and of the attributes."""
CHECKED = 1024
"""Number of tiles whose features are checked at a time, so that the check takes little memory."""


@dataclass(frozen=True)
class EncoderIdentity:
    """Name of an encoder and hash of its weights."""

    name: str
    weights_hash: str

    def __str__(self) -> str:
        return f"{self.name} (weights {self.weights_hash})"


UNKNOWN = EncoderIdentity("unknown", "unknown")


@dataclass(frozen=True, eq=False)
class Bag:
    """The tiles of a slide for multiple-instance learning; row i is the same tile in every array.

    Attributes:
        slide_id: Name of the slide.
        features: (N, D), float16 as stored.
        coords: Level-0 (x, y) of the tiles' top-left corners, int64 (N, 2).
        rowcol: Position of the tiles on the slide's grid, int64 (N, 2).
        shape: (rows, cols) of the whole grid, with and without tissue.
        patches: The tiles at low resolution, uint8 (N, 16, 16, 3); `None` in bags of other tools.
        encoder: Encoder of the features.
        attrs: Further provenance and geometry, such as mpp_x, patch_size_level0 and min_tissue.
        looks: Features of coarser looks at the tiles by their side in pixels, (N, D) each, float16 as stored.
    """

    slide_id: str
    features: np.ndarray
    coords: np.ndarray
    rowcol: np.ndarray
    shape: tuple[int, int]
    patches: np.ndarray | None
    encoder: EncoderIdentity = UNKNOWN
    attrs: Mapping[str, Any] = field(default_factory=dict)
    looks: Mapping[int, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def known_patches(self) -> np.ndarray:
        """The patches.

        Raises:
            BagError: The bag has no patches.
        """
        if self.patches is None:
            raise BagError(
                f"bag {self.slide_id} has no patches for LIPN; use all tiles, or fill them in from the "
                "slides with `hdmil add-patches`"
            )
        return self.patches

    @property
    def tile_um(self) -> float:
        """Side of a tile in um; 128 for a bag that does not say."""
        if {"patch_size", "tile_mpp"} <= set(self.attrs):
            return float(self.attrs["patch_size"] * self.attrs["tile_mpp"])
        return 128.0

    @property
    def thumbnail(self) -> np.ndarray:
        """The slide at 8 um/px composed of its patches, white where there is none, uint8 (H, W, 3)."""
        rows, cols = self.shape
        blocks = np.full((rows, cols, PATCH_SIZE, PATCH_SIZE, 3), 255, np.uint8)
        if self.patches is not None:
            blocks[self.rowcol[:, 0], self.rowcol[:, 1]] = self.patches
        return blocks.swapaxes(1, 2).reshape(rows * PATCH_SIZE, cols * PATCH_SIZE, 3)


def write_bag(
    path: str | Path, bag: Bag, tile_labels: np.ndarray | None = None, *, compress: bool = False
) -> None:
    """Write a bag that CLAM and TRIDENT can read; the file is written whole or not at all.

    Args:
        path: The .h5 file; its folder is created.
        bag: The bag; features are stored as float16.
        tile_labels: Share of tumor in each tile, (N,); for teaching and evaluation only.
        compress: Whether patches are compressed with gzip, which is smaller but slower to read.

    Raises:
        BagError: The arrays do not fit together, or features are not finite in float16.
    """
    path = Path(path)
    with np.errstate(over="ignore"):  # an overflow becomes inf and is reported below
        features = np.asarray(bag.features).astype(np.float16)
    arrays: dict[str, np.ndarray] = {
        "features": features,
        "coords": bag.coords.astype(np.int64),
        "rowcol": bag.rowcol.astype(np.int64),
    }
    if bag.patches is not None:
        arrays["patches"] = bag.patches
    for side, values in bag.looks.items():
        arrays[f"{LOOK}{side}"] = np.asarray(values).astype(np.float16)
    if tile_labels is not None:
        arrays["tile_labels"] = np.asarray(tile_labels, np.float32)
    _check(path, arrays, bag.shape)

    def write(part: Path) -> None:
        content = io.BytesIO()  # HDF5 does not survive a full disk
        with h5py.File(content, "w", libver=FORMAT) as file:
            for name, values in arrays.items():
                gzip = dict(compression="gzip", compression_opts=9) if compress and name == "patches" else {}
                data = file.create_dataset(name, data=values, **gzip)
                write_attribute(data, DIGEST, digest_of(values))
            attrs = {**bag.attrs, "name": bag.slide_id, "slide_id": bag.slide_id, "shape": list(bag.shape)}
            attrs |= {"encoder": bag.encoder.name, "weights_hash": bag.encoder.weights_hash}
            attrs |= {"library_version": __version__, "schema_version": SCHEMA_VERSION}
            for key, value in attrs.items():
                write_attribute(file["coords"] if key in TRIDENT_ATTRS else file, key, value)
            write_attribute(file, ATTRS_DIGEST, attributes_digest(file))
        part.write_bytes(content.getbuffer())

    write_whole(path, write)


def read_bag(path: str | Path) -> Bag:
    """Read a bag without its tile labels; its content must agree with the digests that it was written with.

    Bags of other tools and of hdmil before 0.3 have no digests and are read without this check.

    If grid positions are missing (bags of CLAM, TRIDENT or hdmil 0.1), they are derived from the coordinates.

    Raises:
        BagError: The file is missing, damaged or inconsistent, is not a bag, cannot be read, or needs more
            memory than is free.
    """
    path = Path(path)
    with open_bag(path) as file:
        looks = look_names(path, file)
        present = [name for name in ("rowcol", "patches") if name in file]
        names = ["features", "coords", *present, *looks]
        check_layout(path, file, names)
        arrays = read_data(path, file, names)
        attrs = checked_attributes(path, file)
    shape = attrs.pop("shape", None)
    if "rowcol" not in arrays or shape is None:
        arrays["rowcol"], shape = grid_positions(path, arrays["coords"], attrs)
    try:
        shape = (int(shape[0]), int(shape[1]))
    except (TypeError, ValueError, IndexError) as error:
        raise BagError(f"{path}: the shape of its grid is {shape!r}. {REMEDY}") from error
    _check(path, arrays, shape)
    return Bag(
        slide_id=str(attrs.get("slide_id", path.stem)),
        features=arrays["features"],
        coords=arrays["coords"],
        rowcol=arrays["rowcol"],
        shape=shape,
        patches=arrays.get("patches"),
        encoder=_encoder(attrs),
        attrs=attrs,
        looks={int(n.removeprefix(LOOK)): values for n, values in arrays.items() if n.startswith(LOOK)},
    )


def read_tile_labels(path: str | Path) -> np.ndarray | None:
    """Share of tumor in each tile, float32 (N,), or None if it is unknown.

    For teaching and evaluation only; training code must not call this.

    Raises:
        BagError: The file is missing or damaged.
    """
    path = Path(path)
    with open_bag(path) as file:
        if "tile_labels" not in file:
            return None
        check_layout(path, file, ["features", "tile_labels"])
        return read_data(path, file, ["tile_labels"])["tile_labels"]


def bag_info(path: str | Path) -> dict[str, Any]:
    """Attributes of a bag, `n_tiles`, `dim` and the sides of its `looks`, without reading its arrays.

    Raises:
        BagError: The file is missing, damaged or not a bag.
    """
    path = Path(path)
    with open_bag(path) as file:
        found = file.get("features")
        shape: tuple[int, ...] = found.shape if isinstance(found, h5py.Dataset) else ()
        if len(shape) != 2:
            raise BagError(f"{path}: holds no features (N, D). {FOREIGN}")
        looks = [int(name.removeprefix(LOOK)) for name in look_names(path, file)]
        return checked_attributes(path, file) | {"n_tiles": shape[0], "dim": shape[1], "looks": looks}


def read_arrays(path: str | Path, names: Iterable[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read arrays of an HDF5 file of any tool, as safely as those of a bag.

    Args:
        path: The file.
        names: Names of the data sets; those that the file lacks are left out.

    Returns:
        The arrays by name, and the attributes of the data set `coords` and of the file.

    Raises:
        BagError: The file is missing or damaged, a data set is no array of numbers in the file itself, or
            they need more memory than is free.
    """
    path = Path(path)
    with open_bag(path) as file:
        return read_data(path, file, [name for name in names if name in file]), attributes(file)


def check_same_features(bags: Iterable[Bag]) -> EncoderIdentity:
    """Check that all bags have the same encoder, encoder weights and width of features.

    Returns:
        The encoder of all bags.

    Raises:
        BagError: There is no bag, or some bags differ from the majority; the first of them is named.
    """
    kinds = {bag.slide_id: (bag.encoder, bag.features.shape[1]) for bag in bags}
    if not kinds:
        raise BagError("there are no bags; extract features first (`hdmil extract`)")
    usual = Counter(kinds.values()).most_common(1)[0][0]
    odd = [slide_id for slide_id, kind in kinds.items() if kind != usual]
    if odd:
        ours, theirs = ("encoder {}, width {}".format(*kind) for kind in (kinds[odd[0]], usual))
        raise BagError(
            f"Bag {odd[0]!r} holds features of {ours}, {len(kinds) - len(odd)} of {len(kinds)} bags those of "
            f"{theirs}. Extract all slides with one encoder."
        )
    return usual[0]


def _encoder(attrs: Mapping[str, Any]) -> EncoderIdentity:
    name, digest = (str(attrs.get(key, "unknown")) for key in ("encoder", "weights_hash"))
    return EncoderIdentity(name, digest)


def grid_positions(
    path: Path, coords: np.ndarray, attrs: Mapping[str, Any]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Derive the positions of tiles on their grid from their coordinates.

    Positions are relative to the first row and column with a tile. The pitch is the exact tile size if the
    bag has its scale, else TRIDENT's rounded tile size, else the most frequent step between neighbors.

    Args:
        path: File of the coordinates, for messages.
        coords: Level-0 (x, y) of the tiles' top-left corners, (N, 2).
        attrs: Attributes of the bag.

    Returns:
        (row, col) of the tiles, int64 (N, 2), and the (rows, cols) of the grid.

    Raises:
        BagError: The coordinates have another shape, or there are none.
    """
    if coords.ndim != 2 or coords.shape[1] != 2 or len(coords) == 0:
        raise BagError(f"{path}: coords have shape {coords.shape}, expected (N, 2). {REMEDY}")
    offset = coords - coords.min(axis=0)
    if {"mpp_x", "mpp_y", "patch_size", "tile_mpp"} <= set(attrs):
        pitch = attrs["patch_size"] * attrs["tile_mpp"] / np.array([attrs["mpp_x"], attrs["mpp_y"]])
    elif attrs.get("patch_size_level0") and not attrs.get("overlap"):
        pitch = np.full(2, float(attrs["patch_size_level0"]))
    else:
        pitch = np.full(2, float(_usual_step(coords)))
    rowcol = np.rint(offset / pitch).astype(np.int64)[:, ::-1]
    rows, cols = (rowcol.max(axis=0) + 1).tolist()
    return np.ascontiguousarray(rowcol), (rows, cols)


def _usual_step(coords: np.ndarray) -> int:
    """The most frequent distance from a tile to the next one in its row or column.

    CLAM starts a separate grid in every piece of tissue, so the smallest distance between two columns may be
    a single pixel.
    """
    steps = []
    for along, across in ((0, 1), (1, 0)):
        ordered = coords[np.lexsort((coords[:, along], coords[:, across]))]
        same_line = np.diff(ordered[:, across]) == 0
        steps.append(np.diff(ordered[:, along])[same_line])
    found = np.concatenate(steps)
    if not (found > 0).any():
        found = np.concatenate([np.diff(np.unique(axis)) for axis in coords.T])
    sizes, counts = np.unique(found[found > 0], return_counts=True)
    return int(sizes[counts.argmax()]) if len(sizes) else 1


def _check(path: Path, arrays: Mapping[str, np.ndarray], shape: tuple[int, int]) -> None:
    check_shapes(path, {name: values.shape for name, values in arrays.items()})
    features, rowcol, patches = arrays["features"], arrays["rowcol"], arrays.get("patches")
    if patches is not None and patches.dtype != np.uint8:
        raise BagError(f"{path}: patches are {patches.dtype}, not uint8. {REMEDY}")
    if shape[0] * shape[1] > MAX_CELLS:
        raise BagError(f"{path}: no slide has a grid of {shape[0]} x {shape[1]} tiles. {REMEDY}")
    if rowcol.min() < 0 or (rowcol >= shape).any():
        raise BagError(f"{path}: rowcol reaches beyond the grid of {shape[0]} x {shape[1]} tiles. {REMEDY}")
    blocks = (features[start : start + CHECKED] for start in range(0, len(features), CHECKED))
    bad = np.flatnonzero(~np.concatenate([np.isfinite(block).all(axis=1) for block in blocks]))
    if len(bad):
        raise BagError(
            f"{path}: features of {len(bad)} of {len(features)} tiles are NaN or infinite, first in row "
            f"{bad[0]}. Check the encoder (float16 holds at most 65504), then extract the slide again."
        )
