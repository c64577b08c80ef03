"""The viewer of a slide: what the widget shows, and what it answers to the browser."""

import base64
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import traitlets as t

from hdmil_lib.errors import SlideError
from hdmil_lib.slides.reader import Slide
from hdmil_lib.slides.tiling import TileGrid
from hdmil_lib.viz.viewer.deepzoom import (
    CACHE_BYTES,
    COARSEST,
    GRAY,
    SIDE,
    DeepZoom,
    DeepZoomTile,
    jpeg_bytes,
)
from hdmil_lib.viz.viewer.frames import static_frame
from hdmil_lib.viz.viewer.layers import Overlay, TilesOnSlide, png_bytes

if TYPE_CHECKING:
    from hdmil_lib.inference.prediction import Prediction

HERE = Path(__file__).parent
N_READERS = 2
PATCH_PX = 16


def _front_end() -> str:
    """The module that runs in the browser: OpenSeadragon in a function, and ours.

    OpenSeadragon looks for the module system of the page; the function gives it one of its own, so that no
    other takes it.
    """
    library = (HERE / "openseadragon.min.js").read_text(encoding="utf-8")
    own = (HERE / "widget.js").read_text(encoding="utf-8")
    start = "function loadOpenSeadragon() { const module = { exports: {} }, define = undefined;"
    return f"{start}\n{library}\nreturn OpenSeadragon; }}\n{own}"


