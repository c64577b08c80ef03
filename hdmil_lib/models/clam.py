"""CLAM: attention MIL whose attention also sorts tiles for instance classifiers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.base import LossTerms, MILModel, MILOutput
from hdmil_lib.models.clustering import instance_clustering_loss
from hdmil_lib.models.layers import GatedAttention, projection


@dataclass(frozen=True, kw_only=True)
class CLAMOutput(MILOutput):
    """What CLAM says about bags; `attention` has one column (SB) or one a class (MB).

    Attributes:
        embeddings: Projected features, (N, E), which the instance classifiers take.
    """

    embeddings: Tensor


class CLAM(MILModel[CLAMOutput]):
    """Clustering-constrained attention MIL, with a single branch or one a class (Lu et al. 2021; Table 1).

    The single branch (CLAM-SB) pools one bag embedding, of which a linear classifier makes all class scores;
    with several (CLAM-MB) each class has its own attention, embedding and score.

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        multi_branch: CLAM-MB; otherwise CLAM-SB.
        embed_dim: Width of the projected features.
        attention_dim: Width of the attention's hidden layer.
        dropout: After the projection and on both factors of the attention.
        k: Tiles at each end of the attention that the instance classifiers learn from.
        subtyping: Every class has tiles of its own; see `instance_clustering_loss`.
        bag_weight: Share of the bag's cross entropy in the loss; the rest is the clustering loss.

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
        self.projection = projection(in_dim, embed_dim, dropout)
        self.attention = GatedAttention(embed_dim, attention_dim, n_classes if multi_branch else 1, dropout)
        self.classifier = nn.Linear(embed_dim, n_classes)
        self.instance_heads = nn.ModuleList(nn.Linear(embed_dim, 2) for _ in range(n_classes))

    def classify(self, features: Tensor, segments: Segments) -> CLAMOutput:
        embeddings = self.projection(features)
        bag, attention = self.attention.pool(embeddings, segments)
        bag = bag.expand(-1, self.n_classes, -1)  # a single branch serves every class
        logits = torch.einsum("bce,ce->bc", bag, self.classifier.weight) + self.classifier.bias
        return CLAMOutput(logits=logits, segments=segments, attention=attention, embeddings=embeddings)

    def loss(self, output: CLAMOutput, labels: Tensor) -> LossTerms:
        """Cross entropy of the bags and the clustering loss of their tiles, weighted."""
        clustering = instance_clustering_loss(
            self.instance_heads,
            output.embeddings,
            output.attention.expand(-1, self.n_classes),
            labels,
            output.segments,
            k=self.k,
            subtyping=self.subtyping,
        )
        return {
            "bag": self.bag_weight * cross_entropy(output.logits, labels),
            "clustering": (1 - self.bag_weight) * clustering,
        }
