"""What other tools store of a slide's tiles, and how their files are read safely."""

import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hdmil_lib.bag_files import TRIDENT_ATTRS
from hdmil_lib.bags import EncoderIdentity, read_arrays
from hdmil_lib.errors import BagError, HDMILError
from hdmil_lib.storage import loading_problem
from hdmil_lib.system_errors import check_readable, read_error

SCALE = ("mpp_x", "mpp_y", "tile_mpp")
"""Attributes of the exact scale, which `hdmil export` adds to TRIDENT's."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of a slide as another tool stored them; row i is the same tile in every array.

    Attributes:
        features: (N, D), any type of float.
        coords: Level-0 (x, y) of the tiles' top-left corners, (N, 2).
        attrs: Geometry under TRIDENT's names, as far as it is known.
        encoder: Encoder of the features, if the file says so.
        tile_labels: Label of each tile, (N,), if there is one.
        label: Label of the slide, if there is one.
    """

    features: np.ndarray
    coords: np.ndarray
    attrs: Mapping[str, Any] = field(default_factory=dict)
    encoder: EncoderIdentity | None = None
    tile_labels: np.ndarray | None = None
    label: str | None = None


@dataclass(frozen=True)
class ForeignFolder:
    """A folder of another tool.

    Attributes:
        path: Folder of the features.
        encoder: Name of the encoder, where the folder says so.
        slides: Functions that read the tiles of a slide, by slide_id.
    """

    path: Path
    encoder: str | None
    slides: Mapping[str, Callable[[], Tiles]]


def files_by_stem(folder: Path, suffix: str, ending: str = "") -> dict[str, Path]:
    """Files of a folder by the name of their slide, without hidden ones; none if there is no folder."""
    if not folder.is_dir():
        return {}
    found = (path for path in sorted(folder.iterdir()) if path.name.endswith(f"{ending}{suffix}"))
    return {path.name.removesuffix(f"{ending}{suffix}"): path for path in found if path.name[0] != "."}


def only_one(candidates: Iterable[Path], what: str, folder: Path) -> Path | None:
    """The single candidate, or None if there is none.

    Raises:
        HDMILError: There are several.
    """
    found = list(dict.fromkeys(candidates))
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise HDMILError(f"{folder}: holds several folders of {what} ({names}); give one of them")
    return found[0] if found else None


def feature_matrix(path: Path, values: np.ndarray) -> np.ndarray:
    """Features as (N, D); other tools also write (1, N, D).

    Raises:
        BagError: They have another shape, or are no floating-point numbers.
    """
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2 or 0 in values.shape:
        hint = "; one vector per slide is no bag, give the features of its patches" * (values.ndim == 1)
        raise BagError(f"{path}: features have shape {values.shape}, expected (N, D){hint}")
    if values.dtype.kind != "f":
        raise BagError(f"{path}: features are {values.dtype}, expected floating-point numbers")
    return values


def check_coords(path: Path, coords: np.ndarray, n_tiles: int) -> np.ndarray:
    """Coordinates as int64 (N, 2); other tools also write (1, N, 2).

    Raises:
        BagError: There is another number of them, or they are no finite numbers.
    """
    if coords.ndim == 3 and coords.shape[0] == 1:
        coords = coords[0]
    if coords.shape != (n_tiles, 2):
        raise BagError(
            f"{path}: {n_tiles} tiles have features, but the coordinates have shape {coords.shape}; they are "
            "of different runs, extract the features again"
        )
    if not np.isfinite(coords).all() or np.abs(coords).max() > 2**40:
        raise BagError(f"{path}: coordinates are no level-0 pixels of a slide")
    return np.rint(coords).astype(np.int64)


def read_pt(path: Path) -> np.ndarray:
    """Read a tensor that `torch.save` wrote; nothing in the file is executed.

    Raises:
        BagError: The file is missing, damaged, holds something else than a tensor, or declares more numbers
            than it has.
    """
    import torch

    try:
        check_readable(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                declared = sum(member.file_size for member in archive.infolist())
            if declared > 2 * path.stat().st_size + 2**20:
                raise BagError(f"{path}: declares {declared:,} bytes that the file does not have")
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except BagError:
        raise
    except Exception as error:  # a damaged file can end in many kinds of errors
        damage = f"cannot be read as a tensor ({loading_problem(error)}); write it again"
        raise read_error(BagError, path, error, damage) from error
    if not isinstance(tensor, torch.Tensor) or tensor.is_sparse:
        raise BagError(f"{path}: holds a {type(tensor).__name__}, expected one tensor of features")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise BagError(f"{path}: declares {tensor.numel():,} numbers that the file does not have")
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return wide.detach().numpy()


def read_npy(path: Path) -> np.ndarray:
    """Read a NumPy file without pickled objects; its declared size is checked against that of the file.

    Raises:
        BagError: The file is missing or damaged.
    """
    try:
        check_readable(path)
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # a damaged header can end in many kinds of errors
        damage = f"cannot be read as a NumPy array ({error}); write it again"
        raise read_error(BagError, path, error, damage) from error


def read_h5(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Features and coordinates of an HDF5 file of CLAM or TRIDENT, as far as it has them, and attributes.

    Raises:
        BagError: The file is missing or damaged.
    """
    return read_arrays(path, ("features", "coords"))


def geometry(attrs: Mapping[str, Any], slide_id: str, path: Path) -> dict[str, Any]:
    """Geometry of tiles under TRIDENT's names, from the attributes of CLAM or TRIDENT.

    CLAM stores the side of a patch in pixels of its level, and the level's downsample.

    Raises:
        BagError: The file says that it is of another slide.
    """
    name = attrs.get("name")
    if isinstance(name, str) and name not in (slide_id, f"{slide_id}.h5"):
        raise BagError(f"{path}: says that it is of slide {name!r}; was it renamed?")
    known = {key: attrs[key] for key in (*TRIDENT_ATTRS, *SCALE) if _is_size(attrs.get(key))}
    level, downsample = attrs.get("patch_level"), np.ravel(attrs.get("downsample", 1.0))[:1]
    if "patch_size_level0" not in known and "patch_size" in known and (level == 0 or "downsample" in attrs):
        factor = float(downsample[0]) * float(attrs.get("custom_downsample", 1))
        known["patch_size_level0"] = round(known["patch_size"] * factor)
    level_dim = np.ravel(attrs.get("level_dim", ()))
    if level == 0 and len(level_dim) == 2:
        known["level0_width"], known["level0_height"] = map(int, level_dim)
    return known


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 2**40


def identity(attrs: Mapping[str, Any]) -> EncoderIdentity | None:
    """The encoder that `hdmil export` wrote into the attributes of a file."""
    name, digest = attrs.get("encoder"), attrs.get("weights_hash")
    return EncoderIdentity(name, digest) if isinstance(name, str) and isinstance(digest, str) else None
