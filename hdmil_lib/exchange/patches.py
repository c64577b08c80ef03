"""Patches of bags that another tool made, filled in from the slides."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hdmil_lib.bag_files import PATCH_SIZE
from hdmil_lib.bags import Bag, read_bag, read_tile_labels, write_bag
from hdmil_lib.errors import BagError
from hdmil_lib.exchange.transfer import bag_names, run_each
from hdmil_lib.slides import Slide
from hdmil_lib.slides.listing import Source, list_slides

if TYPE_CHECKING:
    import pandas as pd


def add_patches(
    bags: str | Path,
    slides: Source | Sequence[Source],
    *,
    tile_size: int | None = None,
    mpp: float | tuple[float, float] | None = None,
    progress: bool = True,
) -> "pd.DataFrame":
    """Fill in the patches of bags that have none; a slide that fails stops no other.

    A bag is written anew, whole or not at all. Its scale (mpp_x, mpp_y) is added too.

    Args:
        bags: Folder of the bags, which are changed.
        slides: Slides, as `list_slides` takes them; each one belongs to the bag of its name. Slides without a
            bag are left out.
        tile_size: Side of a tile in level-0 pixels, for bags that do not say.
        mpp: Micrometers per level-0 pixel, as `Slide` takes it.
        progress: Whether a bar over slides is shown.

    Returns:
        One row per bag: slide_id, status ("done", "skipped" or "failed"), n_tiles, error.

    Raises:
        HDMILError: There are no bags or no slides.
    """
    bags = Path(bags)
    files = {file.slide_id: file for file in list_slides(slides)}

    def run(slide_id: str) -> tuple[str, int]:
        path = bags / f"{slide_id}.h5"
        bag = read_bag(path)
        if bag.patches is not None:
            return "skipped", len(bag)
        if slide_id not in files:
            raise BagError(f"{path}: none of the slides is called {slide_id}; name it, or rename the file")
        file = files[slide_id]
        with Slide(file.path, file.scale(mpp), name=slide_id) as slide:
            filled = _with_patches(bag, slide, bag.attrs.get("patch_size_level0") or tile_size)
        write_bag(path, filled, read_tile_labels(path))
        return "done", len(filled)

    return run_each(bag_names(bags), run, "patches", progress)


def _with_patches(bag: Bag, slide: Slide, tile_size: float | None) -> Bag:
    """A bag with the patches of its tiles, each the mean color of a sixteenth of the tile's side.

    Raises:
        BagError: The size of the tiles is not known, or the tiles do not lie in the slide.
        SlideError: The slide is damaged.
    """
    if not tile_size:
        raise BagError(
            f"bag {bag.slide_id}: does not say how large its tiles are; name their side in level-0 pixels "
            "(--tile-size)"
        )
    _check_inside(bag, slide)
    side = float(tile_size) * slide.mpp[0]  # in um
    if {"patch_size", "tile_mpp"} <= set(bag.attrs):
        side = bag.attrs["patch_size"] * bag.attrs["tile_mpp"]  # exactly
    mpp = side / PATCH_SIZE
    size = (PATCH_SIZE, PATCH_SIZE)
    patches = np.stack([slide.read_mean(x, y, size, mpp) for x, y in bag.coords.tolist()])
    scale = {"mpp_x": slide.mpp[0], "mpp_y": slide.mpp[1], "mpp_source": slide.scale.source}
    width, height = slide.dimensions
    known = {"patch_size_level0": int(tile_size), "level0_width": width, "level0_height": height}
    return replace(bag, patches=patches, attrs={**known, **scale, **bag.attrs})


def _check_inside(bag: Bag, slide: Slide) -> None:
    """Check that the corners of all tiles lie in the slide, and that the bag is of a slide of this size.

    Tiles at the right and lower edge may reach beyond it, as CLAM's do.
    """
    width, height = slide.dimensions
    stored = bag.attrs.get("level0_width", width), bag.attrs.get("level0_height", height)
    if stored != (width, height):
        raise BagError(
            f"bag {bag.slide_id}: was made from a slide of {stored[0]} x {stored[1]} pixels, {slide.path} "
            f"has {width} x {height}; give the slide it was made from"
        )
    outside = ((bag.coords < 0) | (bag.coords >= (width, height))).any(axis=1)
    if outside.any():
        x, y = bag.coords[outside.argmax()].tolist()
        raise BagError(
            f"bag {bag.slide_id}: {outside.sum():,} of its {len(bag):,} tiles lie outside of {slide.path}, "
            f"which has {width} x {height} pixels, the first at ({x}, {y}); give the slide it was made from"
        )
