"""The grid of tiles of a slide, each paired with the low-resolution patch of the same tissue."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hdmil_lib.errors import HDMILError, SlideError
from hdmil_lib.slides.focus import SHARPNESS_MPP, sharpness
from hdmil_lib.slides.presets import PRESETS, tissue_settings
from hdmil_lib.slides.reader import Slide
from hdmil_lib.slides.tissue import TissueSettings, pen_mask, tissue_mask

if TYPE_CHECKING:
    from torch import Tensor

    from hdmil_lib.slides.gpu_decoding import NvImageCodec


MAX_UPSAMPLING = 1.25
"""Tile pixels per pixel of the slide up to which slides are enlarged: scanners of 20x go to 0.55 um/px."""


@dataclass(frozen=True)
class TileSettings:
    """Which tiles are cut from slides.

    Attributes:
        size: Side of a tile in pixels.
        mpp: Scale of the tiles in um/px.
        allow_upsampling: Whether slides may be much coarser than that; see `TileGrid.from_slide`.
    """

    size: int = 256
    mpp: float = 0.5
    allow_upsampling: bool = False

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 8192:
            raise HDMILError(f"tiles of {self.size} pixels: the side must be 16 to 8192")
        if not 0.05 <= self.mpp <= 100:
            raise HDMILError(f"tiles of {self.mpp:g} um/px: the scale must be 0.05 to 100")

    def grid(self, slide: Slide, tissue: TissueSettings | str | None = None) -> "TileGrid":
        """The tiles of a slide; see `TileGrid.from_slide`."""
        own = self.allow_upsampling
        return TileGrid.from_slide(
            slide, tile_size=self.size, mpp=self.mpp, tissue=tissue, allow_upsampling=own
        )


DEFAULT_TILES = TileSettings()
"""256 pixels at 0.5 um/px, as in the paper."""


@dataclass(frozen=True, eq=False)
class TileGrid:
    """N tiles of a slide and their paired patches; row i is the same tile in every array.

    The grid starts at the top-left corner of the slide's bounds and has squares of `tile_size * mpp` um. The
    patch of tile (row, col) is the block of `patch_size` x `patch_size` thumbnail pixels that starts at
    (row * patch_size, col * patch_size): the same square, 16 times coarser (paper, section 3.1).

    Attributes:
        coords: Level-0 (x, y) of the top-left corners of the tiles, int64 (N, 2), rounded to whole pixels.
        rowcol: (row, col) of the tiles on the grid, int64 (N, 2).
        shape: (rows, cols) of the whole grid, including squares without tissue.
        patches: RGB patches, uint8 (N, patch_size, patch_size, 3).
        thumbnail: Picture of the bounds at `patch_mpp`, uint8 (H, W, 3).
        tissue: Tissue mask of the thumbnail, bool (H, W).
        tile_size: Side of a tile in pixels.
        mpp: Scale of the tiles in um/px.
        patch_mpp: Scale of patches and thumbnail in um/px.
        tile_size_level0: (width, height) of a tile in level-0 pixels, rounded.
    """

    coords: np.ndarray
    rowcol: np.ndarray
    shape: tuple[int, int]
    patches: np.ndarray
    thumbnail: np.ndarray
    tissue: np.ndarray
    tile_size: int
    mpp: float
    patch_mpp: float
    tile_size_level0: tuple[int, int]

    @classmethod
    def from_slide(
        cls,
        slide: Slide,
        *,
        tile_size: int = 256,
        mpp: float = 0.5,
        patch_size: int = 16,
        min_tissue: float | None = None,
        tissue: TissueSettings | str | None = None,
        allow_upsampling: bool = False,
    ) -> "TileGrid":
        """Lay the grid over a slide's bounds and keep the tiles with tissue.

        The slide is read once, for the thumbnail; all patches are cut from it. Where a damaged file has no
        pixels for the thumbnail, its tiles are kept as if they were tissue, so that those that cannot be read
        are counted and not passed over.

        Args:
            slide: An open slide.
            tile_size: Side of a tile in pixels.
            mpp: Scale of the tiles in um/px.
            patch_size: Side of a patch in pixels. The scale of the patches is mpp * tile_size / patch_size,
                8 um/px with the default values.
            min_tissue: Smallest share of tissue in a tile, 0 to 1; that of `tissue` if not given.
            tissue: Settings of the tissue mask, or the name of a preset; None takes the defaults.
            allow_upsampling: Whether tiles may be much finer than the slide, more than `MAX_UPSAMPLING`
                times; then they are enlarged and lack the detail that their scale promises.

        Returns:
            The grid, with the N tiles that have enough tissue, and are sharp if the settings ask for it.

        Raises:
            SlideError: The slide is smaller than one tile or too coarse, or no tile has enough tissue or is
                sharp.
            HDMILError: There is no such preset, or a setting is out of its range.
        """
        settings = tissue_settings(tissue, min_tissue=min_tissue)
        enlarged = max(slide.mpp) / mpp
        if enlarged > MAX_UPSAMPLING and not allow_upsampling:
            raise SlideError(
                f"{slide.path}: has {max(slide.mpp):.4g} um/px; tiles of {mpp:g} um/px would be enlarged "
                f"{enlarged:.1f} times and lack detail. Check the scale, take tiles of a coarser scale "
                "(--tile-mpp), or allow it (--allow-upsampling)."
            )
        patch_mpp = mpp * tile_size / patch_size
        shape = grid_shape(slide, tile_size * mpp)
        thumbnail, readable = slide.thumbnail_with_gaps(patch_mpp)
        mask = tissue_mask(thumbnail, patch_mpp, settings) | ~readable  # what cannot be seen may be tissue
        share = blocks(mask, shape, patch_size).mean(axis=(2, 3))
        rowcol = np.argwhere(share >= settings.min_tissue)
        if len(rowcol) == 0:
            raise SlideError(
                f"{slide.path}: no tile has {settings.min_tissue:.0%} tissue (largest share "
                f"{share.max():.0%}). Compare the presets with `hdmil tissue`, then lower min_tissue "
                f"(--min-tissue) or choose another preset (--tissue {', '.join(PRESETS)})."
            )
        pitch = tile_size * mpp / np.array(slide.mpp)  # exact tile size in level-0 pixels
        grid = cls(
            coords=np.rint(slide.bounds[:2] + rowcol[:, ::-1] * pitch).astype(np.int64),
            rowcol=rowcol,
            shape=shape,
            patches=blocks(thumbnail, shape, patch_size)[rowcol[:, 0], rowcol[:, 1]],
            thumbnail=thumbnail,
            tissue=mask,
            tile_size=tile_size,
            mpp=mpp,
            patch_mpp=patch_mpp,
            tile_size_level0=(round(pitch[0]), round(pitch[1])),
        )
        return grid._sharp(slide, settings.min_sharpness) if settings.min_sharpness else grid

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def tile_um(self) -> float:
        """Side of a tile in um."""
        return self.tile_size * self.mpp

    def at(self, side: int) -> "TileGrid":
        """The same tiles, read with `side` pixels along each side: a coarser look at the same tissue."""
        return replace(self, tile_size=side, mpp=self.mpp * self.tile_size / side)

    def select(self, rows: Sequence[int] | np.ndarray) -> "TileGrid":
        """The grid with these tiles only, in this order.

        Args:
            rows: Rows of the tiles, (n,).
        """
        rows = np.asarray(rows, np.int64)
        return replace(self, coords=self.coords[rows], rowcol=self.rowcol[rows], patches=self.patches[rows])

    def on_ink(self) -> np.ndarray:
        """Which tiles are half pen ink or more, by the thumbnail, bool (N,)."""
        ink = pen_mask(self.thumbnail, self.patch_mpp)
        share = blocks(ink, self.shape, self.patches.shape[1]).mean(axis=(2, 3))
        return share[self.rowcol[:, 0], self.rowcol[:, 1]] >= 0.5

    def sharpness(self, slide: Slide, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read tiles at 1 um/px and measure how sharp they are; see `hdmil_lib.slides.focus`.

        Args:
            slide: The slide of this grid.
            rows: Rows of the tiles, (n,).

        Returns:
            float (n,), without a unit.

        Raises:
            SlideError: The file is damaged in a tile.
        """
        coarse = self.at(max(1, round(self.tile_size * self.mpp / SHARPNESS_MPP)))
        return np.array([sharpness(coarse.read_tile(slide, int(row))) for row in rows])

    def _sharp(self, slide: Slide, least: float) -> "TileGrid":
        """The grid without tiles that are out of focus."""
        kept = np.flatnonzero(self.sharpness(slide, range(len(self))) >= least)
        if len(kept) == 0:
            raise SlideError(
                f"{slide.path}: none of {len(self)} tiles has a sharpness of {least:g}; lower min_sharpness "
                "(--min-sharpness), or scan the slide again."
            )
        return self.select(kept)

    def read_tile(self, slide: Slide, i: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read tile i at the grid's scale, uint8 (tile_size, tile_size, 3), into `out` if given.

        Raises:
            SlideError: The file is damaged in this tile.
        """
        x, y = self.coords[i].tolist()
        return slide.read_field(x, y, (self.tile_size, self.tile_size), self.mpp, out)

    def read_tiles(
        self, slide: Slide, rows: Sequence[int] | np.ndarray, decoder: "NvImageCodec"
    ) -> "tuple[Tensor, dict[int, SlideError]]":
        """Read many tiles at the grid's scale on a GPU; see `Slide.read_fields`.

        Returns:
            RGB pixels on the GPU, uint8 (n, tile_size, tile_size, 3), in the order of `rows`, and the errors
            of damaged tiles by their position in `rows`.
        """
        size = (self.tile_size, self.tile_size)
        return slide.read_fields(self.coords[np.asarray(rows)], size, self.mpp, decoder)

    def to_map(self, values: np.ndarray, fill: float = np.nan) -> np.ndarray:
        """Put one value per tile back on the grid.

        Args:
            values: Numbers in the order of the tiles, (N,).
            fill: Value of the squares without a tile.

        Returns:
            float (rows, cols).
        """
        grid = np.full(self.shape, fill, dtype=float)
        grid[self.rowcol[:, 0], self.rowcol[:, 1]] = values
        return grid


def grid_shape(slide: Slide, tile_um: float) -> tuple[int, int]:
    """Number of rows and columns of tiles of `tile_um` um that lie completely inside the bounds.

    Raises:
        SlideError: The slide is smaller than a tile.
    """
    width_um, height_um = slide.bounds[2] * slide.mpp[0], slide.bounds[3] * slide.mpp[1]
    rows, cols = (int(extent / tile_um + 1e-6) for extent in (height_um, width_um))
    if rows == 0 or cols == 0:
        raise SlideError(
            f"{slide.path}: {width_um:.0f} x {height_um:.0f} um is smaller than a tile of {tile_um:.0f} um. "
            "Check the mpp of the slide (pass mpp= if it is wrong in the file), or use smaller tiles."
        )
    return rows, cols


def blocks(image: np.ndarray, shape: tuple[int, int], size: int) -> np.ndarray:
    """View an image (H, W, ...) as its grid of blocks, (rows, cols, size, size, ...)."""
    rows, cols = shape
    cropped = image[: rows * size, : cols * size]
    return cropped.reshape(rows, size, cols, size, *image.shape[2:]).swapaxes(1, 2)
