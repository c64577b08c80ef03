"""Maps on the slide: tissue and tiles, attention, kept tiles and truth, drawn over the thumbnail in mm.

A map is drawn from anything that lies on the grid: a `TileGrid`, a `Prediction` or a `Bag`. A tile is 16
thumbnail pixels wide: 128 um with tiles as in the paper. Neither models nor other slow libraries are imported
here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from hdmil_lib.viz.style import BLUE, INK, SEQUENTIAL, VERMILION, YELLOW, axes_or_new, house_style, plain

if TYPE_CHECKING:
    from hdmil_lib.inference.prediction import Prediction

PIXELS = 16
"""Thumbnail pixels along a tile's side."""
MAP_SIZE = (6.4, 4.6)
DROPPED = to_rgba("#c4c8ce", 0.72)
TISSUE = "#d39bc0"


class OnGrid(Protocol):
    """Tiles on a slide's grid: a `TileGrid`, a `Prediction` or a `Bag`."""

    @property
    def tile_um(self) -> float:
        """Side of a tile in um."""

    @property
    def thumbnail(self) -> np.ndarray:
        """The slide with 16 pixels per tile, uint8 (H, W, 3)."""

    @property
    def rowcol(self) -> np.ndarray:
        """Position of the tiles on the grid, int64 (N, 2)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid."""


def _thumbnail(grid: OnGrid) -> np.ndarray:
    """The picture under the map, uint8 (H, W, 3); a bag without patches has plain squares for its tiles."""
    if getattr(grid, "patches", ()) is not None:
        return grid.thumbnail
    tiles = np.full((*grid.shape, 3), 255, np.uint8)
    tiles[grid.rowcol[:, 0], grid.rowcol[:, 1]] = 255 * (0.7 + 0.3 * np.array(to_rgb(TISSUE)))
    return tiles.repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)


