"""Prediction of one slide, with its attention, selected tiles and times."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hdmil_lib.errors import HDMILError
from hdmil_lib.storage import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hdmil_lib.slides.reader import Slide
    from hdmil_lib.viz.viewer import Overlay, SlideViewer


@contextmanager
def stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time of the block to `seconds[name]`."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, eq=False)
class Prediction:
    """Prediction of one slide with N tiles and C classes; row i is the same tile in every array.

    Attributes:
        slide_id: Name of the slide.
        classes: Class names, in the order of the probabilities and branches.
        probabilities: Class probabilities, (C,).
        coords: Level-0 (x, y) of the tiles' top-left corners, int64 (N, 2).
        tile_size_level0: (width, height) of a tile in level-0 pixels.
        shape: (rows, cols) of the tile grid.
        rowcol: Position of the tiles on the grid, int64 (N, 2).
        attention: DMIN's attention logits, one column per branch, float32 (N, C); nan for tiles that were not
            read.
        mask: Tiles kept for each branch, bool (N, C): LIPN's selection of tiles to read or, if all tiles were
            read, DMIN's selection of tiles to pool.
        seconds: Wall time of each stage: thumbnail, lipn, look (of a model that has a second look), crop,
            features, dmin, and total.
        thumbnail: The slide at 8 um/px, uint8 (H, W, 3); composed of the patches for a bag.
        broken: Rows of tiles that could not be read, int64; the prediction is from the other tiles.
        tile_um: Side of a tile in um.
        slide_size: (width, height) of level 0 in pixels; None for a bag that does not say.
        bounds: The scanned part, (x, y, width, height) in level-0 pixels; None if it is the whole slide.
    """

    slide_id: str
    classes: tuple[str, ...]
    probabilities: np.ndarray
    coords: np.ndarray
    tile_size_level0: tuple[int, int]
    shape: tuple[int, int]
    rowcol: np.ndarray
    attention: np.ndarray
    mask: np.ndarray
    seconds: dict[str, float]
    thumbnail: np.ndarray
    broken: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    tile_um: float = 128.0
    slide_size: tuple[int, int] | None = None
    bounds: tuple[int, int, int, int] | None = None

    @property
    def n_tiles(self) -> int:
        """Number of tiles with tissue, N."""
        return len(self.coords)

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[int(self.probabilities.argmax())]

    @property
    def kept(self) -> np.ndarray:
        """Tiles kept for at least one branch, bool (N,)."""
        return np.asarray(self.mask.any(axis=1))

    @property
    def keep_ratio(self) -> float:
        """Share of the tiles kept for at least one branch."""
        return float(self.kept.mean())

    @property
    def read(self) -> np.ndarray:
        """Tiles that were read and encoded, bool (N,)."""
        return ~np.isnan(self.attention[:, 0])

    @property
    def n_read(self) -> int:
        """Number of tiles that were read and encoded."""
        return int(self.read.sum())

    def __repr__(self) -> str:
        ranked = ", ".join(f"{self.classes[c]} {self.probabilities[c]:.3f}" for c in self.ranking)
        return f"Prediction({self.slide_id!r}: {ranked}; {self.n_read:,} of {self.n_tiles:,} tiles read)"

    @property
    def ranking(self) -> np.ndarray:
        """Class indices by decreasing probability, (C,)."""
        return self.probabilities.argsort()[::-1]

    def to_row(self) -> dict[str, Any]:
        """The prediction as a row of a table, without arrays."""
        probabilities = {
            f"p_{name}": float(p) for name, p in zip(self.classes, self.probabilities, strict=True)
        }
        return {
            "slide_id": self.slide_id,
            "label": self.label,
            **probabilities,
            "n_tiles": self.n_tiles,
            "n_read": self.n_read,
            "n_broken": len(self.broken),
            "seconds": round(self.seconds["total"], 3),
        }

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw the attention of the predicted class beside the kept tiles.

        Args:
            path: File to write the figure to, whole or not at all; the figure is then closed to free memory.

        Returns:
            The figure.
        """
        import matplotlib.pyplot as plt

        from hdmil_lib.viz.overlays import prediction_figure

        figure = prediction_figure(self)
        if path is not None:
            path = Path(path)
            try:
                write_whole(path, lambda part: figure.savefig(part, dpi=150, format=path.suffix[1:]))
            finally:
                plt.close(figure)
        return figure

    def view(
        self, slide: "Slide | str | Path", overlays: "Mapping[str, np.ndarray | Overlay] | None" = None
    ) -> "SlideViewer":
        """Show the slide in a notebook, with attention for each class and the kept tiles drawn over it.

        Args:
            slide: The slide of this prediction, open or as a file.
            overlays: More to draw, by name: one value per tile, (N,).

        Returns:
            The viewer; its `close` frees what it holds.

        Raises:
            SlideError: The file is no slide.
            ValueError: An overlay has the wrong number of values.
            HDMILError: The packages for notebooks are not installed.
        """
        try:
            from hdmil_lib.viz.viewer import viewer_of
        except ModuleNotFoundError as error:
            raise HDMILError(f"{error.name} is missing; run `pip install 'hdmil[notebooks]'`") from error
        return viewer_of(self, slide, overlays)

    def to_geojson(self, path: str | Path, *, kept_only: bool = True) -> None:
        """Write tiles as GeoJSON polygons in level-0 pixels, which QuPath opens on the slide.

        Of slides that state a scanned part, such as MRXS, QuPath shows this part alone and counts pixels from
        its corner, and so do the polygons.

        Args:
            path: The .geojson file, written whole or not at all.
            kept_only: Whether dropped tiles are left out.
        """
        features = [self._polygon(i) for i in range(self.n_tiles) if self.kept[i] or not kept_only]
        content = json.dumps({"type": "FeatureCollection", "features": features})
        write_whole(Path(path), lambda part: part.write_text(content, encoding="utf-8"))

    def to_ome_tiff(self, path: str | Path) -> None:
        """Write attention and kept tiles as a pyramidal OME-TIFF over what QuPath shows of the slide.

        See `viz.heatmap.write_heatmap`.

        Raises:
            BagError: The prediction is from a bag that does not know the size of its slide.
        """
        from hdmil_lib.viz.heatmap import write_heatmap

        write_heatmap(self, Path(path))

    def _polygon(self, i: int) -> dict[str, Any]:
        (x, y), (width, height) = self.coords[i].tolist(), self.tile_size_level0
        if self.bounds is not None:
            x, y = x - self.bounds[0], y - self.bounds[1]
        ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        attention = {
            f"attention {name}": round(float(a), 4)
            for name, a in zip(self.classes, self.attention[i], strict=True)
            if np.isfinite(a)
        }
        return {
            "type": "Feature",
            "id": f"tile-{i}",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {
                "objectType": "tile",
                "classification": {"name": "kept" if self.kept[i] else "dropped"},
                "measurements": attention,
            },
        }
