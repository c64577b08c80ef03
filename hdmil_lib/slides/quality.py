"""What became of every square of a slide's grid: kept as a tile, or rejected and why."""

from dataclasses import dataclass, replace
from enum import IntEnum

import cv2
import numpy as np

from hdmil_lib.errors import SlideError
from hdmil_lib.slides.focus import BLURRED
from hdmil_lib.slides.ink import glass_color, optical_density
from hdmil_lib.slides.presets import tissue_settings
from hdmil_lib.slides.reader import Slide
from hdmil_lib.slides.scale import Scale
from hdmil_lib.slides.tiling import TileGrid, blocks, grid_shape
from hdmil_lib.slides.tissue import TissueSettings, black_mask, pen_mask, tissue_mask

PATCH_MPP, PATCH_SIZE, TILE_UM = 8.0, 16, 128.0
"""Scale of the thumbnail in um/px, side of a square on it in pixels, and the same in um."""

N_FOCUS = 64
"""Number of tiles that are read to see whether a slide is in focus."""

FOLD_DENSITY = 1.8
"""Optical density of a fold in units of the median of the tissue: two layers absorb twice as much as one. At
1.7 the epithelium around the hair follicle of the real sample slide is taken for one."""

MIN_FOLD_UM, MIN_FOLD_WIDTH_UM, FOLD_ASPECT = 400.0, 40.0, 3.0
"""Least length and width in um of a fold, and how many times longer than wide it is. Dense round areas, such
as follicles of lymphocytes, are no folds. Dense bands may be taken for one, so that they are only
reported."""


class Square(IntEnum):
    """What a square of the grid is."""

    GLASS = 0
    KEPT = 1
    LITTLE_TISSUE = 2
    INK = 3
    BLACK = 4
    BLURRED = 5


