"""SMT: a cascade from the thumbnail to full resolution that reads few of the tiles (paper: Table 1)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hdmil_lib.errors import BagError
from hdmil_lib.kernels import segment_softmax_pool
from hdmil_lib.kernels.segments import Segments, to_device
from hdmil_lib.models.base import LossTerms, MILModel, MILOutput
from hdmil_lib.models.layers import GatedAttention, Projection
from hdmil_lib.models.ragged import pad, unpad

REGION_TILES = 4
"""Side of a region in tiles; patches are reduced by the same factor, so a region has 16x16 pixels."""


@dataclass(frozen=True, kw_only=True)
class SMTOutput(MILOutput):
    """Output of SMT; `attention` is (N, 1), nan for tiles that were not read at 20x.

    Attributes:
        region_logits: Class scores from the regions of the thumbnail alone, (B, C).
        patch_logits: Class scores from the patches of the opened regions, (B, C).
        keep_ratio: Share of each bag's tiles whose 20x features were read, (B,).
    """

    region_logits: Tensor
    patch_logits: Tensor
    keep_ratio: Tensor


class SMT(MILModel[SMTOutput]):
    """Cascade of three stages, each restricted to what the previous stage selected (Table 1).

    The code of SMT is not public; this cascade follows the description in the paper. The first stage scores
    regions of 4x4 tiles at 32 um/px and selects the best share of them, the second does the same with their
    tiles at 8 um/px, and the third classifies the slide from the features at 20x of the tiles that are left.

    The first two stages encode each image with a small vision transformer, the third uses the features; all
    score by gated attention. A stage adds its score of an image to the sum of the scores of the previous
    stages, selects the images of highest sum, and pools its tokens with the softmax of the sums. Selection is
    hard also in training. Gradients of the final cross entropy reach the early scores through the weights of
    the final pooling, where the logit of a tile is the sum of the scores of its region, patch and features.
    Each of the first two stages also classifies the slide from its pooled tokens, with a loss of its own.
    Images do not attend to each other, since on small cohorts such a transformer overfits.

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        region_share: Share of a slide's regions that are selected, rounded up.
        patch_share: Share of the tiles of selected regions that are read at 20x, rounded up.
        embed_dim: Width of the projected features.
        image_dim: Width of the transformers, a multiple of `heads`.
        heads: Number of heads of the transformers.
        dropout: Dropout rate of the tokens of every stage.
        auxiliary: Weight of the cross entropies of the first two stages in the loss.

    Raises:
        ValueError: A share is not in (0, 1], or `heads` does not divide `image_dim`.
    """

    inputs = ("features", "patches", "rowcol")
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
        self.tiles = Stage(Projection(in_dim, embed_dim), embed_dim, n_classes, dropout)

    def classify(
        self, features: Tensor, segments: Segments, *, patches: Tensor, rowcol: Tensor | np.ndarray
    ) -> SMTOutput:
        """Classify bags.

        Args:
            features: I, (N, in_dim); only the rows of tiles that are read at 20x are used.
            segments: The B bags.
            patches: The tiles at 8 um/px, uint8 (N, 16, 16, 3).
            rowcol: Position of the tiles on their slide's grid, integers (N, 2), on the host.

        Raises:
            BagError: The patches or positions have another shape or type.
        """
        features = self.prepare(features)
        _check(features, patches, rowcol := np.asarray(rowcol))
        region_images, region, slide_regions = regions(patches, rowcol, segments)
        zeros = features.new_zeros(len(region_images), 1)
        scores, region_logits = self.regions(region_images.to(features.dtype), zeros, slide_regions)

        best = best_share(scores[:, 0], slide_regions, self.region_share)[region]
        opened, slide_opened = segments.select(best)
        pixels = _pixels(patches[opened]).to(features.dtype)
        scores, patch_logits = self.patches(pixels, scores[region[opened]], slide_opened)

        best = best_share(scores[:, 0], slide_opened, self.patch_share)
        among, slide_read = slide_opened.select(best)
        read = opened[among]
        scores, logits = self.tiles(features[read], scores[among], slide_read)
        attention = scores.masked_fill(~slide_read.inside[:, None], torch.nan)
        return SMTOutput(
            logits=logits,
            segments=segments,
            attention=features.new_full((len(features), 1), torch.nan).index_put((read,), attention),
            region_logits=region_logits,
            patch_logits=patch_logits,
            keep_ratio=slide_read.sizes / segments.sizes,
        )

    def loss(self, output: SMTOutput, labels: Tensor) -> LossTerms:
        """Compute the cross entropy of the slide, and `auxiliary` times that of either earlier stage."""
        return {
            "bag": self.cross_entropy(output.logits, labels),
            "region": self.auxiliary * self.cross_entropy(output.region_logits, labels),
            "patch": self.auxiliary * self.cross_entropy(output.patch_logits, labels),
        }


class Stage(nn.Module):
    """One magnification: images are encoded to tokens, scored, pooled by their scores and classified.

    Args:
        embedding: Module that encodes images (n, ...) to tokens (n, embed_dim).
        embed_dim: Width of the tokens.
        n_classes: Number of classes.
        dropout: Dropout rate of the tokens.
    """

    def __init__(self, embedding: nn.Module, embed_dim: int, n_classes: int, dropout: float):
        super().__init__()
        self.embedding = nn.Sequential(embedding, nn.Dropout(dropout))
        self.attention = GatedAttention(embed_dim, embed_dim // 2, 1)
        self.classifier = nn.Linear(embed_dim, n_classes)

    def forward(self, images: Tensor, scores: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Summed scores (n, 1) and bag logits (B, C) of images, given the scores of earlier stages (n, 1)."""
        tokens = self.embedding(images)
        scores = scores + self.attention(tokens)
        bags = segment_softmax_pool(tokens, scores, None, segments)
        return scores, self.classifier(bags[:, 0])


