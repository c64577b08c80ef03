"""What every bag classifier takes and returns."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hdmil_lib.errors import BagError
from hdmil_lib.kernels.segments import Segments, check_segments

LossTerms = dict[str, Tensor]
"""Weighted terms of a loss by name, scalars; their sum is the loss."""


@dataclass(frozen=True, kw_only=True)
class MILOutput:
    """What a model says about B bags of N tiles together.

    Attributes:
        logits: Class scores of the bags before the softmax, (B, C).
        segments: Where each bag lies among the tiles.
        attention: Attention logits before the softmax over tiles, (N, A); `None` for a model without.
    """

    logits: Tensor
    segments: Segments
    attention: Tensor | None = None

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities of the bags, (B, C)."""
        return self.logits.softmax(1)


Output = TypeVar("Output", bound=MILOutput)


class MILModel(nn.Module, ABC, Generic[Output]):
    """Base of the bag classifiers; a subclass defines `classify`, and `loss` if it is not cross entropy.

    Features of some encoders differ between dimensions in offset and spread, which slows training down. A
    model may therefore learn their mean and standard deviation once, before training, and keep them with its
    weights; without that it takes features as they are, as in the paper.

    Attributes:
        inputs: Fields of a `BagBatch` that `forward` takes.
        reads_all: Whether the model needs the features of every tile. Where it does not, its output says, as
            `keep_ratio`, of which share.
        in_dim: Width of the features, D.
        n_classes: Number of classes, C.
    """

    inputs: ClassVar[tuple[str, ...]] = ("features",)
    reads_all: ClassVar[bool] = True

    def __init__(self, in_dim: int, n_classes: int):
        super().__init__()
        self.in_dim = in_dim
        self.n_classes = n_classes
        self.feature_mean: Tensor
        self.feature_std: Tensor
        self.register_buffer("feature_mean", torch.zeros(in_dim))
        self.register_buffer("feature_std", torch.ones(in_dim))

    @torch.no_grad()
    def standardize(self, bags: Iterable[Tensor]) -> None:
        """Keep mean and standard deviation of the features of these bags (N, in_dim), over all tiles."""
        tiles = torch.cat([bag.to(self.feature_mean.dtype) for bag in bags])
        self.feature_mean.copy_(tiles.mean(0))
        self.feature_std.copy_(tiles.std(0, correction=0).clamp(min=1e-6))

    def forward(self, features: Tensor, segments: Segments | None = None, **options: Any) -> Output:
        """Classify bags of any length.

        Args:
            features: Tiles of all bags one after the other, (N, in_dim).
            segments: Where each of B bags lies; `None` for one bag, B = 1.
            **options: Further inputs and options of the model, as its `classify` takes them.

        Raises:
            BagError: Features have another width, or a bag has no tiles.
            ValueError: `segments` does not cover the tiles.
        """
        features = self.prepare(features)
        if segments is None:
            segments = Segments([len(features)], features.device)
        check_segments(segments, len(features), features.device)
        if min(segments.lengths) == 0:
            raise BagError("a bag has no tiles: a model needs at least one; check the tissue mask")
        return self.classify(features, segments, **options)

    @abstractmethod
    def classify(self, features: Tensor, segments: Segments) -> Output:
        """Output of B bags, given prepared features (N, in_dim)."""

    def loss(self, output: Output, labels: Tensor) -> LossTerms:
        """The weighted terms of the loss of these bags, each a mean over bags; they are to be added up.

        Args:
            output: What `forward` returned.
            labels: Class indices, int64 (B,).
        """
        return {"bag": cross_entropy(output.logits, labels)}

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer; gradients are clipped within each group by itself."""
        return [{"params": list(self.parameters())}]

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