class SlideViewer(anywidget.AnyWidget):
    """A slide to zoom and to move, with values per tile drawn over it.

    A click on a tile selects it and shows it at full resolution beside its patch of 16 x 16 pixels. Dragging
    with the shift key held draws a line around tiles and marks them; a click with the shift key held marks
    one. Where no widget can run, as in a notebook on GitHub, a picture of the slide with the overlay stands.

    Attributes:
        overlay: Name of the overlay that is drawn, or "" for none.
        opacity: Opacity of the overlay, 0 to 1.
        selected: Row of the selected tile, or None.
        region: Rows of the tiles that are marked, by a line around them or from Python.
        height: Height of the picture in pixels.
        tiles: The deep zoom tiles of the slide.
    """

    _esm = _front_end()

    overlay = t.Unicode("").tag(sync=True)
    opacity = t.Float(0.5, min=0, max=1).tag(sync=True)
    selected = t.Int(None, allow_none=True).tag(sync=True)
    region = t.List(t.Int()).tag(sync=True)
    height = t.Int(480, min=100).tag(sync=True)
    _about = t.Dict().tag(sync=True)
    _rowcol = t.Bytes(b"").tag(sync=True)
    _layers: t.List[Any] = t.List().tag(sync=True)
    _details = t.Dict().tag(sync=True)
    _closed = True

    def __init__(
        self,
        slide: Slide | str | Path,
        grid: TilesOnSlide | None = None,
        overlays: Mapping[str, np.ndarray | Overlay] | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
        **traits: Any,
    ):
        """Make a viewer.

        Args:
            slide: An open slide, which stays the caller's to close, or a file, which `close` closes.
            grid: The tiles of the slide, a `TileGrid`, a `Prediction` or a `Bag`; without them none can
                be selected.
            overlays: What can be drawn over the slide, by name; the first one is drawn at the start.
            cache_bytes: Most bytes of tiles that are kept in memory.
            **traits: Values of the traits above, such as `height=600`.

        Raises:
            SlideError: The file is no slide.
            ValueError: There are overlays without a grid, or one has the wrong number of values.
        """
        overlays = overlays or {}
        if overlays and grid is None:
            raise ValueError("overlays need the grid of the tiles; pass grid=TileGrid.from_slide(slide)")
        self._owns_slide = not isinstance(slide, Slide)
        self.slide = slide if isinstance(slide, Slide) else Slide(slide)
        self.grid = grid
        self.overlays = {
            name: one if isinstance(one, Overlay) else Overlay(one) for name, one in overlays.items()
        }
        known = grid.thumbnail if isinstance(grid, TileGrid) and grid.patch_mpp == 8.0 else None
        self.tiles = DeepZoom(self.slide, known, cache_bytes)
        self._pending: dict[tuple[int, int, int], Future[None]] = {}
        self._lock = Lock()
        self._readers = ThreadPoolExecutor(N_READERS, thread_name_prefix="slide-viewer")
        traits = {"overlay": next(iter(overlays), "")} | traits
        super().__init__(**traits, **self._state())
        self._closed = False
        self.on_msg(self._receive)
        self.observe(lambda _change: self._show_details(), names=["selected"])
        self._show_details()

    @property
    def n_tiles(self) -> int:
        """Number of tiles of the grid."""
        return 0 if self.grid is None else len(self.grid.rowcol)

    def __repr__(self) -> str:
        return f"SlideViewer({self.slide.name!r}, {self.n_tiles:,} tiles)"

    def close(self) -> None:
        """Remove the viewer from the page, end its threads and free its tiles.

        The slide is closed too if the viewer opened it.
        """
        if self._closed:
            return
        self._closed = True
        self._readers.shutdown(wait=True, cancel_futures=True)
        super().close()
        self.tiles.clear()
        if self._owns_slide:
            self.slide.close()

    def set_overlay(self, name: str, values: np.ndarray | Overlay) -> None:
        """Add an overlay, or change the values of one, as a slider does that moves a threshold.

        Args:
            name: Its name; set the trait `overlay` to it to draw it.
            values: One value per tile, (N,), or an `Overlay`.

        Raises:
            ValueError: The viewer has no grid, or these are not values of its tiles.
        """
        if self.grid is None:
            raise ValueError(
                f"overlays need the grid of the tiles; make the viewer with grid=, then set {name!r}"
            )
        overlay = values if isinstance(values, Overlay) else Overlay(values)
        layers = {layer["name"]: layer for layer in self._layers} | {name: self._layer(name, overlay)}
        self.overlays[name] = overlay
        self._layers = list(layers.values())
        self._show_details()

    def drop_overlay(self, name: str) -> None:
        """Remove an overlay, if there is one of this name."""
        if self.overlay == name:
            self.overlay = ""
        self.overlays.pop(name, None)
        self._layers = [layer for layer in self._layers if layer["name"] != name]
        self._show_details()

    def frame(self, longest: int = 480) -> bytes:
        """The slide with the overlay, the marked tiles and a scale bar as PNG, for places without widgets.

        Args:
            longest: Longer side of the picture in pixels.
        """
        picture = self.tiles.overview(longest)
        scale = picture.width / self.tiles.width
        return static_frame(
            picture,
            mpp=self.tiles.mpp / scale,
            layer=self._layer_on(self.overlay, scale),
            opacity=self.opacity,
            marked=[self._box(row, scale) for row in self.region],
            selected=None if self.selected is None else self._box(self.selected, scale),
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle
        return data | {"image/png": base64.b64encode(self.frame()).decode()}, metadata

    # What is sent once

    def _state(self) -> dict[str, Any]:
        tiles = self.tiles
        about = {
            "name": self.slide.name,
            "width": tiles.width,
            "height": tiles.height,
            "side": SIDE,
            "min_level": min(COARSEST, tiles.max_level),
            "max_level": tiles.max_level,
            "mpp": tiles.mpp,
            "pitch": self._pitch(),
            "shape": [0, 0] if self.grid is None else list(self.grid.shape),
        }
        rowcol = b"" if self.grid is None else self.grid.rowcol.astype("<i4").tobytes()
        return {
            "_about": about,
            "_rowcol": rowcol,
            "_layers": [self._layer(*item) for item in self.overlays.items()],
        }

    def _layer(self, name: str, overlay: Overlay) -> dict[str, Any]:
        assert self.grid is not None
        image = overlay.image(self.grid)
        return {
            "name": name,
            "png": png_bytes(image),
            "size": self._extent(overlay, image),
            "legend": overlay.legend(),
        }

    def _pitch(self) -> float:
        """Side of a tile in pixels of the viewer."""
        return 1.0 if self.grid is None else self.grid.tile_um / self.tiles.mpp

    def _extent(self, overlay: Overlay, image: np.ndarray) -> tuple[float, float]:
        """(width, height) of an overlay in pixels of the viewer."""
        height, width = image.shape[:2]
        cell = self._pitch() / (PATCH_PX if overlay.kind == "mask" else 1)
        return width * cell, height * cell

    def _layer_on(self, name: str, scale: float) -> tuple[np.ndarray, tuple[int, int]] | None:
        """An overlay and its (width, height) in pixels of a picture of this scale."""
        if not name or self.grid is None:
            return None
        overlay = self.overlays[name]
        image = overlay.image(self.grid)
        width, height = self._extent(overlay, image)
        return image, (round(width * scale), round(height * scale))

    def _box(self, row: int, scale: float) -> tuple[float, float, float, float]:
        """Left, top, right and lower edge of a tile in pixels of a picture of this scale."""
        assert self.grid is not None
        side = self._pitch() * scale
        y, x = self.grid.rowcol[row].tolist()
        return x * side, y * side, (x + 1) * side, (y + 1) * side

    # Checks of what is set

    @t.validate("overlay")
    def _known_overlay(self, proposal: Any) -> str:
        name = proposal["value"]
        if name and name not in self.overlays:
            raise t.TraitError(f"there is no overlay {name!r}, only {', '.join(self.overlays) or 'none'}")
        return str(name)

    @t.validate("selected")
    def _known_row(self, proposal: Any) -> int | None:
        row = proposal["value"]
        if row is not None and not 0 <= row < self.n_tiles:
            raise t.TraitError(f"there is no tile {row}; rows are 0 to {self.n_tiles - 1}")
        return row

    @t.validate("region")
    def _known_rows(self, proposal: Any) -> list[int]:
        rows = list(proposal["value"])
        if any(not 0 <= row < self.n_tiles for row in rows):
            raise t.TraitError(f"a region has rows from 0 to {self.n_tiles - 1}")
        return rows

    # Answers to the browser

    def _receive(self, _widget: object, message: dict[str, Any], _buffers: object) -> None:
        """Take a request for a tile, or the word that it is no longer in view."""
        key = (int(message["level"]), int(message["x"]), int(message["y"]))
        with self._lock:
            if self._closed:
                return
            if message["kind"] == "drop":
                waiting = self._pending.pop(key, None)
                if waiting is not None:
                    waiting.cancel()
            elif message["kind"] == "tile":
                self._pending[key] = self._readers.submit(self._answer, key)

    def _answer(self, key: tuple[int, int, int]) -> None:
        """Read a tile and send it; whatever goes wrong is sent too, since there is no cell to show it."""
        try:
            tile = self.tiles.tile(*key)
        except Exception as error:
            gray = jpeg_bytes(np.full((SIDE, SIDE, 3), GRAY, np.uint8))
            tile = DeepZoomTile(gray, str(error) or type(error).__name__)
        with self._lock:
            self._pending.pop(key, None)
        level, x, y = key
        self.send({"kind": "tile", "level": level, "x": x, "y": y, "error": tile.error}, [tile.jpeg])

    def _show_details(self) -> None:
        """Send what stands beside the slide: the selected tile, its patch and its values."""
        if self.selected is None or self.grid is None:
            self._details = {}
            return
        row = self.selected
        (y, x), error = self.grid.rowcol[row].tolist(), ""
        (left, top), side_um = self.grid.coords[row].tolist(), self.grid.tile_um
        try:
            tile = self.slide.read_field(left, top, (SIDE, SIDE), side_um / SIDE)
        except SlideError as damage:
            tile, error = np.full((SIDE, SIDE, 3), GRAY, np.uint8), str(damage)
        patch = self.grid.thumbnail[PATCH_PX * y : PATCH_PX * (y + 1), PATCH_PX * x : PATCH_PX * (x + 1)]
        values = [(name, *one.describe(row)) for name, one in self.overlays.items() if one.kind != "mask"]
        self._details = {
            "title": f"tile {row:,} of {self.n_tiles:,}, {side_um:g} µm wide",
            "place": f"row {y}, column {x} of the grid",
            "tile": jpeg_bytes(tile),
            "patch": png_bytes(patch),
            "values": values,
            "error": error,
        }


def viewer_of(
    prediction: "Prediction",
    slide: Slide | str | Path,
    overlays: Mapping[str, np.ndarray | Overlay] | None = None,
    **traits: Any,
) -> SlideViewer:
    """A viewer of a predicted slide: attention for each class, the most probable first, and the kept tiles.

    Args:
        prediction: The prediction.
        slide: Its slide, open or as a file.
        overlays: More overlays by name, such as the truth.
        **traits: Values of the traits of `SlideViewer`.

    Raises:
        SlideError: The file is no slide.
        ValueError: An overlay has the wrong number of values.
    """
    own: dict[str, np.ndarray | Overlay] = {
        f"attention, {prediction.classes[c]}": Overlay(prediction.attention[:, c], "rank")
        for c in prediction.ranking
    }
    own["kept tiles"] = Overlay(prediction.kept, "kept")
    return SlideViewer(slide, prediction, own | dict(overlays or {}), **traits)
