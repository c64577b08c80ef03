"""Overlays: one small picture per layer, a pixel per tile, which the browser draws over the slide."""

import io
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from hdmil_lib.viz.overlays import DROPPED, OnGrid
from hdmil_lib.viz.style import SEQUENTIAL, VERMILION

Kind = Literal["rank", "value", "kept", "share", "mask"]
GRAY = tuple(round(255 * channel) for channel in DROPPED[:3])


class TilesOnSlide(OnGrid, Protocol):
    """Tiles of a slide: a `TileGrid`, a `Prediction` or a `Bag`."""

    @property
    def coords(self) -> np.ndarray:
        """Level-0 (x, y) of the tiles, int64 (N, 2)."""


@dataclass(frozen=True, eq=False)
class Overlay:
    """Values to draw over a slide, and how.

    Attributes:
        values: One value per tile, (N,), or a tissue mask of the thumbnail, bool (H, W).
        kind: "rank" colors finite numbers by their rank among the tiles, "value" by their size; "kept" grays
            out tiles that are False; "share" draws shares of tumor from 0 to 1 in the color of the truth;
            "mask" grays out what is no tissue. None takes what suits the values: "mask" for two axes, "kept"
            for truth values, else "rank".
    """

    values: np.ndarray
    kind: Kind | None = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values)
        guess: Kind = "mask" if values.ndim == 2 else "kept" if values.dtype == bool else "rank"
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "kind", self.kind or guess)

    def colors(self) -> np.ndarray:
        """Color of each value, uint8 (N, 4) or (H, W, 4), transparent where nothing is drawn."""
        if self.kind in ("kept", "mask"):
            colors = np.zeros((*self.values.shape, 4), np.uint8)
            colors[~self.values.astype(bool)] = (*GRAY, 255)
            return colors
        if self.kind == "share":
            alpha = np.where(self.values > 0, 0.3 + 0.7 * self.values, 0)
            return _bytes(np.column_stack([np.tile(to_rgb(VERMILION), (len(alpha), 1)), alpha]))
        known, scaled = np.isfinite(self.values), self._scaled()
        colors = plt.get_cmap(SEQUENTIAL)(np.nan_to_num(scaled))
        colors[:, 3] = known
        return _bytes(colors)

    def image(self, tiles: TilesOnSlide) -> np.ndarray:
        """The overlay as a picture, uint8 (rows, cols, 4), or (H, W, 4) of a mask.

        Raises:
            ValueError: The values are not those of these tiles.
        """
        wanted = tiles.thumbnail.shape[:2] if self.kind == "mask" else (len(tiles.rowcol),)
        if self.values.shape != wanted:
            raise ValueError(f"an overlay has values of shape {self.values.shape}, but {wanted} is needed")
        if self.kind == "mask":
            return self.colors()
        picture = np.zeros((*tiles.shape, 4), np.uint8)
        picture[tiles.rowcol[:, 0], tiles.rowcol[:, 1]] = self.colors()
        return picture

    def legend(self) -> dict[str, Any]:
        """Colors of the legend as CSS has them, and the texts beside them."""
        if self.kind in ("kept", "mask"):
            return {
                "colors": [to_hex(DROPPED)],
                "low": "",
                "high": "dropped" if self.kind == "kept" else "no tissue",
            }
        if self.kind == "share":
            return {"colors": [VERMILION], "low": "", "high": "tumor, denser: a larger share"}
        colors = [to_hex(color) for color in plt.get_cmap(SEQUENTIAL)(np.linspace(0, 1, 9))]
        low, high = ("lowest", "highest") if self.kind == "rank" else (f"{v:.3g}" for v in self._limits())
        return {"colors": colors, "low": low, "high": high}

    def describe(self, row: int) -> tuple[str, str]:
        """The value of a tile and its rank, 1 for the highest, as texts; empty where there is none."""
        if self.kind == "mask":
            return "", ""
        value = self.values[row]
        if self.kind == "kept":
            return "kept" if value else "dropped", ""
        if not np.isfinite(value):
            return "not read", ""
        rank = f"{1 + np.sum(self.values > value):,} of {np.isfinite(self.values).sum():,}"
        return f"{value:.0%}" if self.kind == "share" else f"{value:.3g}", rank

    def _limits(self) -> tuple[float, float]:
        known = self.values[np.isfinite(self.values)]
        return (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)

    def _scaled(self) -> np.ndarray:
        """Values from 0 to 1, nan where there is none."""
        known = np.isfinite(self.values)
        if self.kind == "value":
            low, high = self._limits()
            return (self.values - low) / ((high - low) or 1.0)
        scaled = np.full(self.values.shape, np.nan)
        scaled[known] = self.values[known].argsort().argsort() / max(known.sum() - 1, 1)
        return scaled


def _bytes(colors: np.ndarray) -> np.ndarray:
    return np.rint(255 * colors).astype(np.uint8)


def png_bytes(pixels: np.ndarray) -> bytes:
    """Pixels, uint8 (h, w, 3) or (h, w, 4), as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
