"""The first layer of the bag classifiers in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear

from hdmil_lib.kernels.gated_attention.reference import drop_level
from hdmil_lib.kernels.random import Seed, bits, bits_at


def tile_projection(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dropout: float,
    seed: Seed | None,
    positions: Tensor | None = None,
) -> Tensor:
    """Return the embeddings (N, E) that `kernels.tile_projection` describes."""
    number = weight.dtype if mean is None else torch.promote_types(features.dtype, mean.dtype)
    features = features.to(number)
    if mean is not None and std is not None:
        features = (features - mean) / std
    embeddings = linear(features, weight, bias).relu()
    if seed is None:
        return drop(embeddings, dropout, dropout > 0)
    return embeddings * kept(embeddings, dropout, seed, positions) / (1 - dropout)


def kept(like: Tensor, dropout: float, seed: Seed, positions: Tensor | None) -> Tensor:
    """Return which embeddings are kept, by half of the 32 random bits of their position and unit."""
    if positions is None:
        words = bits(seed, like.shape, like.device)
    else:
        words = bits_at(seed, positions, like.shape[1])
    return (words & 0xFFFF) >= drop_level(dropout)
