"""Public collections of labeled tiles: downloaded from their homes with checksums, unpacked into folders."""

import gzip
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pooch
from tqdm.auto import tqdm

from hdmil_lib.config import cache_dir
from hdmil_lib.errors import CohortError, nearest
from hdmil_lib.storage import write_whole
from hdmil_lib.synthetic.composition import IMAGES

ZENODO = "https://zenodo.org/records/"


@dataclass(frozen=True)
class Source:
    """Where a collection comes from.

    Attributes:
        title: What it holds.
        licence: Its licence.
        gigabytes: Size of the download.
        folder: Address of the files below the base address.
        files: MD5 sums by file name: images and labels as HDF5, gzipped; or a zip of folders of images.
    """

    title: str
    licence: str
    gigabytes: float
    folder: str
    files: dict[str, str]


SOURCES = {
    "pcam": Source(
        "PatchCamelyon, training part: 262,144 tiles of lymph nodes at 0.97 um/px, with and without tumor",
        "CC0",
        6.4,
        "2546921/files/",
        {
            "camelyonpatch_level_2_split_train_x.h5.gz": "1571f514728f59376b705fc836ff4b63",
            "camelyonpatch_level_2_split_train_y.h5.gz": "35c2d7259d906cfc8143347bb8e05be7",
        },
    ),
    "nct-7k": Source(
        "CRC-VAL-HE-7K: 7,180 tiles of colon at 0.5 um/px in nine classes of tissue",
        "CC BY 4.0",
        0.8,
        "1214456/files/",
        {"CRC-VAL-HE-7K.zip": "2fd1651b4f94ebd818ebf90ad2b6ce06"},
    ),
    "nct-100k": Source(
        "NCT-CRC-HE-100K: 100,000 color-normalized tiles of colon at 0.5 um/px in nine classes of tissue",
        "CC BY 4.0",
        11.7,
        "1214456/files/",
        {"NCT-CRC-HE-100K.zip": "6fd702d11df6292bc054397ae038a464"},
    ),
}


def source_of(name: str) -> Source:
    """The source of this name.

    Raises:
        CohortError: There is none.
    """
    if name not in SOURCES:
        hint = nearest(name, SOURCES)
        raise CohortError(f"there is no collection {name!r}{hint}; choose from {', '.join(SOURCES)}")
    return SOURCES[name]


def fetch_tiles(
    name: str, out: str | Path, *, per_class: int = 4000, base_url: str = ZENODO, progress: bool = True
) -> Path:
    """Download a collection and unpack tiles into one folder per class, for `compose_cohort`.

    Downloads stay in the cache and are checked by their MD5 sums. An interrupted download starts again.
    The folder appears when it is complete.

    Args:
        name: Name in `SOURCES`.
        out: The folder; it must not exist.
        per_class: Largest number of tiles per class, drawn at random with a fixed seed.
        base_url: Address below which the collections lie.
        progress: Whether bars are shown.

    Returns:
        The folder.

    Raises:
        CohortError: There is no such collection, the folder exists, or the download failed or is damaged.
    """
    source, out = source_of(name), Path(out)
    if out.exists():
        raise CohortError(f"{out}: exists already; name a new folder for the tiles")
    if per_class < 1:
        raise CohortError(f"per_class is {per_class}, expected 1 or more")
    paths = [_download(base_url + source.folder, file, md5, progress) for file, md5 in source.files.items()]
    temporary = out.with_name(f".{uuid.uuid4().hex[:12]}-{out.name}")
    try:
        unpack = _unpack_zip if paths[0].suffix == ".zip" else _unpack_hdf5
        for label, file, write in tqdm(unpack(paths, per_class), desc=name, disable=not progress):
            folder = temporary / label
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / file)
        os.replace(temporary, out)
    except (OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CohortError(f"{out}: cannot be made from {paths[0]} ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


Unpacked = Iterator[tuple[str, str, Callable[[Path], object]]]
"""Class, file name, and a function that writes the tile to a path."""


def _download(url: str, file: str, md5: str, progress: bool) -> Path:
    try:
        return Path(
            pooch.retrieve(
                f"{url}{file}",
                f"md5:{md5}",
                fname=file,
                path=cache_dir() / "tiles",
                downloader=pooch.HTTPDownloader(progressbar=progress),
            )
        )
    except (OSError, ValueError) as error:
        raise CohortError(f"{file}: cannot be downloaded from {url} ({error}); try again") from error


def _chosen(count: int, per_class: int) -> np.ndarray:
    """Sorted indices of at most `per_class` of `count` tiles."""
    rng = np.random.default_rng(0)
    return np.sort(rng.choice(count, min(count, per_class), replace=False))


def _unpack_zip(paths: list[Path], per_class: int) -> Unpacked:
    with zipfile.ZipFile(paths[0]) as archive:
        members: dict[str, list[str]] = {}
        for name in sorted(archive.namelist()):
            path = PurePosixPath(name)
            if path.suffix.lower() in IMAGES and len(path.parts) >= 2:
                members.setdefault(path.parts[-2], []).append(name)
        for label, names in members.items():
            for index in _chosen(len(names), per_class):
                content = archive.read(names[index])
                yield label, PurePosixPath(names[index]).name, partial(Path.write_bytes, data=content)


def _unpack_hdf5(paths: list[Path], per_class: int) -> Unpacked:
    import h5py
    from PIL import Image

    images, labels = (_decompressed(path) for path in paths)
    with h5py.File(images) as x, h5py.File(labels) as y:
        classes = np.asarray(y["y"]).ravel()
        for label in np.unique(classes):
            rows = np.flatnonzero(classes == label)
            for row in rows[_chosen(len(rows), per_class)]:
                tile = Image.fromarray(x["x"][row])
                yield str(label), f"patch{row:07d}.png", tile.save


def _decompressed(path: Path) -> Path:
    """The file without gzip, beside it; made once."""
    plain = path.with_suffix("")
    if not plain.is_file():

        def write(part: Path) -> None:
            with gzip.open(path) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, 2**22)

        write_whole(plain, write)
    return plain
