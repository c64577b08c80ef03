"""How slides are usually encoded: two pipelines rebuilt from the documented defaults of public libraries."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openslide
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

TILE = 256
TRANSFORM = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))]
)


def read_tile(slide: openslide.OpenSlide, corner: Sequence[int], side: int) -> torch.Tensor:
    """One tile of `side` level-0 pixels, resized, as torchvision's transforms make it."""
    tile = slide.read_region(tuple(int(x) for x in corner), 0, (side, side)).convert("RGB")
    return TRANSFORM(tile.resize((TILE, TILE), Image.Resampling.BICUBIC))


@torch.no_grad()
def naive_loop(path: Path, coords: np.ndarray, side: int, network: nn.Module) -> np.ndarray:
    """One `read_region` and one call of the encoder a tile."""
    with openslide.OpenSlide(path) as slide:
        return torch.cat(
            [network(read_tile(slide, corner, side)[None]).mean((2, 3)) for corner in coords]
        ).numpy()


class SlideTiles(Dataset):
    """Tiles of a slide by their coordinates; each worker opens the slide for itself."""

    def __init__(self, path: Path, coords: np.ndarray, side: int):
        self.path, self.coords, self.side, self.slide = path, coords, side, None

    def __len__(self) -> int:
        return len(self.coords)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.slide is None:
            self.slide = openslide.OpenSlide(self.path)
        return read_tile(self.slide, self.coords[index], self.side)


@torch.no_grad()
def common_tool(
    path: Path, coords: np.ndarray, side: int, network: nn.Module, workers: int = 2, batch: int = 256
) -> np.ndarray:
    """Coordinates first, then a DataLoader over OpenSlide, and the encoder in eager float32."""
    tiles = SlideTiles(path, coords, side)
    loader = DataLoader(tiles, batch, num_workers=workers, multiprocessing_context="spawn")
    return torch.cat([network(images).mean((2, 3)) for images in loader]).numpy()
