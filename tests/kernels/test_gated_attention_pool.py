"""Attention and pooling in one kernel: how the two operators are joined; each has tests of its own."""

import pytest
import torch
from comparison import assert_kernel_equals_reference
from test_gated_attention import draw

from hdmil_lib.kernels import gated_attention_pool
from hdmil_lib.kernels.gated_attention_pool.gpu import BRANCHES, TILES
from hdmil_lib.kernels.gated_attention_pool.op import _forward
from hdmil_lib.kernels.random import key
from hdmil_lib.kernels.segments import Segments


@pytest.mark.parametrize("n_tiles", [1, TILES - 1, TILES, TILES + 1, 300])
def test_tiles_around_a_chunk(device, n_tiles):
    assert_kernel_equals_reference(gated_attention_pool, draw(device, n_tiles))


@pytest.mark.parametrize("n_branches", [1, 3, BRANCHES + 1])
def test_masked_ragged_bags_with_dropout(device, n_branches):
    lengths = (3, 0, TILES + 1)
    tensors = draw(device, sum(lengths), n_branches=n_branches)
    mask = (torch.rand(sum(lengths), n_branches, device=device) < 0.5).float()
    mask[:3, 0] = 0
    options = {"segments": Segments(lengths, device), "dropout": 0.25, "seed": 4}
    assert_kernel_equals_reference(gated_attention_pool, (*tensors, mask), **options)


def test_arguments_that_are_not_contiguous(device):
    tensors = draw(device, TILES + 1)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    for ours, wanted in zip(
        *(gated_attention_pool(*t, backend="triton") for t in (spread, tensors)), strict=True
    ):
        assert torch.equal(ours, wanted)


def test_no_tiles(device):
    pooled, logits = gated_attention_pool(*draw(device, 0), backend="triton")
    assert pooled.shape == (2, 24)
    assert not pooled.any()
    assert logits.shape == (0, 2)


def test_the_operator_is_registered_correctly(device):
    tensors = [t.requires_grad_() for t in draw(device, 5, 4, 5)]
    torch.library.opcheck(
        _forward, (*tensors, None, *Segments((2, 3), device).chunks(), 0.25, key(1, device))
    )


@pytest.mark.gpu
def test_bfloat16_and_repetition(device):
    if device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    tensors = draw(device, 20_000, 512, 256, 2, torch.bfloat16)
    # bfloat16 has 8 bits.
    assert_kernel_equals_reference(gated_attention_pool, tensors, forward=2e-2, backward=3e-2)
    first = gated_attention_pool(*tensors)[0]
    assert all(torch.equal(first, gated_attention_pool(*tensors)[0]) for _ in range(20))
