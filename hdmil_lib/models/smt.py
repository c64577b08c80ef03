"""SMT: a cascade that walks from the thumbnail down and classifies from a small area (paper: Table 1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hdmil_lib.errors import BagError
from hdmil_lib.kernels import segment_softmax_pool
from hdmil_lib.models.base import MILModel, MILOutput
from hdmil_lib.models.layers import GatedAttention, projection
from hdmil_lib.models.ragged import bag_of_tile, cumulative, pad, unpad

REGION_TILES = 4
"""Tiles along a side of a region; a tile's patch shrinks as much, so a region is as large as a patch."""


@dataclass(frozen=True, kw_only=True)
class SMTOutput(MILOutput):
    """What SMT says about bags; `attention` is (N, 1), nan for tiles that were not read at 20x.

    Attributes:
        region_logits: Class scores from the regions of the thumbnail alone, (B, C).
        patch_logits: Class scores from the patches of the opened regions, (B, C).
        keep_ratio: Share of each bag's tiles whose 20x features were read, (B,).
    """

    PER_BAG: ClassVar[tuple[str, ...]] = ("logits", "region_logits", "patch_logits", "keep_ratio")

    region_logits: Tensor
    patch_logits: Tensor
    keep_ratio: Tensor


class SMT(MILModel):
    """Cascade of three stages, each of which sees only what the one before opened (Table 1).

    No code of SMT is public: this is the cascade as the paper describes it, built from what a bag holds.
    Regions of 4x4 tiles at 32 um/px are scored and the best share of them opened; then their tiles at
    8 um/px; then the features at 20x of the tiles opened last, which alone decide. A tile that an early,
    blurred look passes over is lost.

    The first two stages see each image by a small vision transformer, the last one takes the features; all
    score by gated attention. A stage adds its score of an image to the sum handed down by the stage before,
    opens the images of highest sum, and pools its tokens by the softmax of the sums. The selection is hard,
    in training too; gradients of the final cross entropy reach the early scores through the weights of the
    final pooling, where the logit of a tile is the score of its region + that of its patch + that of its
    features. So that the first two stages also learn to see, each classifies the slide by what it pooled.
    On small cohorts a transformer across the images of a slide overfits, so images do not see each other.

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        region_share: Share of a slide's regions that are opened, rounded up.
        patch_share: Share of the tiles of opened regions that are read at 20x, rounded up.
        embed_dim: Width of the projected features.
        image_dim: Width of the transformers, a multiple of `heads`.
        heads: Of the transformers.
        dropout: On the tokens of every stage.
        auxiliary: Weight of the cross entropies of the first two stages in the loss.

    Raises:
        ValueError: A share is not in (0, 1], or `heads` does not divide `image_dim`.
    """

    inputs = ("features", "patches", "coords")
    reads_all = False

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        *,
        region_share: float = 0.5,
        patch_share: float = 0.5,
        embed_dim: int = 512,
        image_dim: int = 32,
        heads: int = 4,
        dropout: float = 0.25,
        auxiliary: float = 0.5,
    ):
        super().__init__(in_dim, n_classes)
        for name, share in (("region_share", region_share), ("patch_share", patch_share)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} is {share}, expected more than 0 and at most 1")
        if image_dim % heads:
            raise ValueError(f"image_dim is {image_dim}, expected a multiple of heads, {heads}")
        self.region_share, self.patch_share, self.auxiliary = region_share, patch_share, auxiliary
        self.regions, self.patches = (
            Stage(ImageTransformer(image_dim, heads), image_dim, n_classes, dropout) for _ in range(2)
        )
        self.tiles = Stage(projection(in_dim, embed_dim, 0.0), embed_dim, n_classes, dropout)

    def classify(self, features: Tensor, cu_seqlens: Tensor, *, patches: Tensor, coords: Tensor) -> SMTOutput:
        """Classify bags.

        Args:
            features: I, (N, in_dim); only the rows of tiles opened last are used.
            cu_seqlens: (B + 1,).
            patches: The tiles at 8 um/px, uint8 (N, 16, 16, 3).
            coords: Level-0 (x, y) of the tiles, (N, 2), or their (column, row).

        Raises:
            BagError: Patches or coordinates have another shape or type.
        """
        _check(features, patches, coords)
        region_images, region, region_cu = regions(patches, coords, cu_seqlens)
        zeros = features.new_zeros(len(region_images), 1)
        scores, region_logits = self.regions(region_images.to(features.dtype), zeros, region_cu)

        opened = best_share(scores[:, 0], region_cu, self.region_share)[region].nonzero()[:, 0]
        opened_cu = _count(opened, cu_seqlens)
        pixels = _pixels(patches[opened]).to(features.dtype)
        scores, patch_logits = self.patches(pixels, scores[region[opened]], opened_cu)

        best = best_share(scores[:, 0], opened_cu, self.patch_share)
        read = opened[best]
        read_cu = _count(read, cu_seqlens)
        scores, logits = self.tiles(features[read], scores[best], read_cu)
        return SMTOutput(
            logits=logits,
            cu_seqlens=cu_seqlens,
            attention=features.new_full((len(features), 1), torch.nan).index_put((read,), scores),
            region_logits=region_logits,
            patch_logits=patch_logits,
            keep_ratio=read_cu.diff() / cu_seqlens.diff(),
        )

    def losses(self, output: SMTOutput, labels: Tensor) -> dict[str, Tensor]:
        """Cross entropy of the cascade, and `auxiliary` times that of each earlier stage."""
        return {
            "bag": cross_entropy(output.logits, labels),
            "region": self.auxiliary * cross_entropy(output.region_logits, labels),
            "patch": self.auxiliary * cross_entropy(output.patch_logits, labels),
        }


