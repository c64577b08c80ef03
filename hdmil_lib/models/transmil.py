"""TransMIL: tiles attend to one another, on a square that convolutions read."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.base import MILModel, MILOutput
from hdmil_lib.models.layers import projection
from hdmil_lib.models.nystrom import NystromAttention


class TransMIL(MILModel[MILOutput]):
    """A transformer over the tiles of a bag and a class token (Shao et al. 2021).

    The first tiles are repeated until their number is a square. Two layers of Nystrom attention follow, with
    a convolutional position encoding of that square between them; the class token is classified.
    Attention is the logarithm of what the class token pays to a tile in the last layer, mean over heads and
    sum over a tile's copies. Nystrom's approximation may be negative there: the logarithm is of 1e-12 then.

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        embed_dim: Width of the tokens, a multiple of `n_heads`.
        n_heads: Heads of the attention.
        n_landmarks: Landmarks of Nystrom attention; half of `embed_dim` by default, as published.
        dropout: After each attention.
        projection_dropout: After the projection.

    Raises:
        ValueError: The heads do not divide the width.
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
        attention = {
            "n_heads": n_heads,
            "n_landmarks": max(embed_dim // 2, 1) if n_landmarks is None else n_landmarks,
            "dropout": dropout,
        }
        self.projection = projection(in_dim, embed_dim, projection_dropout)
        self.class_token = nn.Parameter(torch.randn(embed_dim))
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(2))
        self.attentions = nn.ModuleList(NystromAttention(embed_dim, **attention) for _ in range(2))
        self.positions = PositionEncoding(embed_dim)
        self.classifier = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, n_classes))

    def classify(self, features: Tensor, segments: Segments) -> MILOutput:
        """Bags whose squares are equally large go together; no bag affects another."""
        embeddings = self.projection(features)
        sides = [math.isqrt(length - 1) + 1 for length in segments.lengths]
        logits = embeddings.new_empty(len(sides), self.n_classes)
        attention = embeddings.new_zeros(len(embeddings))
        for side in sorted(set(sides)):
            bags = torch.tensor([b for b, other in enumerate(sides) if other == side], device=features.device)
            place = torch.arange(side**2, device=features.device)
            tiles = segments.offsets[bags, None] + place % segments.sizes[bags, None]
            token, weights = self.encode(embeddings[tiles])
            logits = logits.index_copy(0, bags, self.classifier(token))
            attention = attention.index_add(0, tiles.flatten(), weights.flatten())
        return MILOutput(
            logits=logits, segments=segments, attention=attention.clamp(min=1e-12).log()[:, None]
        )

    def encode(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Class token (B, E) of squares of tiles (B, side^2, E), and their attention to them (B, side^2)."""
        tokens = torch.cat([self.class_token.expand(len(tiles), 1, -1), tiles], 1)
        tokens = tokens + self.attentions[0](self.norms[0](tokens))
        tokens = torch.cat([tokens[:, :1], self.positions(tokens[:, 1:])], 1)
        read, weights = self.attentions[1].first(self.norms[1](tokens))
        return tokens[:, 0] + read, weights.mean(1)[:, 1:]


class PositionEncoding(nn.Module):
    """TransMIL's PPEG: depthwise convolutions of the square of tiles, with 7, 5 and 3 taps, added to it."""

    SIZES = (7, 5, 3)

    def __init__(self, dim: int):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(dim, dim, size, groups=dim) for size in self.SIZES)

    def forward(self, tiles: Tensor) -> Tensor:
        """(B, side^2, dim), row after row, to the same; one convolution with the sum of the kernels."""
        largest, dim = self.SIZES[0], tiles.shape[2]
        kernel = sum(pad(c.weight, [(largest - c.kernel_size[0]) // 2] * 4) for c in self.convolutions)
        bias = sum(c.bias for c in self.convolutions)
        side = math.isqrt(tiles.shape[1])
        image = tiles.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        encoded = conv2d(image, kernel, bias, padding=largest // 2, groups=dim)
        return tiles + encoded.flatten(2).mT