class ImageTransformer(nn.Module):
    """Small vision transformer: images (n, 16, 16, 3) to (n, dim), the mean of their 16 tokens of 4x4 pixels.

    In the image of a region each token is one tile.
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


def regions(patches: Tensor, rowcol: np.ndarray, segments: Segments) -> tuple[Tensor, Tensor, Segments]:
    """Images at 32 um/px of the regions of 4x4 tiles of each slide, white where there is no tile.

    Args:
        patches: The tiles at 8 um/px, uint8 (N, 16, 16, 3); each is averaged to 4x4 pixels.
        rowcol: Positions of the tiles on the grid, (N, 2); regions start at the first row and column in use.
        segments: The B slides.

    Returns:
        images: Pixels of the R regions with at least one tile, (R, 16, 16, 3) from -0.5 to 0.5.
        region: Region of each tile, int64 (N,).
        slide_regions: The regions of each slide, as segments.
    """
    n, device = REGION_TILES, patches.device
    counts, of_tile, slots = _blocks(np.asarray(rowcol), segments.lengths)
    region = to_device(torch.from_numpy(of_tile), device)
    rows, columns = to_device(torch.from_numpy(slots), device).unbind(1)
    small = _pixels(patches).unflatten(2, (n, -1)).unflatten(1, (n, -1)).mean((2, 4))
    canvas = small.new_full((sum(counts), n, n, *small.shape[1:]), 0.5)
    images = canvas.index_put((region, rows, columns), small).transpose(2, 3).flatten(3, 4)
    return images.flatten(1, 2), region, Segments(counts, device)


def _blocks(rowcol: np.ndarray, lengths: Sequence[int]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Number of blocks of each bag, the block of each tile (N,), and its place there (N, 2)."""
    starts = np.cumsum([0, *lengths[:-1]])
    bag = np.repeat(np.arange(len(lengths)), lengths)
    rowcol = rowcol - np.minimum.reduceat(rowcol, starts)[bag]
    blocks = np.column_stack((bag, rowcol // REGION_TILES))
    blocks, region = np.unique(blocks, axis=0, return_inverse=True)
    return np.bincount(blocks[:, 0], minlength=len(lengths)).tolist(), region, rowcol % REGION_TILES


def best_share(scores: Tensor, segments: Segments, share: float) -> Tensor:
    """Mask (n,) of the highest scores (n,) of each bag: the given share of them, rounded up."""
    wanted: Tensor
    if segments.exact:
        counts = [math.ceil(length * share - 1e-9) for length in segments.lengths]
        wanted = to_device(torch.tensor(counts), segments.offsets.device)
    else:
        wanted = (segments.sizes.double() * share - 1e-9).ceil()
    order = pad(scores.detach(), segments, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return unpad(order.argsort(dim=1) < wanted.unsqueeze(1), segments) & segments.inside


def _pixels(patches: Tensor) -> Tensor:
    return patches.float() / 255 - 0.5


def _check(features: Tensor, patches: Tensor, rowcol: np.ndarray) -> None:
    n = len(features)
    if patches.dtype != torch.uint8 or patches.shape != (n, 16, 16, 3):
        raise BagError(
            f"patches are {patches.dtype} of shape {tuple(patches.shape)}, expected torch.uint8 of shape "
            f"({n}, 16, 16, 3): RGB at 8 um/px, one patch per row of features"
        )
    if rowcol.shape != (n, 2) or not np.issubdtype(rowcol.dtype, np.integer):
        raise BagError(
            f"rowcol is {rowcol.dtype} of shape {tuple(rowcol.shape)}, expected integers ({n}, 2): "
            "one grid position per row of features"
        )
