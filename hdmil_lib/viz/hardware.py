"""Pictures of how a kernel uses a processor: the roofline, blocks, memory transactions, measured times."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hdmil_lib.viz.style import BLUE, CYCLE, GREEN, INK, MUTED, ORANGE, PALE, VERMILION, axes_or_new, plain

if TYPE_CHECKING:  # drawing needs no operator: their import would take seconds
    from hdmil_lib.kernels.cost import Cost, Device
    from hdmil_lib.kernels.recording import Recording

SECTOR = 32
"""Bytes of the smallest piece of memory that a GPU reads: a sector of a cache line."""

WARP, FLOAT32 = 32, 4
"""Threads that load together, and bytes of a number."""

REGISTERS, MAX_WARPS = 65_536, 64
"""Registers of a processor, and the warps that it can hold, on GPUs of the kind sm_90 (H100, H200)."""


def roofline(
    costs: "Mapping[str, Cost]",
    device: "Device",
    ax: Axes | None = None,
    *,
    seconds: Mapping[str, float] | None = None,
) -> Axes:
    """Operations per second that a device can reach at each intensity, and where operators stand.

    An open dot is the textbook form with all its intermediate tensors, a filled dot the fused operator. These
    dots lie on the roof: they show what the arithmetic allows. A cross is what a fused operator reached.

    Args:
        costs: Calculated cost of each operator, by its name.
        device: The processor.
        ax: Axes to draw on.
        seconds: Measured time of fused operators in seconds, by the names in `costs`.
    """
    seconds = seconds or {}
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
        if name in seconds:
            reached = cost.flops / seconds[name] / 1e12
            ax.plot(cost.intensity, reached, "X", color=color, mec="white", ms=9)
        ax.plot([], [], "o", color=color, label=f"{i + 1}  {plain(name)}")
    ax.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="10¹² operations per second")
    measured = "cross = measured" if seconds else "not measured"
    ax.set_title(
        f"{plain(device.name)}: open = textbook form, filled = fused (both calculated), {measured}",
        fontsize=10,
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


def sectors(stride: int) -> int:
    """Number of sectors that a warp touches when thread i loads the float32 with index i * stride."""
    return len({i * stride * FLOAT32 // SECTOR for i in range(WARP)})


def coalescing(strides: Sequence[int] = (1, 2, 13), ax: Axes | None = None) -> Axes:
    """What one load of a warp brings from memory, for several distances between the numbers of its threads.

    Every square is a float32 in memory. Blue ones are asked for; pale ones share a sector with them and are
    moved without being asked for. White ones stay where they are.

    Args:
        strides: Distances between the numbers of neighboring threads, in numbers; each becomes a row.
        ax: Axes to draw on.
    """
    ax = axes_or_new(ax, (9, 0.55 * len(strides) + 1.1))
    per_sector, shown = SECTOR // FLOAT32, 128
    picture = np.zeros((len(strides), shown))
    labels = []
    for row, stride in enumerate(strides):
        asked = np.arange(WARP) * stride
        moved = (asked // per_sector)[:, None] * per_sector + np.arange(per_sector)
        picture[row, moved[moved < shown]] = 1
        picture[row, asked[asked < shown]] = 2
        useful = WARP * FLOAT32 / (sectors(stride) * SECTOR)
        labels.append(f"stride {stride}: {sectors(stride) * SECTOR:,} B moved, {useful:.0%} used")
    ax.imshow(picture, cmap=ListedColormap(["white", "#cfe3f3", BLUE]), vmin=0, vmax=2, aspect="auto")
    ax.set_yticks(range(len(strides)), labels)
    ax.set_xticks(np.arange(0, shown + 1, per_sector) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(strides) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=1.5)
    ax.tick_params(which="both", length=0)
    ax.set(xlabel=f"index of the number in memory (the first {shown}); lines separate sectors of {SECTOR} B")
    return ax


def resident_warps(registers: int, warps: int) -> int:
    """Number of warps that fit on a processor (of 64) if a program has `warps` of them.

    Registers are handed out to a warp in pieces of 256, which is 8 per thread.

    Args:
        registers: Registers per thread, at most 255.
        warps: Warps of a program.
    """
    per_warp = -(-registers // 8) * 8 * WARP
    return min(MAX_WARPS, REGISTERS // per_warp) // warps * warps


def occupancy(registers: Mapping[str, int], ax: Axes | None = None, *, warps: int = 4) -> Axes:
    """How many warps a processor can hold at each number of registers per thread, and where kernels stand.

    Args:
        registers: Registers per thread of each kernel, by its name.
        ax: Axes to draw on.
        warps: Warps of a program.
    """
    ax = axes_or_new(ax, (8, 3))
    x = np.arange(16, 256)
    ax.step(x, [resident_warps(int(r), warps) for r in x], where="post", color=MUTED, lw=1.5)
    for color, (name, used) in zip(CYCLE, registers.items(), strict=False):
        held = resident_warps(used, warps)
        ax.plot(used, held, "o", color=color, ms=9, label=f"{plain(name)}: {used} registers, {held} warps")
    ax.set(xlabel="registers per thread", ylabel=f"warps, of {MAX_WARPS}", xlim=(16, 256), ylim=(0, 68))
    ax.set_yticks(range(0, MAX_WARPS + 1, 16))
    ax.legend()
    return ax


def gpu_times(times: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Milliseconds of operators on a GPU: what the roof allows, kernel and formula, and whole calls.

    Args:
        times: Indexed by operator; columns `roof`, `kernel` and `formula` (milliseconds in which the GPU is
            busy) and `call of the kernel` (milliseconds of a call, the host's part included). nan is left
            out.
        ax: Axes to draw on; the times have a logarithmic axis.
    """
    ax = axes_or_new(ax, (8.4, 0.42 * len(times) + 1.2))
    rows = np.arange(len(times))
    looks: dict[str, dict[str, Any]] = {
        "roof": {"marker": "|", "color": INK, "ms": 15, "mew": 2.5},
        "kernel": {"marker": "o", "color": BLUE, "ms": 8, "zorder": 3},
        "formula": {"marker": "o", "mfc": "white", "color": INK, "ms": 8},
        "call of the kernel": {"marker": "x", "color": ORANGE, "ms": 13, "mew": 2, "zorder": 2},
    }
    ax.hlines(rows, times.min(axis=1), times.max(axis=1), color=PALE, lw=5, zorder=0)
    for name, look in looks.items():
        label = name if name in ("roof", "call of the kernel") else f"GPU busy, {name}"
        ax.plot(times[name], rows, ls="none", label=label, **look)
    ax.set_yticks(rows, [plain(name) for name in times.index])
    ax.set(xscale="log", xlabel="milliseconds", ylim=(len(times) - 0.5, -0.5))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)
    return ax


