"""CLAM's files: `h5_files/<slide>.h5` and `pt_files/<slide>.pt` of features, `patches/<slide>.h5`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hdmil_lib.bag_files import TRIDENT_ATTRS
from hdmil_lib.bags import Bag
from hdmil_lib.errors import BagError, HDMILError
from hdmil_lib.exchange.foreign import (
    SCALE,
    ForeignFolder,
    Tiles,
    check_coords,
    feature_matrix,
    files_by_stem,
    geometry,
    identity,
    only_one,
    read_h5,
    read_pt,
)
from hdmil_lib.storage import write_whole


def open_folder(folder: Path, patches: Path | None = None) -> ForeignFolder:
    """Find the slides in folders that CLAM's `create_patches_fp.py` and `extract_features_fp.py` wrote.

    Args:
        folder: Folder with `h5_files` or `pt_files`, in it or in one folder of it.
        patches: Folder of the patch coordinates; by default the folder `patches` found in the same way.

    Raises:
        HDMILError: There are no features, or several folders of them.
    """
    h5_folder = only_one(_named(folder, "h5_files"), "features", folder)
    pt_folder = only_one(_named(folder, "pt_files"), "features", folder)
    if patches is None:
        patches = only_one(_named(folder, "patches"), "patches", folder)
    h5 = files_by_stem(h5_folder, ".h5") if h5_folder else {}
    pt = files_by_stem(pt_folder, ".pt") if pt_folder else {}
    coords = files_by_stem(patches, ".h5") if patches else {}
    if not h5 and not pt:
        raise HDMILError(
            f"{folder}: no h5_files/*.h5 or pt_files/*.pt in it; give the folder that CLAM's feature "
            "extraction wrote (--feat_dir)"
        )
    slides = {
        slide_id: partial(_read, slide_id, h5.get(slide_id), pt.get(slide_id), coords.get(slide_id))
        for slide_id in sorted({*h5, *pt, *coords})
    }
    return ForeignFolder(h5_folder or pt_folder or folder, None, slides)


def write_slide(bag: Bag, out: Path) -> None:
    """Write a bag as CLAM stores features: `h5_files/<slide>.h5` and `pt_files/<slide>.pt`, in float32.

    The attributes of `coords` are TRIDENT's, those of the file name the encoder and the exact scale; CLAM
    ignores them.
    """
    import torch

    features = np.asarray(bag.features, np.float32)

    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file["features"], file["coords"] = features, bag.coords.astype(np.int64)
            file["coords"].attrs.update({k: v for k, v in bag.attrs.items() if k in TRIDENT_ATTRS})
            file["coords"].attrs["name"] = bag.slide_id
            file.attrs.update({key: bag.attrs[key] for key in SCALE if key in bag.attrs})
            file.attrs["encoder"], file.attrs["weights_hash"] = bag.encoder.name, bag.encoder.weights_hash

    write_whole(out / "h5_files" / f"{bag.slide_id}.h5", write)
    write_whole(
        out / "pt_files" / f"{bag.slide_id}.pt", lambda path: torch.save(torch.tensor(features), path)
    )


def is_written(slide_id: str, out: Path) -> bool:
    """Whether a slide is in a folder that `write_slide` writes."""
    return all((out / f"{kind}_files" / f"{slide_id}.{kind}").is_file() for kind in ("h5", "pt"))


def _named(folder: Path, name: str) -> Iterator[Path]:
    """The folders of this name in a folder, or else in the folders in it."""
    if (folder / name).is_dir():
        yield folder / name
    elif folder.is_dir():
        yield from (path / name for path in sorted(folder.iterdir()) if (path / name).is_dir())


def _read(slide_id: str, h5: Path | None, pt: Path | None, patches: Path | None) -> Tiles:
    attrs: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    if h5 is not None:
        arrays, attrs = read_h5(h5)
    features = arrays.get("features")
    if features is None and pt is not None:
        features = read_pt(pt)
    source = h5 or pt or patches
    assert source is not None
    if features is None:
        raise BagError(f"{source}: has coordinates, but no features; run CLAM's feature extraction on it")
    features = feature_matrix(source, features)
    tool_attrs = attrs
    if patches is not None:
        of_patches, tool_attrs = read_h5(patches)
        arrays.setdefault("coords", of_patches.get("coords", np.empty(0)))
        tool_attrs = attrs | tool_attrs
        if "coords" in of_patches:
            check_coords(patches, of_patches["coords"], len(features))
    if "coords" not in arrays:
        raise BagError(
            f"{source}: has features, but no coordinates; name the folder of CLAM's patches (--patches)"
        )
    coords = check_coords(source, arrays["coords"], len(features))
    return Tiles(features, coords, geometry(tool_attrs, slide_id, patches or source), identity(attrs))
