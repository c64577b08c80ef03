"""The interface of all bag classifiers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hdmil_lib.errors import BagError
from hdmil_lib.kernels.dispatch import check_device
from hdmil_lib.kernels.segments import Segments, check_segments, to_device

LossTerms = dict[str, Tensor]
"""Weighted terms of a loss by name, each a scalar; their sum is the loss."""


@dataclass(frozen=True, kw_only=True)
class MILOutput:
    """Output of a model for B bags with N tiles in total.

    Attributes:
        logits: Class scores of the bags before the softmax, (B, C).
        segments: The bags.
        attention: Attention logits before the softmax over tiles, (N, A); `None` without attention.
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
    """Base class of the bag classifiers; a subclass defines `classify` and, beyond cross entropy, `loss`.

    The features of some encoders differ in offset and spread between dimensions, which slows training down.
    `standardize` stores their mean and standard deviation with the weights, once before training. Without it
    the features are used as they are, as in the paper.

    Attributes:
        inputs: Fields of a `BagBatch` that `forward` takes. A model whose first layer is not a `Projection`
            has no "rows".
        reads_all: Whether the model needs the features of every tile. If not, its output has a `keep_ratio`,
            the share of tiles that it needs.
        in_dim: Width of the features, D.
        n_classes: Number of classes, C.
        class_weights: Weight of each class in the cross entropy, (C,), in training; `None` for equal ones.
    """

    inputs: ClassVar[tuple[str, ...]] = ("features", "rows")
    reads_all: ClassVar[bool] = True
    feature_mean: Tensor
    feature_std: Tensor
    class_weights: Tensor | None

    def __init__(self, in_dim: int, n_classes: int):
        super().__init__()
        self.in_dim = in_dim
        self.n_classes = n_classes
        self.register_buffer("feature_mean", torch.zeros(in_dim))
        self.register_buffer("feature_std", torch.ones(in_dim))
        self.register_buffer("class_weights", None, persistent=False)

    @torch.no_grad()
    def standardize(self, bags: Iterable[Tensor]) -> None:
        """Store mean and standard deviation over all tiles of the features (N, in_dim) of these bags."""
        tiles = torch.cat([bag.to(self.feature_mean.dtype) for bag in bags])
        self.feature_mean.copy_(tiles.mean(0))
        self.feature_std.copy_(tiles.std(0, correction=0).clamp(min=1e-6))

    def forward(
        self,
        features: Tensor,
        segments: Segments | None = None,
        *,
        rows: Tensor | None = None,
        **options: Any,
    ) -> Output:
        """Classify bags of any length.

        Args:
            features: Features of the tiles, bag after bag, (N, in_dim).
            segments: The B bags; `None` for one bag, B = 1.
            rows: Rows of the features of these tiles, int64 (N,), if there are more features than those of
                these bags, (M, in_dim).
            **options: Further keyword arguments of the model's `classify`.

        Raises:
            BagError: The features have another width, or a bag has no tiles.
            ValueError: The features are on another device than the model, or `segments` does not fit them.
        """
        self.check_features(features)
        if rows is not None:
            check_device("rows", rows, features.device, "features")
            options["rows"] = rows
        return self.classify(features, bags_of(features if rows is None else rows, segments), **options)

    @abstractmethod
    def classify(self, features: Tensor, segments: Segments, *args: Any, **options: Any) -> Output:
        """Classify B bags, given features (N, in_dim) as they are stored; models may add keyword arguments.

        Their first layer standardizes the features by `scale`, or `prepare` does. Where `inputs` has "rows",
        features may be (M, in_dim), with the rows of these tiles as `rows`.
        """

    def loss(self, output: Output, labels: Tensor) -> LossTerms:
        """Compute the weighted terms of the loss, each a mean over the bags; the loss is their sum.

        Args:
            output: Output of `forward`.
            labels: Class indices, int64 (B,), on the host or with the output.
        """
        return {"bag": self.cross_entropy(output.logits, labels)}

    def cross_entropy(self, logits: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross entropy of logits (B, C) with labels (B,), times the class weights if there are any.

        The mean is over the bags, and not over their weights: with one bag per step it would cancel them.
        """
        if self.class_weights is None:
            return cross_entropy(logits, labels, reduction=reduction)
        labels = to_device(labels, logits.device)
        losses = self.class_weights[labels] * F.cross_entropy(logits, labels, reduction="none")
        return losses if reduction == "none" else losses.mean()

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer; the gradients of each group are clipped by their own norm."""
        return [{"params": list(self.parameters())}]

    @property
    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by which features are standardized, (in_dim,)."""
        return self.feature_mean, self.feature_std

    def prepare(self, features: Tensor) -> Tensor:
        """Standardize features (N, in_dim)."""
        return (features.to(self.feature_mean.dtype) - self.feature_mean) / self.feature_std

    def check_features(self, features: Tensor) -> None:
        """Check that features (N, in_dim) fit the model.

        Raises:
            BagError: The features have another shape, or there are no tiles.
            ValueError: They are on another device than the model.
        """
        if features.ndim != 2 or features.shape[1] != self.in_dim:
            raise BagError(
                f"features have shape {tuple(features.shape)}, expected (n_tiles, {self.in_dim}): "
                "the bag was made by another encoder than the model; extract it again with the model's"
            )
        if len(features) == 0:
            raise BagError("the bag has no tiles: a model needs at least one; check the tissue mask")
        check_device("features", features, self.feature_mean.device, "the model")


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """PyTorch's cross entropy of logits (B, C), with labels (B,) on the host or with the logits."""
    return F.cross_entropy(logits, to_device(labels, logits.device), **options)


def bags_of(features: Tensor, segments: Segments | None) -> Segments:
    """Segments of the features (N, D) or rows (N,) of tiles, checked: one bag if there are none.

    Raises:
        BagError: A bag has no tiles.
        ValueError: The segments do not fit the features.
    """
    if segments is None:
        segments = Segments([len(features)], features.device)
    check_segments(segments, len(features), features.device)
    if segments.exact and min(segments.lengths) == 0:
        raise BagError("a bag has no tiles: a model needs at least one; check the tissue mask")
    return segments
