"""ABMIL: attention weights the tiles of a bag."""

from torch import Tensor, nn

from hdmil_lib.kernels import segment_softmax_pool
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.base import MILModel, MILOutput
from hdmil_lib.models.layers import GatedAttention, Projection


class ABMIL(MILModel[MILOutput]):
    """Attention-based MIL: one attention column, one bag embedding, one linear classifier (Table 1).

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        gated: Whether a sigmoid gate multiplies the tanh units of the attention.
        embed_dim: Width of the projected features.
        attention_dim: Width of the attention's hidden layer.
        dropout: Dropout rate after the projection and, if gated, on both factors of the attention.
    """

    attention: GatedAttention | nn.Sequential

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        *,
        gated: bool = True,
        embed_dim: int = 512,
        attention_dim: int = 128,
        dropout: float = 0.0,
    ):
        super().__init__(in_dim, n_classes)
        self.projection = Projection(in_dim, embed_dim, dropout)
        if gated:
            self.attention = GatedAttention(embed_dim, attention_dim, 1, dropout)
        else:
            self.attention = nn.Sequential(
                nn.Linear(embed_dim, attention_dim), nn.Tanh(), nn.Linear(attention_dim, 1)
            )
        self.classifier = nn.Linear(embed_dim, n_classes)

    def classify(self, features: Tensor, segments: Segments, rows: Tensor | None = None) -> MILOutput:
        embeddings = self.projection(features, *self.scale, rows=rows)
        if isinstance(self.attention, GatedAttention):
            bag, attention = self.attention.pool(embeddings, segments)
        else:
            attention = self.attention(embeddings)
            bag = segment_softmax_pool(embeddings, attention, None, segments)
        return MILOutput(logits=self.classifier(bag[:, 0]), segments=segments, attention=attention)
