"""The first layer of the bag classifiers in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear

from hdmil_lib.kernels.gated_attention.reference import drop_level
from hdmil_lib.kernels.random import Seed, bits


def tile_projection(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dropout: float,
    seed: Seed | None,
) -> Tensor:
    """Return the embeddings (N, E) that `kernels.tile_projection` describes."""
    number = weight.dtype if mean is None else torch.promote_types(features.dtype, mean.dtype)
    features = features.to(number)
    if mean is not None and std is not None:
        features = (features - mean) / std
    embeddings = linear(features, weight, bias).relu()
    if seed is None:
        return drop(embeddings, dropout, dropout > 0)
    return embeddings * kept(embeddings, dropout, seed) / (1 - dropout)


def kept(like: Tensor, dropout: float, seed: Seed) -> Tensor:
    """Return which embeddings are kept, by half of the 32 random bits of their position."""
    return (bits(seed, like.shape, like.device) & 0xFFFF) >= drop_level(dropout)
