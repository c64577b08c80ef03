"""DSMIL: tiles are weighted by their similarity to the tile of highest class score."""

from dataclasses import dataclass

from torch import Tensor, nn

from hdmil_lib.kernels import segment_softmax_pool
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.base import LossTerms, MILModel, MILOutput
from hdmil_lib.models.ragged import bag_argmax, pad, unpad


@dataclass(frozen=True, kw_only=True)
class DSMILOutput(MILOutput):
    """Output of DSMIL; `attention` is (N, C), the similarity to the critical tile of each class.

    Attributes:
        critical_logits: Score of each class at its critical tile, (B, C).
    """

    critical_logits: Tensor


class DSMIL(MILModel[DSMILOutput]):
    """Dual-stream MIL: max pooling finds critical tiles, attention to them pools the bag (Li et al. 2021).

    The critical tile of a class has the highest score of the instance classifier. For each class the raw
    features are pooled with the weights softmax(q q_critical / sqrt(attention_dim)) over the bag's tiles. A
    linear map of all C bag embeddings (the published convolution over their full length) gives the scores.

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        attention_dim: Width of the queries q and of their hidden layer.
    """

    inputs = ("features",)

    def __init__(self, in_dim: int, n_classes: int, *, attention_dim: int = 128):
        super().__init__(in_dim, n_classes)
        self.instance_classifier = nn.Linear(in_dim, n_classes)
        self.query = nn.Sequential(
            nn.Linear(in_dim, attention_dim), nn.ReLU(), nn.Linear(attention_dim, attention_dim), nn.Tanh()
        )
        self.classifier = nn.Linear(n_classes * in_dim, n_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def classify(self, features: Tensor, segments: Segments) -> DSMILOutput:
        features = self.prepare(features)
        scores = self.instance_classifier(features)
        critical = bag_argmax(scores, segments)
        query = self.query(features)
        similarity = pad(query, segments) @ query[critical].mT
        attention = unpad(similarity, segments) / query.shape[1] ** 0.5
        bag = segment_softmax_pool(features, attention, None, segments)
        return DSMILOutput(
            logits=self.classifier(bag.flatten(1)),
            segments=segments,
            attention=attention,
            critical_logits=scores.gather(0, critical),
        )

    def loss(self, output: DSMILOutput, labels: Tensor) -> LossTerms:
        """Compute the cross entropies of the bags and of their critical tiles, with weight 0.5 each."""
        return {
            "bag": 0.5 * self.cross_entropy(output.logits, labels),
            "critical": 0.5 * self.cross_entropy(output.critical_logits, labels),
        }
