"""TransMIL: a transformer over the tiles, arranged in a square for a convolutional position encoding."""

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from hdmil_lib.kernels.segments import Segments, to_device
from hdmil_lib.models.base import MILModel, MILOutput
from hdmil_lib.models.layers import Projection
from hdmil_lib.models.nystrom import NystromAttention


class TransMIL(MILModel[MILOutput]):
    """A transformer over the tiles of a bag and a class token (Shao et al. 2021).

    The first tiles are repeated until the number of tiles is a square. Two layers of Nystrom attention
    follow, with a convolutional position encoding of that square between them; the class token is classified.
    The `attention` of the output is the logarithm of the attention from the class token to a tile in the last
    layer, averaged over heads, summed over the copies of the tile, and clamped to at least 1e-12, since
    Nystrom's approximation may be negative.

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        embed_dim: Width of the tokens, a multiple of `n_heads`.
        n_heads: Number of heads of the attention.
        n_landmarks: Number of landmarks of Nystrom attention; half of `embed_dim` by default, as published.
        dropout: Dropout rate after each attention.
        projection_dropout: Dropout rate after the projection.

    Raises:
        ValueError: `embed_dim` is not a multiple of `n_heads`.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        *,
        embed_dim: int = 512,
        n_heads: int = 8,
        n_landmarks: int | None = None,
        dropout: float = 0.1,
        projection_dropout: float = 0.0,
    ):
        super().__init__(in_dim, n_classes)
        landmarks = max(embed_dim // 2, 1) if n_landmarks is None else n_landmarks
        self.projection = Projection(in_dim, embed_dim, projection_dropout)
        self.class_token = nn.Parameter(torch.randn(embed_dim))
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(2))
        self.attentions = nn.ModuleList(
            NystromAttention(embed_dim, n_heads=n_heads, n_landmarks=landmarks, dropout=dropout)
            for _ in range(2)
        )
        self.positions = PositionEncoding(embed_dim)
        self.classifier = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, n_classes))

    def classify(self, features: Tensor, segments: Segments, rows: Tensor | None = None) -> MILOutput:
        """Classify bags, all bags whose squares have the same size at once."""
        embeddings = self.projection(features, *self.scale, rows=rows)
        sides = [math.isqrt(length - 1) + 1 for length in segments.lengths]
        logits = embeddings.new_empty(len(sides), self.n_classes)
        attention = embeddings.new_zeros(len(embeddings))
        for side in sorted(set(sides)):
            alike = torch.tensor([b for b, other in enumerate(sides) if other == side], device="cpu")
            bags = to_device(alike, features.device)
            place = torch.arange(side**2, device=features.device)
            tiles = segments.offsets[bags, None] + place % segments.sizes[bags, None]
            token, weights = self.encode(embeddings[tiles])
            logits = logits.index_copy(0, bags, self.classifier(token))
            attention = attention.index_add(0, tiles.flatten(), weights.flatten())
        return MILOutput(
            logits=logits, segments=segments, attention=attention.clamp(min=1e-12).log()[:, None]
        )

    def encode(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens (B, E) and their attention (B, side^2) to squares of tiles (B, side^2, E)."""
        tokens = torch.cat([self.class_token.expand(len(tiles), 1, -1), tiles], 1)
        tokens = tokens + self.attentions[0](self.norms[0](tokens))
        tokens = torch.cat([tokens[:, :1], self.positions(tokens[:, 1:])], 1)
        last = cast(NystromAttention, self.attentions[1])
        read, weights = last.first(self.norms[1](tokens))
        return tokens[:, 0] + read, weights.mean(1)[:, 1:]


class PositionEncoding(nn.Module):
    """PPEG of TransMIL: adds depthwise convolutions of the square of tiles, with kernels of 7, 5 and 3."""

    SIZES = (7, 5, 3)

    def __init__(self, dim: int):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(dim, dim, size, groups=dim) for size in self.SIZES)

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode tiles (B, side^2, dim), row after row, by one convolution with the sum of the kernels."""
        largest, dim = self.SIZES[0], tiles.shape[2]
        kernel, bias = tiles.new_zeros(()), tiles.new_zeros(())
        for layer in cast(Iterable[nn.Conv2d], self.convolutions):
            kernel = kernel + pad(layer.weight, [(largest - layer.kernel_size[0]) // 2] * 4)
            bias = bias + cast(Tensor, layer.bias)
        side = math.isqrt(tiles.shape[1])
        image = tiles.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        encoded = conv2d(image, kernel, bias, padding=largest // 2, groups=dim)
        return tiles + encoded.flatten(2).mT
