"""Measure the time to read a tile from stored tiles, with OpenSlide, and with the decoder alone.

    python benchmarks/bench_reading.py [--slide FILE ...] [--repeats N]

The times are CPU time of one thread in milliseconds per tile of 256 x 256 pixels. The methods take turns on
the same tiles of a slide:

- `read_region` of OpenSlide,
- `Slide.read_field` from stored tiles, none of which was decoded before,
- the decoder alone, once on each stored tile under these fields, which is the limit of any reader,
- `Slide.read_field` with a decoder that does nothing: Python, and the copies of pixels, during which other
  threads run,
- what the host does where a GPU decodes (`TilesOnDevice`): finding and reading the stored tiles, in blocks of
  256 fields. The decoder is one whose tiles have no pixels. Not in it are nvImageCodec's own part on the
  host, and the launches of some twenty operators per 64 fields, which put these together.

"DICOM" compares `Slide.read_field` of a series with JPEG frames and of a TIFF file with tiles of the same
size and quality, made of the pixels of the real sample slide, and OpenSlide on the same series.

The slide is opened within the time, except for the decoder. The fields have the scale of the slide; they lie
once on the grid of stored tiles and once off it.
First it is checked that both readers give equal pixels. By default a synthetic slide is read. The results
are written to `benchmarks/results/reading.json`.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import numpy as np
import openslide
import tifffile
import torch

from hdmil_lib.config import setup
from hdmil_lib.slides import Slide, device_tiles
from hdmil_lib.slides.device_tiles import TilesOnDevice
from hdmil_lib.slides.sample import sample_slide
from hdmil_lib.slides.stored_tiles import StoredTiles
from hdmil_lib.synthetic.cohorts import large_slides

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # for `dicom_factory`
RESULTS = Path(__file__).resolve().parent / "results" / "reading.json"
TILE, MOST, BLOCK = 256, 1_000, 256


class NoGPU:
    """A decoder whose tiles have a shape and no pixels."""

    device = torch.device("meta")

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def decode(self, streams: Sequence[bytes]) -> list[torch.Tensor]:
        return [torch.empty(self.shape, dtype=torch.uint8, device=self.device) for _ in streams]


def cpu_ms(read: Callable[[], Iterable], n_tiles: int) -> float:
    start = time.process_time()
    for _ in read():
        pass
    return 1e3 * (time.process_time() - start) / n_tiles


def block_of_tiles(side: int) -> np.ndarray:
    """Memory with huge pages, such as `StoredTiles` and `encode_blocks` use."""
    return np.ones((64, side, side, 3), np.uint8)


def measure(path: Path, offset: int, repeats: int) -> dict[str, float]:
    """Median times for fields that start `offset` pixels off the grid of stored tiles."""
    with Slide(path, reader="stored") as slide:
        width, height = slide.dimensions
        mpp = slide.mpp[0]
        page = slide._stored.levels[0].page
        side = page.tilewidth
    xs, ys = range(offset, width - TILE, TILE), range(offset, height - TILE, TILE)
    n_rows = min(len(ys), max(1, MOST // len(xs)))
    corners = [(x, y) for y in ys[:n_rows] for x in xs]
    fields, decoded = block_of_tiles(TILE), block_of_tiles(side)

    def by_openslide():
        with openslide.OpenSlide(path) as reference:
            for corner in corners:
                yield np.asarray(reference.read_region(corner, 0, (TILE, TILE)).convert("RGB"))

    def by_stored():
        with Slide(path, (mpp, mpp), reader="stored") as slide:
            for (x, y), field in zip(corners, cycle(fields), strict=False):
                yield slide.read_field(x, y, (TILE, TILE), mpp, field)

    def by_python():
        with Slide(path, (mpp, mpp), reader="stored") as slide:
            level = replace(slide._stored.levels[0], decode=lambda data, out: None)
            slide._stored.levels = [level, *slide._stored.levels[1:]]
            for (x, y), field in zip(corners, cycle(fields), strict=False):
                yield slide.read_field(x, y, (TILE, TILE), mpp, field)

    def by_decoder():
        tiles = StoredTiles.open(path, [(width, height)])
        under = {
            row * tiles.levels[0].columns + column
            for x, y in corners
            for row in range(y // side, -(-(y + TILE) // side))
            for column in range(x // side, -(-(x + TILE) // side))
        }
        for index, memory in zip(sorted(under), cycle(decoded), strict=False):
            yield tiles._decode(0, index, memory)
        tiles.close()

    def by_gpu_host():
        stored = StoredTiles.open(path, [(width, height)])
        reader = TilesOnDevice(stored, NoGPU(stored.levels[0].shape))
        nothing = torch.empty(0, device=NoGPU.device)
        with patch.object(device_tiles, "_put_together", lambda *_: nothing):
            for first in range(0, len(corners), BLOCK):
                yield reader.read(0, np.array(corners[first : first + BLOCK]), (TILE, TILE))
        stored.close()

    for mine, reference in zip(by_stored(), by_openslide(), strict=True):
        if not (mine == reference).all():
            raise SystemExit(f"{path}: the readers give different pixels")
    ways = {
        "openslide": by_openslide,
        "stored": by_stored,
        "decoder": by_decoder,
        "python": by_python,
        "gpu's host": by_gpu_host,
    }
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(cpu_ms(way, len(corners)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "tiles": len(corners),
        **{f"{name}, ms": round(value, 3) for name, value in medians.items()},
        "openslide / stored": round(medians["openslide"] / medians["stored"], 2),
        "stored / decoder": round(medians["stored"] / medians["decoder"], 2),
    }


def measure_dicom(offset: int, repeats: int) -> dict[str, float]:
    """Median times on a DICOM series, and on a TIFF file of the same tiles."""
    from dicom_factory import write_series

    with Slide(sample_slide()) as slide:
        mpp = slide.mpp[0]
        pixels = np.tile(slide.read_field(0, 0, slide.dimensions, mpp), (2, 2, 1))
    height, width, _ = pixels.shape
    corners = [(x, y) for y in range(offset, height - TILE, TILE) for x in range(offset, width - TILE, TILE)]
    with tempfile.TemporaryDirectory() as folder:
        (series,) = write_series(Path(folder) / "series", pixels, mpp, tile=256, jpeg=True, n_levels=1)
        tiff, per_cm = Path(folder) / "a.tif", 1e4 / mpp
        options = {"compression": "jpeg", "compressionargs": {"level": 85}, "subsampling": (2, 1)}
        options |= {"resolution": (per_cm, per_cm), "resolutionunit": "centimeter"}
        tifffile.imwrite(tiff, pixels, tile=(256, 256), photometric="ycbcr", **options)

        def read(path: Path, reader: str) -> Iterable[np.ndarray]:
            with Slide(path, (mpp, mpp), reader=reader) as slide:
                for x, y in corners:
                    yield slide.read_field(x, y, (TILE, TILE), mpp)

        ways = {
            "series, frames": lambda: read(series, "auto"),
            "series, openslide": lambda: read(series, "openslide"),
            "TIFF, stored": lambda: read(tiff, "stored"),
        }
        for mine, reference in zip(*(ways[name]() for name in list(ways)[:2]), strict=True):
            if not (mine == reference).all():
                raise SystemExit("the readers of the series give different pixels")
        times = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                times[name].append(cpu_ms(way, len(corners)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "tiles": len(corners),
        **{f"{name}, ms": round(value, 3) for name, value in medians.items()},
        "frames / stored": round(medians["series, frames"] / medians["TIFF, stored"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--slide", type=Path, nargs="+", default=[], help="further slides, after the synthetic one"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    setup()
    slides = {"synthetic, JPEG tiles of 256": large_slides("camelyon-mini", 1, 8_192)[0]}
    slides |= {path.name: path for path in args.slide}
    rows = {}
    for name, path in slides.items():
        for kind, offset in (("on the grid", 0), ("off the grid", 100)):
            rows[f"{name}, {kind}"] = measure(path, offset, args.repeats)
            print(name, kind, rows[f"{name}, {kind}"], flush=True)
    places = (("on the grid", 0), ("off the grid", 100))
    dicom = {kind: measure_dicom(offset, args.repeats) for kind, offset in places}
    print("DICOM", dicom)
    result = {
        "device": f"{platform.machine()} CPU, one thread",
        "load_average": round(os.getloadavg()[0], 1),
        "repeats": args.repeats,
        "slides": rows,
        "DICOM": dicom,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
