"""Slides composed of labeled tiles that the caller provides: real texture with known content."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path

import cv2
import numpy as np

from hdmil_lib.errors import SlideError
from hdmil_lib.synthetic.pyramid import write_pyramid
from hdmil_lib.synthetic.truth import TRUTH_MPP, truth_path, write_mask

IMAGES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
"""Suffixes of the files in a folder that are tiles."""


def _read_tile(source: str | Path | np.ndarray, name: str) -> np.ndarray:
    """Read one labeled tile as uint8 RGB (S, S, 3)."""
    if isinstance(source, np.ndarray):
        tile = source
    else:
        bgr = cv2.imread(str(source), cv2.IMREAD_COLOR)
        if bgr is None:
            raise SlideError(f"{source}: not a readable image, but named as a tile of class {name!r}")
        tile = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    if tile.dtype != np.uint8 or tile.ndim != 3 or tile.shape[2] != 3 or tile.shape[0] != tile.shape[1]:
        raise SlideError(f"a tile of class {name!r} is {tile.dtype} {tile.shape}; give square uint8 RGB")
    return tile


def _tile_sources(
    tiles_by_class: Mapping[str, Sequence] | str | Path, names: set[str]
) -> dict[str, Sequence]:
    """Collect the tiles of each class, from a mapping or from a folder with one subfolder per class.

    Raises:
        SlideError: A class in `names` has no tiles.
    """
    if not isinstance(tiles_by_class, Mapping):
        root = Path(tiles_by_class)
        tiles_by_class = {
            folder.name: sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)
            for folder in sorted(root.iterdir())
            if folder.is_dir()
        }
    absent = sorted(n for n in names if not len(tiles_by_class.get(n, ())))
    if absent:
        known = sorted(tiles_by_class)
        raise SlideError(f"the layout names {absent}, for which there are no tiles; the classes are {known}")
    return dict(tiles_by_class)


def compose_slide(
    path: str | Path,
    tiles_by_class: Mapping[str, Sequence[str | Path | np.ndarray]] | str | Path,
    layout: np.ndarray | Sequence[Sequence[str]],
    *,
    tile_mpp: float,
    mpp: float = 0.5,
    seed: int = 0,
    background: int = 243,
    recolor: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[Path, tuple[str, ...]]:
    """Write a slide whose fields are labeled tiles.

    Field (i, j) of the layout shows one tile of class `layout[i][j]`, resized to the slide's scale. Tiles are
    drawn in random order; one repeats only after all tiles of its class were used. A composed slide is
    synthetic: its fields are real, their neighborhood is not.

    Args:
        path: The `.tif` file to write. A mask with the class of each 8 um pixel goes to `<stem>.truth.png` in
            the same folder: 0 = background, k + 1 = class k.
        tiles_by_class: Class name -> image files or uint8 (S, S, 3) RGB arrays, all of one size S; or a
            folder with one subfolder per class, as PatchCamelyon and NCT-CRC-HE are often stored.
        layout: Class names in rows and columns; "" is background.
        tile_mpp: Micrometers per pixel of the tiles.
        mpp: Micrometers per pixel of the slide.
        seed: Seed of the random order of the tiles.
        background: Gray level of the glass, 0 to 255.
        recolor: Function that changes the colors of a tile, uint8 RGB (S, S, 3), such as `Stain.apply`.

    Returns:
        The path, and the class names in the order of the values of the mask.

    Raises:
        SlideError: A class has no tiles, a tile is not square uint8 RGB or not of the common size, or the
            layout is not 2-D or all background.
    """
    layout = np.array(layout, dtype=object)
    if layout.ndim != 2 or not any(layout.ravel()):
        raise SlideError(f"{path}: the layout must be 2-D and name at least one class, not {layout.shape}")
    names = {name for name in layout.ravel() if name}
    sources = _tile_sources(tiles_by_class, names)
    classes = tuple(sorted(sources))
    side = len(_read_tile(sources[min(names)][0], min(names)))
    edges = [np.rint(np.arange(n + 1) * side * tile_mpp / mpp).astype(int) for n in layout.shape]
    rng = np.random.default_rng(seed)
    orders = {name: _endless(len(sources[name]), int(rng.integers(1 << 62))) for name in classes}

    def strips() -> Iterator[np.ndarray]:
        for i, row in enumerate(layout):
            strip = np.full((edges[0][i + 1] - edges[0][i], edges[1][-1], 3), background, np.uint8)
            for j, name in enumerate(row):
                if name:
                    tile = _read_tile(sources[name][next(orders[name])], name)
                    if len(tile) != side:
                        raise SlideError(f"a tile of class {name!r} has side {len(tile)}, others have {side}")
                    tile = tile if recolor is None else recolor(tile)
                    field = strip[:, edges[1][j] : edges[1][j + 1]]
                    method = cv2.INTER_AREA if len(field) < side else cv2.INTER_CUBIC
                    field[:] = cv2.resize(tile, field.shape[1::-1], interpolation=method)
            yield strip

    write_pyramid(path, strips(), int(edges[1][-1]), int(edges[0][-1]), mpp)
    write_mask(truth_path(path), _class_map(layout, classes, edges, mpp))
    return Path(path), classes


def _class_map(
    layout: np.ndarray, classes: tuple[str, ...], edges: list[np.ndarray], mpp: float
) -> np.ndarray:
    """Class of each 8 um pixel, uint8 (rows, columns): that of the field with its center; 0 = background."""
    values = np.array([[classes.index(name) + 1 if name else 0 for name in row] for row in layout], np.uint8)
    centers = [(np.arange(np.ceil(edge[-1] * mpp / TRUTH_MPP)) + 0.5) * TRUTH_MPP / mpp for edge in edges]
    fields = [
        np.minimum(np.searchsorted(edge, center, side="right") - 1, len(edge) - 2)
        for edge, center in zip(edges, centers, strict=True)
    ]
    return values[np.ix_(*fields)]


def _endless(n: int, seed: int) -> Iterator[int]:
    """Yield the numbers below n in random order, then again in another order, without end."""
    rng = np.random.default_rng(seed)
    return chain.from_iterable(rng.permutation(n) for _ in repeat(None))
