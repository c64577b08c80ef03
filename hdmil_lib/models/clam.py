"""CLAM: attention MIL whose attention also selects tiles for instance classifiers."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.base import LossTerms, MILModel, MILOutput
from hdmil_lib.models.clustering import instance_clustering_loss
from hdmil_lib.models.layers import GatedAttention, Projected, Projection


@dataclass(frozen=True, kw_only=True)
class CLAMOutput(MILOutput):
    """Output of CLAM; `attention` is (N, 1) with a single branch, (N, C) with several.

    Attributes:
        projected: Embeddings (N, E), the inputs of the instance classifiers, and where they come from.
    """

    attention: Tensor
    projected: Projected


class CLAM(MILModel[CLAMOutput]):
    """Clustering-constrained attention MIL (Lu et al. 2021; Table 1).

    With a single branch (CLAM-SB) all class scores come from one bag embedding; with one branch per class
    (CLAM-MB) each class has its own attention and bag embedding.

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        multi_branch: Whether there is one branch per class (CLAM-MB) or a single one (CLAM-SB).
        embed_dim: Width of the projected features.
        attention_dim: Width of the attention's hidden layer.
        dropout: Dropout rate after the projection and on both factors of the attention.
        k: Number of tiles at each end of the attention that the instance classifiers learn from.
        subtyping: Whether every class has tiles of its own; see `instance_clustering_loss`.
        bag_weight: Weight of the bags' cross entropy in the loss; the clustering loss has 1 - bag_weight.

    Raises:
        ValueError: k is less than 1, or bag_weight is not between 0 and 1.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        *,
        multi_branch: bool = False,
        embed_dim: int = 512,
        attention_dim: int = 256,
        dropout: float = 0.25,
        k: int = 8,
        subtyping: bool = False,
        bag_weight: float = 0.7,
    ):
        if k < 1:
            raise ValueError(f"k is {k}, expected 1 tile or more at each end of the attention")
        if not 0 <= bag_weight <= 1:
            raise ValueError(f"bag_weight is {bag_weight}, expected a share between 0 and 1")
        super().__init__(in_dim, n_classes)
        self.k, self.subtyping, self.bag_weight = k, subtyping, bag_weight
        self.projection = Projection(in_dim, embed_dim, dropout)
        self.attention = GatedAttention(embed_dim, attention_dim, n_classes if multi_branch else 1, dropout)
        self.classifier = nn.Linear(embed_dim, n_classes)
        self.instance_heads = nn.ModuleList(nn.Linear(embed_dim, 2) for _ in range(n_classes))

    def classify(self, features: Tensor, segments: Segments, rows: Tensor | None = None) -> CLAMOutput:
        projected = self.projection.project(features, *self.scale, rows=rows)
        bag, attention = self.attention.pool(projected.embeddings, segments)
        bag = bag.expand(-1, self.n_classes, -1)  # a single branch is shared by all classes
        logits = torch.einsum("bce,ce->bc", bag, self.classifier.weight) + self.classifier.bias
        return CLAMOutput(logits=logits, segments=segments, attention=attention, projected=projected)

    def loss(self, output: CLAMOutput, labels: Tensor) -> LossTerms:
        """Compute the cross entropy of the bags and the clustering loss of their tiles."""
        clustering = instance_clustering_loss(
            self.instance_heads,
            partial(self.projection.pick, output.projected),
            output.attention.expand(-1, self.n_classes),
            labels,
            output.segments,
            k=self.k,
            subtyping=self.subtyping,
        )
        return {
            "bag": self.bag_weight * self.cross_entropy(output.logits, labels),
            "clustering": (1 - self.bag_weight) * clustering,
        }