def _extent(height: float, width: float, pitch: float) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of an image whose pixels have sides of `pitch`."""
    return (0, width * pitch, height * pitch, 0)


def _cells(grid: OnGrid, colors: np.ndarray) -> np.ndarray:
    """An image (rows, cols, 4), transparent where no tile lies."""
    cells = np.zeros((*grid.shape, 4))
    cells[grid.rowcol[:, 0], grid.rowcol[:, 1]] = colors
    return cells


def attention_cells(grid: OnGrid, attention: np.ndarray, *, ranks: bool = True) -> np.ndarray:
    """The colors of `attention_overlay` as an image that covers the grid, (rows, cols, 4).

    Args:
        grid: A `TileGrid`, `Prediction` or `Bag`.
        attention: (N,) numbers; tiles with nan are transparent.
        ranks: Color by rank in [0, 1]; if False, by value.
    """
    values = _shown_values(attention, ranks)
    colors = plt.get_cmap(SEQUENTIAL)(_range(values, ranks)(np.nan_to_num(values)))
    colors[:, 3] = np.where(np.isfinite(values), 0.65, 0.0)
    return _cells(grid, colors)


def kept_cells(grid: OnGrid, kept: np.ndarray) -> np.ndarray:
    """The gray of `kept_overlay` on dropped tiles as an image that covers the grid, (rows, cols, 4)."""
    return _cells(grid, np.where(np.asarray(kept, dtype=bool)[:, None], (0, 0, 0, 0), DROPPED))


def truth_cells(grid: OnGrid, tumor_share: np.ndarray) -> np.ndarray:
    """The colors of `truth_overlay` as an image that covers the grid, (rows, cols, 4)."""
    share = np.asarray(tumor_share, dtype=float)
    colors = np.tile(to_rgb(VERMILION), (len(share), 1))
    return _cells(grid, np.column_stack([colors, np.where(share > 0, 0.25 + 0.55 * share, 0)]))


def _shown_values(attention: np.ndarray, ranks: bool) -> np.ndarray:
    """The numbers, or their ranks from 0 to 1 among those that are not nan."""
    values = np.array(attention, dtype=float)
    known = np.isfinite(values)
    if ranks:
        values[known] = values[known].argsort().argsort() / max(known.sum() - 1, 1)
    return values


def _range(values: np.ndarray, ranks: bool) -> Normalize:
    return Normalize(0.0, 1.0) if ranks else Normalize(np.nanmin(values), np.nanmax(values))


def _map(grid: OnGrid, cells: np.ndarray, ax: Axes | None) -> Axes:
    """The slide under an RGBA image that covers the grid, (rows * k, cols * k, 4)."""
    thumbnail, pixel_um = _thumbnail(grid), grid.tile_um / PIXELS
    ax = slide_overview(thumbnail, pixel_um, ax)
    ax.imshow(cells, extent=_extent(*grid.shape, grid.tile_um / 1000), interpolation="nearest")
    height, width = thumbnail.shape[:2]
    ax.set(xlim=(0, width * pixel_um / 1000), ylim=(height * pixel_um / 1000, 0))
    return ax


def _above(ax: Axes, handles: list[Patch]) -> None:
    """A legend in one line over the axes."""
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), borderaxespad=0.2)


def slide_overview(thumbnail: np.ndarray, mpp: float = 8.0, ax: Axes | None = None) -> Axes:
    """A thumbnail uint8 (H, W, 3) of `mpp` um/px, with axes in mm."""
    ax = axes_or_new(ax, MAP_SIZE)
    height, width = thumbnail.shape[:2]
    ax.imshow(thumbnail, extent=_extent(height, width, mpp / 1000), interpolation="antialiased")
    ax.set(xlabel="x (mm)", ylabel="y (mm)")
    return ax


def tissue_tiles(grid: OnGrid, tissue: np.ndarray | None = None, ax: Axes | None = None) -> Axes:
    """The tissue mask's outline and the tiles that hold enough tissue.

    Args:
        grid: A `TileGrid`, or anything else on a grid.
        tissue: Mask on the thumbnail, bool (H, W); that of a `TileGrid` if not given.
        ax: Axes to draw on.

    Raises:
        ValueError: There is no tissue mask.
    """
    tissue = getattr(grid, "tissue", None) if tissue is None else tissue
    if tissue is None:
        raise ValueError(f"tissue is None, and a {type(grid).__name__} has no tissue mask; pass one")
    tiles = _cells(grid, 255 * np.array(to_rgba(BLUE, 0.9))).astype(np.uint8)
    frame = np.ones((PIXELS, PIXELS, 1), np.uint8)
    frame[1:-1, 1:-1] = 0
    ax = _map(grid, np.kron(tiles, frame), ax)
    y, x = ((np.arange(size) + 0.5) * grid.tile_um / PIXELS / 1000 for size in tissue.shape)
    ax.contour(x, y, tissue, levels=[0.5], colors=[INK], linewidths=1.2)
    _above(ax, [Patch(fc="none", ec=INK, label="tissue"), Patch(fc="none", ec=BLUE, label="tile")])
    return ax


def tile_and_patch(
    tile: np.ndarray, patch: np.ndarray, axes: Sequence[Axes] | None = None, *, field_um: float = 128.0
) -> Sequence[Axes]:
    """One field of tissue as both networks see it: the tile (DMIN) beside its patch (LIPN).

    Args:
        tile: RGB uint8 (256, 256, 3).
        patch: RGB uint8 (16, 16, 3).
        axes: Two axes, left for the tile.
        field_um: Side of the field in um.
    """
    if axes is None:
        axes = plt.subplots(1, 2, figsize=(6.4, 3.4), layout="constrained", sharey=True)[1]
    for ax, image, name in zip(axes, (tile, patch), ("tile", "patch"), strict=True):
        ax.imshow(image, extent=(0, field_um, field_um, 0), interpolation="nearest")
        pixel = field_um / len(image)
        ax.set(xlabel="x (µm)", title=f"{name}: {image.shape[1]} × {len(image)} px of {pixel:g} µm")
    axes[0].set_ylabel("y (µm)")
    return axes


def gallery(
    images: Sequence[np.ndarray],
    titles: Sequence[str] | None = None,
    *,
    columns: int = 8,
    ax: Axes | None = None,
) -> Axes:
    """Tiles or patches in rows of `columns`, all of one size, with an optional line of text over each."""
    size, rows = len(images[0]), -(-len(images) // columns)
    pitch_x, pitch_y = 1.06, 1.06 if titles is None else 1.22
    ax = axes_or_new(ax, (1.1 * columns, 1.1 * rows * pitch_y))
    for i, image in enumerate(images):
        left, top = i % columns * pitch_x, i // columns * pitch_y
        smooth = "nearest" if size <= 32 else "antialiased"
        ax.imshow(image, extent=(left, left + 1, top + 1, top), interpolation=smooth)
        if titles is not None:
            ax.text(left, top - 0.02, plain(titles[i]), fontsize=9, va="bottom")
    ax.set(xlim=(0, columns * pitch_x - 0.06), ylim=(rows * pitch_y - 0.04, 1.04 - pitch_y), aspect="equal")
    ax.axis("off")
    return ax


def attention_overlay(
    grid: OnGrid,
    attention: np.ndarray,
    ax: Axes | None = None,
    *,
    label: str = "attention, rank among tiles",
    ranks: bool = True,
) -> Axes:
    """One number per tile over the slide, with a color bar.

    Args:
        grid: A `TileGrid`, `Prediction` or `Bag`.
        attention: (N,) numbers; tiles with nan, which were not read, stay bare.
        ax: Axes to draw on.
        label: Text of the color bar.
        ranks: Color by rank in [0, 1], because attention spans orders of magnitude; if False, by value.
    """
    norm = _range(_shown_values(attention, ranks), ranks)
    ax = _map(grid, attention_cells(grid, attention, ranks=ranks), ax)
    bar = ax.figure.colorbar(plt.cm.ScalarMappable(norm, SEQUENTIAL), ax=ax, shrink=0.8, pad=0.02, alpha=0.65)
    bar.set_label(plain(label))
    return ax


def kept_title(kept: np.ndarray) -> str:
    """How many tiles are kept, bool (N,), in words."""
    return f"{kept.sum():,} of {len(kept):,} tiles kept ({kept.mean():.0%})"


def kept_overlay(
    grid: OnGrid, kept: np.ndarray, ax: Axes | None = None, *, label: str = "kept: read and encoded"
) -> Axes:
    """The tiles that are kept, bool (N,), with a label that says why; the dropped ones are grayed out."""
    kept = np.asarray(kept, dtype=bool)
    ax = _map(grid, kept_cells(grid, kept), ax)
    ax.set_title(kept_title(kept), pad=22)
    _above(ax, [Patch(fc=TISSUE, label=label), Patch(fc=DROPPED, label="dropped")])
    return ax


def truth_overlay(grid: OnGrid, tumor_share: np.ndarray, ax: Axes | None = None) -> Axes:
    """Where the tumor lies, for teaching and checks: the share of tumor in each tile, (N,) in [0, 1]."""
    share = np.asarray(tumor_share, dtype=float)
    ax = _map(grid, truth_cells(grid, share), ax)
    ax.set_title(f"tumor in {np.count_nonzero(share):,} of {len(share):,} tiles", pad=22)
    _above(ax, [Patch(fc=VERMILION, alpha=0.8, label="tumor (synthetic truth), denser = larger share")])
    return ax


def prediction_figure(prediction: "Prediction") -> Figure:
    """A new figure of one prediction: attention for the predicted class beside the tiles that were read.

    It has the look of `use_style`, which need not have been called. It is not open in pyplot, so that a
    notebook shows it once, as the value of its cell.
    """
    label = prediction.label
    branch = prediction.classes.index(label)
    attention = prediction.attention[:, branch]
    with house_style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
        attention_overlay(prediction, attention, left, label=f"attention for {label}, rank among tiles")
        kept_overlay(prediction, np.isfinite(attention), right)
        figure.suptitle(plain(f"{prediction.slide_id}: {label} {prediction.probabilities[branch]:.2f}"))
        figure.draw_without_rendering()  # makes the ticks, which read the settings
    plt.close(figure)
    return figure


def mark_tile(grid: OnGrid, i: int, ax: Axes, *, color: str = YELLOW) -> Axes:
    """Frame tile i on a map of the slide."""
    row, col = grid.rowcol[i]
    side = grid.tile_um / 1000
    frame = Rectangle((col * side, row * side), side, side, fc="none", ec=color, lw=2.5)
    ax.add_patch(frame)
    return ax
