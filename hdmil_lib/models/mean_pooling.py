"""Mean-Pooling: all tiles have the same weight."""

from torch import Tensor, nn

from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.base import MILModel, MILOutput
from hdmil_lib.models.layers import Projection
from hdmil_lib.models.ragged import bag_mean


class MeanPooling(MILModel[MILOutput]):
    """The mean of the logits of all tiles (Table 1)."""

    def __init__(self, in_dim: int, n_classes: int, *, embed_dim: int = 512, dropout: float = 0.0):
        super().__init__(in_dim, n_classes)
        self.classifier = nn.Sequential(
            Projection(in_dim, embed_dim, dropout), nn.Linear(embed_dim, n_classes)
        )

    def classify(self, features: Tensor, segments: Segments, rows: Tensor | None = None) -> MILOutput:
        logits = bag_mean(self.tile_logits(features, rows), segments)
        return MILOutput(logits=logits, segments=segments)

    def tile_logits(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        """Class scores of the tiles, (N, C)."""
        projection, head = self.classifier
        return head(projection(features, *self.scale, rows=rows))
