"""Attention, selection, and the pooling of teacher and student, one after the other (paper: DMIN)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdmil_lib.kernels.gated_attention.reference import gated_attention
from hdmil_lib.kernels.gumbel_mask.reference import gumbel_mask
from hdmil_lib.kernels.random import Seed
from hdmil_lib.kernels.segment_softmax_pool.reference import segment_softmax_pool
from hdmil_lib.kernels.segments import Segments


def self_distillation_pool(
    embeddings: Tensor,
    weights: Sequence[Tensor],
    segments: Segments | None,
    dropout: float,
    seed: Seed,
    noise_seed: Seed | None,
    temperature: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, logits and mask, as `kernels.self_distillation_pool` describes them.

    The teacher is a second set of branches that keep every tile.
    """
    tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias = weights
    logits = gated_attention(
        embeddings, tanh_weight, tanh_bias, gate_weight, gate_bias, score_weight, score_bias, dropout, seed
    )
    mask = gumbel_mask(logits, noise_seed, temperature, threshold)
    masks = torch.cat((mask, torch.ones_like(mask)), 1)
    pooled = segment_softmax_pool(embeddings, logits.repeat(1, 2), masks, segments)
    student, teacher = pooled.chunk(2, -2)
    return student, teacher, logits, mask