class Stage(nn.Module):
    """One magnification: images become tokens, which are scored, pooled by their scores and classified.

    Args:
        embedding: Images (n, ...) to tokens (n, embed_dim).
        embed_dim: Width of the tokens.
        n_classes: Number of classes.
        dropout: On the tokens.
    """

    def __init__(self, embedding: nn.Module, embed_dim: int, n_classes: int, dropout: float):
        super().__init__()
        self.embedding = nn.Sequential(embedding, nn.Dropout(dropout))
        self.attention = GatedAttention(embed_dim, embed_dim // 2, 1)
        self.classifier = nn.Linear(embed_dim, n_classes)

    def forward(self, images: Tensor, handed_down: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Summed scores (n, 1) and bag logits (B, C) of images with the scores so far (n, 1)."""
        tokens = self.embedding(images)
        scores = handed_down + self.attention(tokens)
        bags = segment_softmax_pool(tokens, scores, None, cu_seqlens)
        return scores, self.classifier(bags[:, 0])


class ImageTransformer(nn.Module):
    """A small vision transformer: images (n, 16, 16, 3) to tokens (n, dim), the mean of those of 4x4 pixels.

    In the image of a region each of its 16 tokens is one tile.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.embedding = nn.Linear(4 * 4 * 3, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(16, dim))
        self.block = nn.TransformerEncoderLayer(
            dim, heads, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        squares = images.unflatten(2, (4, 4)).unflatten(1, (4, 4)).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.norm(self.block(self.embedding(squares) + self.positions)).mean(1)


def grid_positions(coords: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Column and row of tiles, counted from the first of their bag: int64 (N, 2) of coordinates (N, 2).

    The pitch of the grid is the smallest distance between two columns or two rows of a bag; it need not be
    a whole number of pixels. Steps between neighboring columns are rounded one by one, so that the rounding
    of coordinates to pixels does not add up.
    """
    bag = bag_of_tile(cu_seqlens)
    offset = coords - coords.amin(0)
    ordered, order = (offset + bag.unsqueeze(1) * (offset.amax(0) + 1)).sort(0)
    gaps = ordered.diff(dim=0, prepend=ordered[:1])
    gaps[cu_seqlens[:-1]] = 0
    smallest = gaps.double().masked_fill(gaps == 0, torch.inf).amin(1)
    pitch = smallest.new_full((len(cu_seqlens) - 1,), torch.inf).scatter_reduce(0, bag, smallest, "amin")
    steps = (gaps / pitch[bag].unsqueeze(1)).round().long().cumsum(0)
    steps = steps - steps[cu_seqlens[:-1]][bag]
    return torch.empty_like(steps).scatter(0, order, steps)


def regions(patches: Tensor, coords: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of 4x4 tiles of each slide as images of 32 um/px, white where there is no tile.

    Args:
        patches: The tiles at 8 um/px, uint8 (N, 16, 16, 3); each is averaged to 4x4 pixels.
        coords: Where they lie, (N, 2); see `grid_positions`.
        cu_seqlens: (B + 1,).

    Returns:
        images: Of the R blocks with a tile or more, (R, 16, 16, 3) from -0.5 to 0.5.
        region: Number of the block that each tile is in, int64 (N,).
        region_cu: Where the blocks of each bag start, and the last one ends, (B + 1,).
    """
    n = REGION_TILES
    columns, rows = grid_positions(coords, cu_seqlens).unbind(1)
    blocks = torch.stack((bag_of_tile(cu_seqlens), rows // n, columns // n), 1)
    blocks, region = blocks.unique(dim=0, return_inverse=True)
    small = _pixels(patches).unflatten(2, (n, -1)).unflatten(1, (n, -1)).mean((2, 4))
    canvas = small.new_full((len(blocks), n, n, *small.shape[1:]), 0.5)
    images = canvas.index_put((region, rows % n, columns % n), small).transpose(2, 3).flatten(3, 4)
    counts = torch.bincount(blocks[:, 0], minlength=len(cu_seqlens) - 1)
    return images.flatten(1, 2), region, cumulative(counts, counts.device)


def best_share(scores: Tensor, cu_seqlens: Tensor, share: float) -> Tensor:
    """The highest scores of each bag, `share` of their number rounded up: bool (n,) of scores (n,)."""
    lengths = cu_seqlens.diff()
    wanted = (lengths.double() * share - 1e-9).ceil()
    order = pad(scores.detach(), cu_seqlens, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return unpad(order.argsort(dim=1) < wanted.unsqueeze(1), cu_seqlens)


def _count(tiles: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`cu_seqlens` of some tiles, given by their ascending numbers among all."""
    return torch.searchsorted(tiles, cu_seqlens)


def _pixels(patches: Tensor) -> Tensor:
    return patches.float() / 255 - 0.5


def _check(features: Tensor, patches: Tensor, coords: Tensor) -> None:
    n = len(features)
    if patches.dtype != torch.uint8 or patches.shape != (n, 16, 16, 3):
        raise BagError(
            f"patches are {patches.dtype} of shape {tuple(patches.shape)}, expected torch.uint8 of shape "
            f"({n}, 16, 16, 3): RGB at 8 um/px of the tiles whose features are given"
        )
    if coords.shape != (n, 2):
        raise BagError(
            f"coords have shape {tuple(coords.shape)}, expected ({n}, 2): (x, y) of the tiles whose "
            "features are given"
        )
