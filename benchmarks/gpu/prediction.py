"""Prediction on a GPU: the encoder's tiles per second, and a slide from its file to the answer by stage."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.cases import MODEL
from gpu.operators import describe

from hdmil_lib.encoders.loading import Encoder, load_encoder
from hdmil_lib.models import HDMIL
from hdmil_lib.reproduce.timing import STAGES
from hdmil_lib.synthetic.cohorts import large_slides

PRECISIONS = ("fp32", "bf16")


def measure(
    side: int, device: torch.device, batches: int, repeats: int
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Functions that each measure the encoder, or a way to classify a synthetic slide.

    Args:
        side: Width and height of the slide, in pixels.
        device: Where networks and encoder run.
        batches: Number of the encoder's batches.
        repeats: Number of runs of which the median is taken.
    """
    slide = large_slides("camelyon-mini", 1, side, mpp=0.5)[0]
    slide.read_bytes()  # so that the system holds it in memory
    for precision in PRECISIONS:
        for decoder in ("cpu", "auto"):
            encoder = load_encoder(device=device, engine="torch", precision=precision, decoder=decoder)
            if decoder == "cpu":
                yield partial(encoder_row, encoder, precision, batches)
            elif encoder.decoder == "cpu":
                continue  # no other decoder is installed
            model = HDMIL.from_pretrained(MODEL).to(device)
            model.encoder = encoder
            for all_tiles in (True, False):
                yield partial(slide_row, model, slide, precision, all_tiles, repeats)


def encoder_row(encoder: Encoder, precision: str, batches: int) -> list[dict[str, Any]]:
    """Tiles per second from the host's memory to features there."""
    found = {"what": "encoder", "encoder": encoder.name, "precision": precision}
    try:
        size = encoder.batch_size if batches > 1 else 2
        tiles = np.random.default_rng(0).integers(0, 256, (size, 256, 256, 3), np.uint8)
        encoder(tiles)
        start = time.perf_counter()
        for _ in range(batches):
            encoder(tiles)
        seconds = time.perf_counter() - start
        found |= {"batch": size, "tiles_per_s": float(f"{batches * size / seconds:.4g}")}
    except Exception as error:  # any error concerns this row only
        found["error"] = describe(error)
    return [found]


def slide_row(
    model: HDMIL, slide: Path, precision: str, all_tiles: bool, repeats: int
) -> list[dict[str, Any]]:
    """Milliseconds per tile of the slide: as in use, and of each stage when they do not overlap."""
    found: dict[str, Any] = {
        "what": "HDMIL†" if all_tiles else "HDMIL",
        "precision": precision,
        "decoder": model.encoder.decoder,
    }
    try:
        predict = partial(model.predict, slide, all_tiles=all_tiles, device=model.device)
        first = predict()
        ms = 1e3 / first.n_tiles
        in_use = [predict().seconds["total"] for _ in range(repeats)]
        apart = [predict(n_readers=0).seconds for _ in range(repeats)]
        found |= {
            "tiles": first.n_tiles,
            "tiles_read": first.n_read,
            "ms_per_tile": round(ms * float(np.median(in_use)), 4),
            "ms_per_tile_by_stage": {
                name: round(ms * float(np.median([seconds.get(name, 0.0) for seconds in apart])), 4)
                for name in STAGES
            },
        }
    except Exception as error:  # any error concerns this row only
        found["error"] = describe(error)
    return [found]
