"""The second look: tiles that LIPN keeps are seen coarsely by the encoder before they are read in full."""

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from hdmil_lib.errors import BagError
from hdmil_lib.schema import Schema


class LookSettings(Schema):
    """Arguments of a `SecondLook` with their bounds, as stored in a model folder."""

    in_dim: Annotated[int, Field(ge=1, le=65_536)]
    side: Annotated[int, Field(ge=8, le=4096)]
    hidden: Annotated[int, Field(ge=1, le=65_536)] = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25


class SecondLook(nn.Module):
    """Scores tiles by the encoder's features of a coarse image of them; not in the paper.

    LIPN sees 16 x 16 pixels of a tile, which show no nuclei. A look of 64 x 64 pixels, at 2 um/px, does, and
    costs the encoder a sixteenth of the arithmetic of 256 x 256 pixels.

    Args:
        in_dim: Width of the features, D.
        side: Side of the image of a tile, in pixels.
        hidden: Width of the hidden layer.
        dropout: Dropout rate of the features and of the hidden layer.

    Attributes:
        settings: The arguments.
        coarse_weight: Weight of LIPN's logit in the score of a tile; 0 until `training.cascade` chooses it.
    """

    feature_mean: Tensor
    feature_std: Tensor
    coarse_weight: Tensor

    def __init__(self, in_dim: int, side: int = 64, *, hidden: int = 64, dropout: float = 0.25):
        super().__init__()
        self.settings = LookSettings(in_dim=in_dim, side=side, hidden=hidden, dropout=dropout)
        self.register_buffer("feature_mean", torch.zeros(in_dim))
        self.register_buffer("feature_std", torch.ones(in_dim))
        self.register_buffer("coarse_weight", torch.zeros(()))
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(in_dim, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )

    @property
    def side(self) -> int:
        """Side of the image of a tile, in pixels."""
        return self.settings.side

    @torch.no_grad()
    def standardize(self, bags: Iterable[Tensor]) -> None:
        """Store mean and standard deviation over all tiles of the features (N, D) of these bags."""
        tiles = torch.cat([bag.to(self.feature_mean.dtype) for bag in bags])
        self.feature_mean.copy_(tiles.mean(0))
        self.feature_std.copy_(tiles.std(0, correction=0).clamp(min=1e-6))

    def forward(self, features: Tensor, coarse: Tensor | None = None) -> Tensor:
        """Scores of tiles, (N,): logits of their evidence, with LIPN's added if they are given.

        Args:
            features: Features of the coarse images, (N, D).
            coarse: LIPN's highest logit over branches, (N,), to be added with its weight. Without it the
                score is what the network learns.

        Raises:
            BagError: The features have another width.
        """
        if features.ndim != 2 or features.shape[1] != self.settings.in_dim:
            raise BagError(
                f"the looks have shape {tuple(features.shape)}, expected (n_tiles, {self.settings.in_dim}): "
                "they were made by another encoder than the model's"
            )
        scaled = (features.to(self.feature_mean.dtype) - self.feature_mean) / self.feature_std
        logits = self.head(scaled)[:, 0]
        return logits if coarse is None else logits + self.coarse_weight * coarse
