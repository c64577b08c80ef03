"""S4MIL: a diagonal state space model along the tiles, then max pooling."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from hdmil_lib.kernels import s4d_convolution
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.base import MILModel, MILOutput
from hdmil_lib.models.layers import Projection
from hdmil_lib.models.ragged import pad, unpad


class S4MIL(MILModel[MILOutput]):
    """Projection, layer norm, one S4D layer, maximum over tiles, linear classifier (Fillioux et al. 2023).

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        embed_dim: Width of the projected features.
        n_states: Number of real states per channel, even: half as many conjugate pairs.
        dropout: Dropout rate after the projection and within the S4D layer.

    Raises:
        ValueError: `n_states` is odd.
    """

    def __init__(
        self, in_dim: int, n_classes: int, *, embed_dim: int = 512, n_states: int = 32, dropout: float = 0.0
    ):
        super().__init__(in_dim, n_classes)
        self.projection = Projection(in_dim, embed_dim, dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.sequence = S4DLayer(embed_dim, n_states, dropout)
        self.classifier = nn.Linear(embed_dim, n_classes)

    def classify(self, features: Tensor, segments: Segments, rows: Tensor | None = None) -> MILOutput:
        tiles = self.sequence(self.norm(self.projection(features, *self.scale, rows=rows)), segments)
        bag = pad(tiles, segments, -torch.inf).amax(1)
        return MILOutput(logits=self.classifier(bag), segments=segments)


class S4DLayer(nn.Module):
    """S4D along the tiles of each bag, GELU, dropout and a gated linear unit (Gu et al. 2022).

    Initial values are those of S4D-Lin: A_n = -1/2 + i pi n, with steps dt log-uniform from 0.001 to 0.1.

    Args:
        dim: Width, D.
        n_states: Number of real states per channel, even: S = n_states / 2 conjugate pairs.
        dropout: Dropout rate after the GELU.

    Raises:
        ValueError: `n_states` is odd.
    """

    SHORTEST, LONGEST = 0.001, 0.1

    def __init__(self, dim: int, n_states: int = 32, dropout: float = 0.0):
        super().__init__()
        if n_states % 2:
            raise ValueError(f"n_states is {n_states}, expected an even number: states come in pairs")
        pairs = n_states // 2
        low, high = math.log(self.SHORTEST), math.log(self.LONGEST)
        self.log_step = nn.Parameter(low + (high - low) * torch.rand(dim))
        self.decay_log = nn.Parameter(torch.full((dim, pairs), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(pairs).float().repeat(dim, 1))
        self.readout = nn.Parameter(torch.randn(dim, pairs, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(dim))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GLU())

    def forward(self, tiles: Tensor, segments: Segments) -> Tensor:
        """(N, D) to (N, D); the padding behind shorter bags has no effect, since S4D is causal."""
        parameters = (self.log_step, self.decay_log, self.frequency, self.readout, self.skip)
        read = unpad(s4d_convolution(pad(tiles, segments), *parameters), segments)
        return self.output(self.dropout(gelu(read)))
