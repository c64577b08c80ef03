"""What every bag classifier takes and returns."""

from dataclasses import dataclass

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

    Attributes:
        in_dim: Width of the features, D.
        n_classes: Number of classes, C.
    """

    def __init__(self, in_dim: int, n_classes: int):
        super().__init__()
        self.in_dim = in_dim
        self.n_classes = n_classes

    def check(self, features: Tensor) -> None:
        """Raise `BagError` unless the features are (N, in_dim) with at least one tile."""
        if features.ndim != 2 or features.shape[1] != self.in_dim:
            raise BagError(
                f"features have shape {tuple(features.shape)}, expected (n_tiles, {self.in_dim}): "
                "the bag was made by another encoder than the model; extract it again with the model's"
            )
        if len(features) == 0:
            raise BagError("the bag has no tiles: a model needs at least one; check the tissue mask")
