"""How slides are usually encoded: two pipelines rebuilt from the documented defaults of public libraries."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openslide
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

TILE = 256
TRANSFORM = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))]
)


def read_tile(slide: openslide.OpenSlide, corner: Sequence[int]) -> torch.Tensor:
    """One tile on the slide's own scale, as torchvision's transforms make it."""
    tile = slide.read_region(tuple(int(x) for x in corner), 0, (TILE, TILE))
    return TRANSFORM(tile.convert("RGB"))


@torch.no_grad()
def naive_loop(path: Path, coords: np.ndarray, network: nn.Module) -> np.ndarray:
    """One `read_region` and one encoder call per tile."""
    with openslide.OpenSlide(path) as slide:
        return torch.cat([network(read_tile(slide, corner)[None]).mean((2, 3)) for corner in coords]).numpy()


class SlideTiles(Dataset):
    """Tiles of a slide by their coordinates; each worker opens the slide for itself."""

    def __init__(self, path: Path, coords: np.ndarray):
        self.path, self.coords, self.slide = path, coords, None

    def __len__(self) -> int:
        return len(self.coords)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.slide is None:
            self.slide = openslide.OpenSlide(self.path)
        return read_tile(self.slide, self.coords[index])


@torch.no_grad()
def common_tool(
    path: Path, coords: np.ndarray, network: nn.Module, workers: int = 2, batch: int = 256
) -> np.ndarray:
    """Coordinates first, then a DataLoader over OpenSlide, and the encoder in eager float32."""
    loader = DataLoader(SlideTiles(path, coords), batch, num_workers=workers)
    return torch.cat([network(images).mean((2, 3)) for images in loader]).numpy()