LANES = {"load": BLUE, "store": GREEN, "masked": "#c9ced6", "outside": VERMILION}
"""Colors of the lanes of a block: loaded, stored, kept from memory by the mask, beyond the tensor."""


def memory_accesses(
    recording: "Recording", argument: str, kind: Literal["load", "store"], ax: Axes | None = None
) -> Axes:
    """Each load or store of one tensor as a row of squares, one square per element of memory.

    Colored squares are loaded or stored, gray ones are lanes that the mask kept from memory, and vermilion
    ones lie beyond the tensor though the mask let them through. The vertical line is the end of the tensor;
    thin lines separate its rows.

    Args:
        recording: What `hdmil_lib.kernels.recording.record` returned.
        argument: Name of the kernel's argument.
        kind: "load" or "store".
        ax: Axes to draw on.
    """
    accesses = recording.of(argument, kind)
    shape = recording.shapes[argument]
    size = int(np.prod(shape))
    last = max([size - 1, *(int(access.index.max()) for access in accesses)])
    ax = axes_or_new(ax, (0.5 + 0.16 * (last + 1), 0.5 + 0.22 * max(len(accesses), 1)))
    picture = np.zeros((max(len(accesses), 1), last + 1))
    for row, access in enumerate(accesses):
        for value, lanes in enumerate((~access.active, access.active, access.outside), 1):
            shown = access.index[lanes & (access.index >= 0)]
            picture[row, shown] = np.maximum(picture[row, shown], value)
    colors = ListedColormap(["white", LANES["masked"], LANES[kind], LANES["outside"]])
    ax.imshow(picture, cmap=colors, vmin=0, vmax=3, aspect="auto")
    ax.set_xticks(np.arange(last + 2) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(picture) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color=PALE, lw=1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for edge in range(shape[-1], size, shape[-1]) if len(shape) > 1 else ():
        ax.axvline(edge - 0.5, color=MUTED, lw=0.8)
    ax.axvline(size - 0.5, color=INK, lw=1.8)
    ax.set_yticks(range(len(accesses)), [f"program {access.program}" for access in accesses])
    ax.tick_params(which="both", length=0, labelsize=8)
    ax.set_title(plain(f"{argument}: {kind}s"), fontsize=9)
    ax.set_xlabel("position in memory", fontsize=8)
    return ax


def loads_and_stores(recording: "Recording", arguments: Sequence[str] = ()) -> Figure:
    """All loads and stores of a launch, one panel per tensor and direction.

    Args:
        recording: What `hdmil_lib.kernels.recording.record` returned.
        arguments: Tensors to show; by default all that were touched.
    """
    panels: list[tuple[str, Literal["load", "store"], int]] = []
    for argument in arguments or recording.shapes:
        for kind in ("load", "store"):
            if rows := len(recording.of(argument, kind)):
                panels.append((argument, kind, rows))
    heights = [0.55 + 0.2 * rows for _, _, rows in panels]
    figure = plt.figure(figsize=(8.4, 0.4 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False, sharex=True)[:, 0]
    for (argument, kind, _), ax in zip(panels, axes, strict=True):
        widest = max(ax.get_xlim()[1], memory_accesses(recording, argument, kind, ax).get_xlim()[1])
        ax.set(xlim=(-0.5, widest), xlabel="")
        ax.tick_params(labelbottom=True)
    axes[-1].set_xticks(np.arange(-0.5, axes[-1].get_xlim()[1] + 1), minor=True)  # for all, since x is shared
    axes[-1].set_xlabel("position in memory", fontsize=8)
    handles = [Patch(color=color, label=name) for name, color in LANES.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=8)
    return figure
