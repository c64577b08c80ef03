"""What every bag classifier takes and returns."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hdmil_lib.errors import BagError


@dataclass(frozen=True, kw_only=True)
class MILOutput:
    """What a model says about one bag of N tiles.

    Attributes:
        logits: Class scores of the bag before the softmax, (C,).
        attention: Attention logits before the softmax over tiles, (N, A); `None` for a model without.
    """

    logits: Tensor
    attention: Tensor | None = None


class MILModel(nn.Module):
    """Base of the bag classifiers: `forward(features)` takes (N, in_dim) and returns a `MILOutput`.

    Features of some encoders differ between dimensions in offset and spread, which slows training down. A
    model may therefore learn their mean and standard deviation once, before training, and keep them with its
    weights; without that it takes features as they are, as in the paper.

    Attributes:
        in_dim: Width of the features, D.
        n_classes: Number of classes, C.
    """

    def __init__(self, in_dim: int, n_classes: int):
        super().__init__()
        self.in_dim = in_dim
        self.n_classes = n_classes
        self.register_buffer("feature_mean", torch.zeros(in_dim))
        self.register_buffer("feature_std", torch.ones(in_dim))

    @torch.no_grad()
    def standardize(self, bags: Iterable[Tensor]) -> None:
        """Keep mean and standard deviation of the features of these bags (N, in_dim), over all tiles."""
        tiles = torch.cat(list(bags))
        self.feature_mean.copy_(tiles.mean(0))
        self.feature_std.copy_(tiles.std(0, correction=0).clamp(min=1e-6))

    def prepare(self, features: Tensor) -> Tensor:
        """Features (N, in_dim) as the first layer takes them.

        Raises:
            BagError: They have another shape, or there is not one tile.
        """
        if features.ndim != 2 or features.shape[1] != self.in_dim:
            raise BagError(
                f"features have shape {tuple(features.shape)}, expected (n_tiles, {self.in_dim}): "
                "the bag was made by another encoder than the model; extract it again with the model's"
            )
        if len(features) == 0:
            raise BagError("the bag has no tiles: a model needs at least one; check the tissue mask")
        return (features - self.feature_mean) / self.feature_std
