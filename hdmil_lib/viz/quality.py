"""Pictures for quality control: tissue and tiles of a slide, and what each tissue preset finds on it."""

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, AuxTransformBox, HPacker, TextArea
from matplotlib.patches import Patch, Rectangle

from hdmil_lib.slides.presets import describe
from hdmil_lib.slides.quality import PATCH_MPP, TILE_UM, SlideQuality, Square
from hdmil_lib.viz.overlays import slide_overview
from hdmil_lib.viz.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, VERMILION, house_style, plain

SQUARES: Mapping[Square, tuple[str, str, float]] = {
    Square.KEPT: ("tile, kept", BLUE, 0.12),
    Square.LITTLE_TISSUE: ("too little tissue", ORANGE, 0.45),
    Square.INK: ("pen ink", PURPLE, 0.45),
    Square.BLACK: ("black, not scanned", MUTED, 0.6),
    Square.BLURRED: ("out of focus", VERMILION, 0.55),
}
"""Name, color and opacity of the squares of a grid; glass stays bare."""

CONTOUR = GREEN
LINE = 150
"""Characters in a line of text under a contact sheet."""


def contact_sheet(quality: SlideQuality) -> Figure:
    """A slide with the outline of its tissue beside the squares that are kept or rejected, and why.

    Args:
        quality: What was found on the slide.

    Returns:
        A figure that is not open in pyplot.
    """
    height, width = quality.thumbnail.shape[:2]
    beside = width <= 1.6 * height
    panel = _panel_size(height, width, 6.3 if beside else 11.0, 7.0 if beside else 4.6)
    lines = _description(quality)
    below = 0.19 * len(lines) + 0.65
    size = (2 * panel[0] + 0.3, panel[1] + below + 0.9) if beside else (panel[0], 2 * panel[1] + below + 1.6)
    with house_style():
        figure = plt.figure(figsize=(max(size[0], 8.0), size[1]))
        room = dict(left=0.01, right=0.99, top=1 - 0.75 / size[1], bottom=below / size[1])
        room |= dict(wspace=0.03, hspace=0.8 / panel[1])
        first, second = figure.subplots(*((1, 2) if beside else (2, 1)), gridspec_kw=room)
        outlined(quality, first)
        squares_of(quality, second)
        figure.suptitle(
            plain(quality.slide_id), x=0.01, y=1 - 0.1 / size[1], ha="left", va="top", weight="bold"
        )
        figure.text(0.01, (below - 0.45) / size[1], "\n".join(lines), va="top", fontsize=9, linespacing=1.35)
    plt.close(figure)
    return figure


def outlined(quality: SlideQuality, ax: Axes) -> Axes:
    """The thumbnail with the outline of the tissue, of pen marks and of folds, and a scale bar."""
    _bare(quality.thumbnail, ax)
    legend = [Patch(fc="none", ec=CONTOUR, label=f"tissue, {quality.tissue_mm2:.2f} mm²")]
    _outline(quality.tissue, CONTOUR, ax)
    for area, color, name in ((quality.ink, PURPLE, "pen ink"), (quality.folds, VERMILION, "perhaps folded")):
        if area.any():
            _outline(area, color, ax)
            legend.append(Patch(fc="none", ec=color, label=name))
    _legend(ax, legend)
    scale_bar(quality.thumbnail.shape[1] * PATCH_MPP / 1000, ax)
    return ax


def squares_of(quality: SlideQuality, ax: Axes) -> Axes:
    """The thumbnail under the squares of the grid, colored by what each is, with their numbers."""
    _bare(quality.thumbnail, ax)
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    line = min(0.9, 20 / max(1, *quality.squares.shape))
    legend = []
    for kind, (name, color, opacity) in SQUARES.items():
        places = np.argwhere(quality.squares == kind)
        if len(places):
            outlines = (places[:, None, ::-1] + corners) * TILE_UM / 1000
            look = {"facecolors": to_rgba(color, opacity), "edgecolors": color, "linewidths": line}
            ax.add_collection(PolyCollection(outlines, **look), autolim=False)
            label = f"{name}: {len(places):,}"
            legend.append(Patch(fc=to_rgba(color, opacity), ec=color, label=label))
    _legend(ax, legend)
    return ax