@dataclass(frozen=True, eq=False)
class SlideQuality:
    """What is on a slide, and what a run with these settings would take of it.

    Attributes:
        slide_id: Name of the slide.
        dimensions: (width, height) of level 0 in pixels.
        vendor: OpenSlide's name of the format.
        scale: Micrometers per level-0 pixel, who said so, and what is odd about it.
        settings: The tissue settings.
        thumbnail: RGB pixels at 8 um/px, uint8 (H, W, 3).
        tissue: Tissue on the thumbnail, bool (H, W).
        ink: Pen marks on the thumbnail, bool (H, W), found whether or not the settings exclude them.
        folds: What may be folded tissue, bool (H, W).
        squares: What each square of the grid is, a `Square`, uint8 (rows, cols).
        ink_notes: What is odd about pen ink, in words; see `ink_notes`.
        sharpness: Sharpness of up to 64 kept tiles spread over the slide, float (n,).
        error: Why there are no tiles; empty if there are some.
    """

    slide_id: str
    dimensions: tuple[int, int]
    vendor: str
    scale: Scale
    settings: TissueSettings
    thumbnail: np.ndarray
    tissue: np.ndarray
    ink: np.ndarray
    folds: np.ndarray
    squares: np.ndarray
    ink_notes: tuple[str, ...]
    sharpness: np.ndarray
    error: str = ""

    @property
    def n_tiles(self) -> int:
        """Number of tiles that are kept."""
        return self.count(Square.KEPT)

    @property
    def tissue_mm2(self) -> float:
        """Area of the tissue in mm2."""
        return float(self.tissue.sum()) * (PATCH_MPP / 1000) ** 2

    @property
    def tissue_share(self) -> float:
        """Share of tissue in the scanned area, 0 to 1."""
        return float(self.tissue.mean()) if self.tissue.size else 0.0

    def count(self, kind: Square) -> int:
        """Number of squares of a kind."""
        return int((self.squares == kind).sum())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should look at, in words."""
        found = [f"scale: {note}" for note in self.scale.notes]
        if self.error:
            found.append(self.error)
        found += self.ink_notes
        if self.count(Square.INK):
            found.append(f"pen ink covers {self.count(Square.INK)} squares, which are left out")
        if self.count(Square.BLACK):
            found.append(f"{self.count(Square.BLACK)} squares are black, not scanned")
        if self.count(Square.BLURRED):
            found.append(f"{self.count(Square.BLURRED)} tiles are out of focus and left out")
        n_blurred = int((self.sharpness < BLURRED).sum())
        if n_blurred >= max(2, 0.1 * len(self.sharpness)):
            found.append(
                f"{n_blurred} of {len(self.sharpness)} tiles looked at are out of focus; scan the slide "
                f"again, or leave such tiles out with --min-sharpness {BLURRED:g}"
            )
        folded = float(self.folds.sum()) * (PATCH_MPP / 1000) ** 2
        if self.tissue_mm2 and folded / self.tissue_mm2 >= 0.01:
            found.append(f"{folded:.2f} mm2 of tissue may be folded")
        return tuple(found)


def slide_quality(
    slide: Slide, tissue: TissueSettings | str | None = None, *, focus: bool = True
) -> SlideQuality:
    """Look at a slide as `hdmil extract` would, and say what it would take and leave.

    Args:
        slide: An open slide.
        tissue: Settings of the tissue mask, or the name of a preset; None takes the defaults.
        focus: Whether some tiles are read to see if they are sharp.

    Returns:
        What was found; a slide without tiles has an `error`, and is none.

    Raises:
        SlideError: The thumbnail cannot be read.
        HDMILError: There is no such preset, or a setting is out of its range.
    """
    settings = tissue_settings(tissue)
    grid, error = None, ""
    try:
        grid = TileGrid.from_slide(slide, tissue=replace(settings, min_sharpness=0.0), allow_upsampling=True)
        shape, thumbnail, mask = grid.shape, grid.thumbnail, grid.tissue
    except SlideError as reason:
        error = str(reason).removeprefix(f"{slide.path}: ")
        thumbnail = slide.thumbnail(PATCH_MPP)
        mask = tissue_mask(thumbnail, PATCH_MPP, settings)
        shape = _shape_or_none(slide)
    ink, black = pen_mask(thumbnail, PATCH_MPP), black_mask(thumbnail, PATCH_MPP)
    shares = {"tissue": mask, "ink": ink, "black": black}
    shares = {name: blocks(area, shape, PATCH_SIZE).mean(axis=(2, 3)) for name, area in shares.items()}
    squares = _squares(shares["tissue"], shares["ink"], shares["black"], settings.min_tissue)
    sharpness = np.empty(0)
    if grid is not None and (focus or settings.min_sharpness):
        n = len(grid) if settings.min_sharpness else min(len(grid), N_FOCUS)
        rows = np.unique(np.linspace(0, len(grid) - 1, n).astype(int))
        sharpness = grid.sharpness(slide, rows)
        blurred = grid.rowcol[rows[sharpness < settings.min_sharpness]]
        squares[blurred[:, 0], blurred[:, 1]] = Square.BLURRED
    return SlideQuality(
        slide_id=slide.name,
        dimensions=slide.dimensions,
        vendor=slide.vendor,
        scale=slide.scale,
        settings=settings,
        thumbnail=thumbnail,
        tissue=mask,
        ink=ink,
        folds=fold_mask(thumbnail, mask & ~ink, PATCH_MPP),
        squares=squares,
        ink_notes=() if grid is None else ink_notes(grid, settings),
        sharpness=sharpness,
        error=error,
    )


def ink_notes(grid: TileGrid, settings: TissueSettings) -> tuple[str, ...]:
    """That tiles lie on pen ink, in words, where the settings do not leave it out."""
    n_on_ink = 0 if settings.exclude_ink else int(grid.on_ink().sum())
    if not n_on_ink:
        return ()
    return (f"{n_on_ink} of {len(grid)} tiles lie on pen ink; --tissue he and other presets leave it out",)


def fold_mask(thumbnail: np.ndarray, tissue: np.ndarray, mpp: float) -> np.ndarray:
    """Find long, narrow regions of tissue that absorb nearly twice as much as the tissue in the median.

    Args:
        thumbnail: RGB pixels, uint8 (H, W, 3).
        tissue: Tissue without ink, bool (H, W).
        mpp: Scale in um/px.

    Returns:
        True on what may be a fold, bool (H, W).
    """
    if not tissue.any():
        return np.zeros_like(tissue)
    density = optical_density(thumbnail, glass_color(thumbnail)).mean(axis=-1)
    density = cv2.GaussianBlur(density, (0, 0), max(0.5, 24 / mpp))
    dense = tissue & (density > FOLD_DENSITY * np.median(density[tissue]))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(dense.astype(np.uint8), connectivity=8)
    folds = np.zeros_like(tissue)
    for label, (x, y, w, h, area) in enumerate(stats):
        if label and area * mpp**2 >= MIN_FOLD_UM * MIN_FOLD_WIDTH_UM:
            box = slice(y, y + h), slice(x, x + w)
            piece = labels[box] == label
            if _is_long(piece, mpp):
                folds[box] |= piece
    return folds


def _is_long(piece: np.ndarray, mpp: float) -> bool:
    """Whether a piece, bool (h, w), has the length of a fold and is narrow, also if it is bent.

    The width is that of the largest disc inside the piece with its holes filled, the length its area over
    that.
    """
    outlines, _ = cv2.findContours(piece.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros(piece.shape, np.uint8), outlines, -1, 1, cv2.FILLED)
    width = 2 * cv2.distanceTransform(np.pad(filled, 1), cv2.DIST_L2, 5).max()
    length = filled.sum() / width
    return length * mpp >= MIN_FOLD_UM and length >= FOLD_ASPECT * width


def _squares(tissue: np.ndarray, ink: np.ndarray, black: np.ndarray, min_tissue: float) -> np.ndarray:
    """What each square is by the shares of what lies in it, uint8 (rows, cols)."""
    kinds = np.select(
        [tissue >= min_tissue, black >= 0.25, ink >= 0.25, tissue > 0],
        [Square.KEPT, Square.BLACK, Square.INK, Square.LITTLE_TISSUE],
        Square.GLASS,
    )
    return kinds.astype(np.uint8)


def _shape_or_none(slide: Slide) -> tuple[int, int]:
    """Rows and columns of the grid, (0, 0) if the slide is smaller than a tile."""
    try:
        return grid_shape(slide, TILE_UM)
    except SlideError:
        return 0, 0
