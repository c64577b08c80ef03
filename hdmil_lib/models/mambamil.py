"""MambaMIL: selective state space models along the tiles, in order and in strides, then attention pooling."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from hdmil_lib.kernels import segment_softmax_pool, selective_scan
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.models.base import MILModel, MILOutput
from hdmil_lib.models.layers import Projection
from hdmil_lib.models.ragged import pad, unpad


class MambaMIL(MILModel[MILOutput]):
    """Projection, residual layers of SR-Mamba, attention pooling, linear classifier (Yang et al. 2024).

    Args:
        in_dim: Width of the features.
        n_classes: Number of classes.
        embed_dim: Width of the projected features.
        n_layers: Number of layers, each a layer norm and an SR-Mamba.
        n_states: Number of states per channel.
        conv_size: Kernel size of the causal convolution before each scan.
        expand: Number of channels of the scans, as a multiple of `embed_dim`.
        rate: Stride of the second scan; 10, and 5 for lung cancer, as published.
        attention_dim: Width of the attention's hidden layer.
        dropout: Dropout rate after the projection.

    Raises:
        ValueError: `rate` is not positive.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        *,
        embed_dim: int = 512,
        n_layers: int = 2,
        n_states: int = 16,
        conv_size: int = 4,
        expand: int = 2,
        rate: int = 10,
        attention_dim: int = 128,
        dropout: float = 0.25,
    ):
        super().__init__(in_dim, n_classes)
        if rate < 1:
            raise ValueError(f"rate is {rate}, expected a stride of at least 1")
        self.rate = rate
        self.projection = Projection(in_dim, embed_dim, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(n_layers))
        self.mixers = nn.ModuleList(SRMamba(embed_dim, n_states, conv_size, expand) for _ in range(n_layers))
        self.norm = nn.LayerNorm(embed_dim)
        self.attention = nn.Sequential(
            nn.Linear(embed_dim, attention_dim), nn.Tanh(), nn.Linear(attention_dim, 1)
        )
        self.classifier = nn.Linear(embed_dim, n_classes)

    def classify(self, features: Tensor, segments: Segments, rows: Tensor | None = None) -> MILOutput:
        tiles, order = self.projection(features, *self.scale, rows=rows), strided_order(segments, self.rate)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            tiles = tiles + mixer(norm(tiles), order, segments)
        tiles = self.norm(tiles)
        attention = self.attention(tiles)
        bag = segment_softmax_pool(tiles, attention, None, segments)
        return MILOutput(logits=self.classifier(bag[:, 0]), segments=segments, attention=attention)


def strided_order(segments: Segments, rate: int) -> Tensor:
    """Rows (N,) of the tiles of each bag in the order 0, rate, 2 rate, ..., 1, 1 + rate, ...; int64."""
    bag, place = segments.bag, segments.place
    return ((bag * rate + place % rate) * segments.longest + place // rate).argsort()


class SRMamba(nn.Module):
    """Two Mamba branches between shared projections, one along the tiles and one along another order of them.

    Args:
        dim: Width of the tiles.
        n_states: Number of states per channel.
        conv_size: Kernel size of the causal convolution.
        expand: Number of channels of a branch, as a multiple of `dim`.
    """

    def __init__(self, dim: int, n_states: int = 16, conv_size: int = 4, expand: int = 2):
        super().__init__()
        channels, rank = expand * dim, math.ceil(dim / 16)
        self.input = nn.Linear(dim, 2 * channels, bias=False)
        self.straight = MambaBranch(channels, n_states, conv_size, rank)
        self.strided = MambaBranch(channels, n_states, conv_size, rank)
        self.output = nn.Linear(channels, dim, bias=False)

    def forward(self, tiles: Tensor, order: Tensor, segments: Segments) -> Tensor:
        """Tiles (N, dim) to (N, dim); `order` (N,) lists the rows of the tiles for the second branch."""
        inputs, gate = self.input(tiles).chunk(2, 1)
        read = self.straight(inputs, segments) + self.strided(inputs[order], segments)[order.argsort()]
        return self.output(read * silu(gate))


class MambaBranch(nn.Module):
    """Causal convolution, SiLU and selective scan along the tiles of each bag (Gu & Dao 2023).

    Initial values: A_n = -n, skip 1, and steps delta log-uniform from 0.001 to 0.1.

    Args:
        channels: Number of channels, D.
        n_states: Number of states per channel, S.
        conv_size: Kernel size of the convolution.
        rank: Rank of the projection to the steps.
    """

    SHORTEST, LONGEST = 0.001, 0.1

    def __init__(self, channels: int, n_states: int, conv_size: int, rank: int):
        super().__init__()
        self.sizes = (rank, n_states, n_states)
        self.convolution = nn.Conv1d(channels, channels, conv_size, groups=channels, padding=conv_size - 1)
        self.selection = nn.Linear(channels, sum(self.sizes), bias=False)
        self.step = nn.Linear(rank, channels)
        self.decay_log = nn.Parameter(torch.arange(1, n_states + 1).float().log().repeat(channels, 1))
        self.skip = nn.Parameter(torch.ones(channels))
        low, high = math.log(self.SHORTEST), math.log(self.LONGEST)
        with torch.no_grad():
            self.step.weight.uniform_(-(rank**-0.5), rank**-0.5)
            steps = self.step.bias.uniform_(low, high).exp()
            self.step.bias.copy_(steps + (-steps).expm1().neg().log())  # inverse of softplus

    def forward(self, tiles: Tensor, segments: Segments) -> Tensor:
        """(N, D) to (N, D); padding behind shorter bags has no effect, since all operations are causal."""
        padded = pad(tiles, segments)
        tiles = silu(self.convolution(padded.mT)[..., : padded.shape[1]].mT)
        low_rank, into, out = self.selection(tiles).split(self.sizes, 2)
        steps = softplus(self.step(low_rank))
        read = selective_scan(tiles, steps, -self.decay_log.exp(), into, out, self.skip)
        return unpad(read, segments)
