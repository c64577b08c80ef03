"""Untrained networks over an encoder without weights, and a slide whose tiles all differ."""

from pathlib import Path

import numpy as np
import torch
from slide_factory import write_slide

from hdmil_lib.inference.anytime import Trajectory, lipn_scores
from hdmil_lib.models import DMIN, HDMIL, LIPN, ModelInfo
from hdmil_lib.slides import Slide, TileGrid


class ColorEncoder:
    """Mean and spread of each color channel: 6 features per tile, without weights to load."""

    name, dim, weights_hash, precision, engine = "color", 6, "c01", "fp32", "numpy"
    batch_size = 32

    def at(self, side):
        return self

    def __call__(self, tiles):
        pixels = tiles.reshape(len(tiles), -1, 3).astype(np.float32) / 255
        return np.concatenate([pixels.mean(axis=1), 4 * pixels.std(axis=1)], axis=1)


INFO = ModelInfo(classes=("normal", "tumor"), encoder="color", encoder_weights="c01")


def write_textured_slide(
    path: Path, rows: int = 5, cols: int = 7, seed: int = 0, compression: str = "packbits"
) -> Path:
    """A slide of rows x cols tiles, each its own shade of tissue with its own grain."""
    rng = np.random.default_rng(seed)
    shades = rng.integers(110, 190, (rows, cols, 3)) - [0, 90, 0]
    grain = rng.integers(1, 25, (rows, cols, 1)).repeat(256, 0).repeat(256, 1)
    noise = rng.normal(0, 1, (256, 256, 3))
    pixels = shades.repeat(256, 0).repeat(256, 1) + np.tile(noise, (rows, cols, 1)) * grain
    return write_slide(path, pixels.clip(0, 255).astype(np.uint8), compression=compression)


def make_model(slide=None, keep=0.5, n_classes=2, **settings) -> HDMIL:
    """Untrained networks; LIPN's threshold is put where `keep` of the slide's tiles stay."""
    torch.manual_seed(0)
    settings = {"embed_dim": 16, "attention_dim": 8, "degree": 3} | settings
    dmin, lipn = DMIN(6, n_classes, **settings), LIPN(n_classes)
    info = INFO.model_copy(update={"classes": tuple(f"class {c}" for c in range(n_classes))})
    model = HDMIL(dmin, lipn, thresholds=0.5, info=info)
    if slide is not None:
        with Slide(slide) as opened:
            patches = TileGrid.from_slide(opened).patches
        with torch.no_grad():  # branches of equal spread, so that each keeps some tiles
            logits = lipn(torch.from_numpy(patches))
            lipn.classifier.weight /= logits.std(dim=0)[:, None]
            lipn.classifier.bias.sub_(logits.mean(dim=0)).div_(logits.std(dim=0))
        threshold = float(np.quantile(lipn_scores(model, patches), 1 - keep))
        model = HDMIL(dmin, lipn, thresholds=threshold, info=info)
    model.encoder = ColorEncoder()
    return model


def made_up(*tumor):
    """How the answer on a slide grew: P(tumor) after each ten tiles."""
    p = np.array(tumor)
    return Trajectory(np.arange(1, len(p) + 1) * 10, np.stack([1 - p, p], 1))
