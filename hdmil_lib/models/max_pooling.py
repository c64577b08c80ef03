"""Max-Pooling: the tile of highest probability represents the bag."""

from torch import Tensor, nn

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.base import MILModel, MILOutput
from hdmil_lib.models.layers import Projection
from hdmil_lib.models.ragged import bag_argmax


class MaxPooling(MILModel[MILOutput]):
    """The logits of the tile of highest probability (Table 1).

    With two classes that is the probability of class 1 (tumor, or the second subtype); with more, the
    highest probability of any class.
    """

    def __init__(self, in_dim: int, n_classes: int, *, embed_dim: int = 512, dropout: float = 0.0):
        super().__init__(in_dim, n_classes)
        self.classifier = nn.Sequential(
            Projection(in_dim, embed_dim, dropout), nn.Linear(embed_dim, n_classes)
        )

    def classify(self, features: Tensor, segments: Segments, rows: Tensor | None = None) -> MILOutput:
        logits = self.tile_logits(features, rows)
        probabilities = logits.softmax(1)
        score = probabilities[:, 1] if self.n_classes == 2 else probabilities.amax(1)
        return MILOutput(logits=logits[bag_argmax(score, segments)], segments=segments)

    def tile_logits(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        """Class scores of the tiles, (N, C)."""
        projection, head = self.classifier
        return head(projection(features, *self.scale, rows=rows))
