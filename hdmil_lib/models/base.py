"""What every bag classifier takes and returns."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hdmil_lib.errors import BagError
from hdmil_lib.kernels.segments import check_segments
from hdmil_lib.models.ragged import cumulative


@dataclass(frozen=True, kw_only=True)
class MILOutput:
    """What a model says about B bags of N tiles together.

    Asked about one bag without `cu_seqlens`, a model leaves the bag dimension out: logits are (C,).

    Attributes:
        logits: Class scores of the bags before the softmax, (B, C).
        cu_seqlens: Where each bag starts and the last one ends, int64 (B + 1,).
        attention: Attention logits before the softmax over tiles, (N, A); `None` for a model without.
    """

    PER_BAG: ClassVar[tuple[str, ...]] = ("logits",)

    logits: Tensor
    cu_seqlens: Tensor
    attention: Tensor | None = None

    def single(self) -> "MILOutput":
        """The same without the bag dimension, for one bag."""
        return replace(self, **{name: getattr(self, name)[0] for name in self.PER_BAG})


class MILModel(nn.Module, ABC):
    """Base of the bag classifiers; a subclass defines `classify`, and `losses` if it is not cross entropy.

    Features of some encoders differ between dimensions in offset and spread, which slows training down. A
    model may therefore learn their mean and standard deviation once, before training, and keep them with its
    weights; without that it takes features as they are, as in the paper.

    Attributes:
        inputs: Fields of a bag that `forward` takes: features, then others by keyword.
        reads_all: Needs the features of every tile. Otherwise its output says, as `keep_ratio`, of how many.
        in_dim: Width of the features, D.
        n_classes: Number of classes, C.
    """

    inputs: ClassVar[tuple[str, ...]] = ("features",)
    reads_all: ClassVar[bool] = True

    def __init__(self, in_dim: int, n_classes: int):
        super().__init__()
        self.in_dim = in_dim
        self.n_classes = n_classes
        self.register_buffer("feature_mean", torch.zeros(in_dim))
        self.register_buffer("feature_std", torch.ones(in_dim))

    @torch.no_grad()
    def standardize(self, bags: Iterable[Tensor]) -> None:
        """Keep mean and standard deviation of the features of these bags (N, in_dim), over all tiles."""
        tiles = torch.cat([bag.to(self.feature_mean.dtype) for bag in bags])
        self.feature_mean.copy_(tiles.mean(0))
        self.feature_std.copy_(tiles.std(0, correction=0).clamp(min=1e-6))

    def forward(self, features: Tensor, cu_seqlens: Tensor | None = None, **options: Any) -> MILOutput:
        """Classify bags of any length.

        Args:
            features: Tiles of all bags one after the other, (N, in_dim).
            cu_seqlens: Where each of B bags starts and the last one ends, integers (B + 1,) from 0 to N;
                `None` for one bag, whose output has no bag dimension.
            **options: Of the model, as its `classify` takes them.

        Raises:
            BagError: Features have another width, or a bag has no tiles.
            ValueError: `cu_seqlens` does not cover the tiles.
        """
        features = self.prepare(features)
        if cu_seqlens is None:
            return self.classify(features, cumulative([len(features)], features.device), **options).single()
        check_segments(cu_seqlens, len(features), features.device)
        if not cu_seqlens.diff().all():
            raise BagError("a bag has no tiles: a model needs at least one; check the tissue mask")
        return self.classify(features, cu_seqlens.long(), **options)

    @abstractmethod
    def classify(self, features: Tensor, cu_seqlens: Tensor) -> MILOutput:
        """Output of B bags, with prepared features (N, in_dim) and int64 `cu_seqlens` (B + 1,)."""

    def losses(self, output: MILOutput, labels: Tensor) -> dict[str, Tensor]:
        """The terms, scalars, that add up to the loss of these bags: each a mean over bags.

        Args:
            output: Of `forward`, with the bag dimension.
            labels: Class indices, int64 (B,).
        """
        return {"bag": cross_entropy(output.logits, labels)}

    def tiers(self) -> list[list[nn.Parameter]]:
        """Parts of the weights whose gradients are clipped each by itself."""
        return [list(self.parameters())]

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