def preset_sheet(slide_id: str, qualities: Mapping[str, SlideQuality]) -> Figure:
    """What tissue each preset finds on one slide.

    Args:
        slide_id: Name of the slide.
        qualities: What was found with each preset, by its name.

    Returns:
        A figure that is not open in pyplot.
    """
    height, width = next(iter(qualities.values())).thumbnail.shape[:2]
    columns = min(len(qualities), 3 if width <= 1.6 * height else 2)
    rows = -(-len(qualities) // columns)
    panel = _panel_size(height, width, 12.6 / columns, 5.0)
    size = (max(columns * panel[0] + 0.2, 4.2), rows * (panel[1] + 0.8) + 0.45)
    with house_style():
        figure = plt.figure(figsize=size)
        grid = figure.add_gridspec(
            rows, columns, left=0.01, right=0.99, top=1 - 0.85 / size[1], bottom=0.3 / size[1], wspace=0.04,
            hspace=0.8 / panel[1],
        )  # fmt: skip
        for i, (name, quality) in enumerate(qualities.items()):
            ax = figure.add_subplot(grid[i // columns, i % columns])
            _bare(quality.thumbnail, ax)
            _outline(quality.tissue, CONTOUR, ax)
            ax.imshow(_veil(quality.tissue), extent=_extent(quality.thumbnail), interpolation="nearest")
            share = f"{quality.tissue_share:.0%}, {quality.tissue_mm2:.2f} mm²"
            ax.set_title(f"{name}\n", fontsize=11, pad=2)
            ax.text(0, 1.01, f"tissue {share}; {quality.n_tiles:,} tiles", transform=ax.transAxes, fontsize=9)
            scale_bar(width * PATCH_MPP / 1000, ax)
        figure.suptitle(plain(slide_id), x=0.01, y=1 - 0.08 / size[1], ha="left", va="top", weight="bold")
    plt.close(figure)
    return figure


def scale_bar(width_mm: float, ax: Axes) -> Axes:
    """Draw a bar of a round length, a quarter of a picture of `width_mm` mm at most, below its left."""
    round_lengths = [k * 10.0**e for e in range(-3, 3) for k in (1, 2, 5)]
    length = max((mm for mm in round_lengths if mm <= 0.25 * width_mm), default=round_lengths[0])
    line = AuxTransformBox(ax.transData)
    line.add_artist(Rectangle((0, 0), length, 0, ec=INK, lw=3, fill=False, capstyle="butt"))
    text = f"{length:g} mm" if length >= 0.1 else f"{1000 * length:g} µm"
    label = TextArea(text, textprops={"fontsize": 9})
    bar = AnchoredOffsetbox(
        "upper left",
        child=HPacker(children=[line, label], align="center", pad=0, sep=6),
        pad=0.3,
        borderpad=0,
        frameon=False,
        bbox_to_anchor=(0, 0),
        bbox_transform=ax.transAxes,
    )
    ax.add_artist(bar)
    return ax


def _description(quality: SlideQuality) -> list[str]:
    """The lines of text under a contact sheet."""
    (w, h), mpp = quality.dimensions, quality.scale.mpp
    scale = f"{mpp[0]:.4g}" if abs(mpp[0] / mpp[1] - 1) < 1e-3 else f"{mpp[0]:.4g} x {mpp[1]:.4g}"
    lines = [
        f"{w:,} x {h:,} px, {quality.vendor}, {scale} µm/px ({quality.scale.source}).  "
        f"Tissue: {quality.tissue_share:.1%} of the scan.  Settings: {describe(quality.settings)}, tiles of "
        f"{TILE_UM:g} µm with {quality.settings.min_tissue:.0%} tissue.",
        *(f"! {warning}" for warning in quality.warnings),
    ]
    return [plain(part) for line in lines for part in textwrap.wrap(line, LINE, subsequent_indent="   ")]


def _panel_size(height: int, width: int, max_width: float, max_height: float) -> tuple[float, float]:
    """Size in inches of a picture of so many pixels within bounds."""
    scale = min(max_width / width, max_height / height)
    return max(width * scale, 1.5), max(height * scale, 1.2)


def _bare(thumbnail: np.ndarray, ax: Axes) -> None:
    slide_overview(thumbnail, PATCH_MPP, ax)
    ax.set(xlabel="", ylabel="", xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(visible=True, color=MUTED, linewidth=0.6)


def _outline(area: np.ndarray, color: str, ax: Axes) -> None:
    """Draw the outline of an area of the thumbnail, bool (H, W), closed at the rim."""
    padded = np.pad(area, 1)
    y, x = ((np.arange(n) - 0.5) * PATCH_MPP / 1000 for n in padded.shape)
    if area.any():
        ax.contour(x, y, padded, levels=[0.5], colors=[color], linewidths=1.1)


def _veil(tissue: np.ndarray) -> np.ndarray:
    """A gray veil over what is no tissue, RGBA (H, W, 4)."""
    veil = np.zeros((*tissue.shape, 4))
    veil[~tissue] = to_rgba("#5b6068", 0.28)
    return veil


def _extent(thumbnail: np.ndarray) -> tuple[float, float, float, float]:
    height, width = thumbnail.shape[:2]
    return 0, width * PATCH_MPP / 1000, height * PATCH_MPP / 1000, 0


def _legend(ax: Axes, handles: list[Patch]) -> None:
    if handles:
        ax.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=3, borderaxespad=0.1,
            columnspacing=1.2, handlelength=1.4,
        )  # fmt: skip
