"""Pictures of how a kernel uses a processor: the roofline, and which program owns which block."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from hdmil_lib.viz.style import BLUE, CYCLE, MUTED, PALE, VERMILION, axes_or_new, plain

if TYPE_CHECKING:  # drawing needs no operator: their import would take seconds
    from hdmil_lib.kernels.cost import Cost, Device


def roofline(costs: "Mapping[str, Cost]", device: "Device", ax: Axes | None = None) -> Axes:
    """Operations per second that a device can reach at each intensity, and where operators stand.

    An open dot is the textbook form with all its intermediate tensors, a filled dot the fused operator. All
    dots lie on the roof: they show what the arithmetic allows, not what was measured.
    """
    ax = axes_or_new(ax, (8, 4.2))
    x = np.geomspace(0.02, 3000, 200)
    for peak, name in ((device.vector_flops, "vector units"), (device.matrix_flops, "tensor cores")):
        ax.plot(x, np.minimum(x * device.bytes, peak) / 1e12, color=MUTED, lw=1)
        ax.text(x[-1], peak / 1e12 / 1.15, name, ha="right", va="top", color=MUTED, fontsize=9)
    for i, (name, cost) in enumerate(costs.items()):
        color, peak = CYCLE[i % len(CYCLE)], device.matrix_flops if cost.matrix else device.vector_flops
        lift = 2.2 * 1.75 ** (i % 3)  # neighbors at different heights above the roof
        for intensity, style in ((cost.flops / cost.eager_bytes, "white"), (cost.intensity, color)):
            y = min(intensity * device.bytes, peak) / 1e12
            ax.plot([intensity] * 2, [y, y * lift], color=color, lw=0.7)
            ax.plot(intensity, y, "o", mfc=style, mec=color, ms=7)
            ax.text(
                intensity,
                y * lift,
                str(i + 1),
                color=color,
                fontsize=9,
                weight="bold",
                ha="center",
                va="bottom",
                bbox={"fc": "white", "ec": "none", "pad": 0.5},
            )
        ax.plot([], [], "o", color=color, label=f"{i + 1}  {plain(name)}")
    ax.set(
        xscale="log", yscale="log", xlabel="operations per byte", ylabel="10¹² operations per second, at most"
    )
    ax.set_title(
        f"{plain(device.name)}: open = textbook form, filled = fused (arithmetic, not measured)", fontsize=10
    )
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return ax


def program_grid(
    rows: int,
    columns: int,
    block: tuple[int, int],
    ax: Axes | None = None,
    *,
    axes: tuple[str, str] = ("row", "column"),
) -> Axes:
    """The elements of a tensor, colored by the program that owns them; those that a mask must hide are gray.

    Args:
        rows: Number of rows of the tensor.
        columns: Number of columns of the tensor.
        block: Rows and columns of a block.
        ax: Axes to draw on.
        axes: Names of the rows' and the columns' axis.
    """
    ax = axes_or_new(ax, (6.4, 3))
    height, width = (-(-size // b) * b for size, b in zip((rows, columns), block, strict=True))
    down, across = np.indices((height, width))
    owner = (down // block[0] + across // block[1]) % 2
    owner[(down >= rows) | (across >= columns)] = 2
    ax.imshow(owner, cmap=ListedColormap([BLUE, "#8ec1e6", PALE]), vmin=0, vmax=2, aspect="auto")
    ax.axhline(rows - 0.5, color=VERMILION, lw=1)
    ax.axvline(columns - 0.5, color=VERMILION, lw=1)
    n_programs = height // block[0] * (width // block[1])
    idle = 1 - rows * columns / (height * width)
    ax.set(xlabel=plain(axes[1]), ylabel=plain(axes[0]))
    ax.set_title(f"{n_programs} programs; {idle:.0%} of their elements are masked (gray)", fontsize=10)
    ax.grid(False)
    return ax
