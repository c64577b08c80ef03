"""The attention kernel: sizes around its blocks in tiles, hidden units, embedding and branches; dropout."""

import pytest
import torch
from comparison import assert_kernel_equals_reference

from hdmil_lib.kernels import gated_attention
from hdmil_lib.kernels.gated_attention.gpu import BRANCHES, EMBED, HIDDEN, TILES
from hdmil_lib.kernels.gated_attention.op import _forward
from hdmil_lib.kernels.random import key


def draw(device, n_tiles=20, embed_dim=24, hidden=20, n_branches=2, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [
        (hidden, embed_dim),
        (hidden,),
        (hidden, embed_dim),
        (hidden,),
        (n_branches, hidden),
        (n_branches,),
    ]
    weights = [torch.randn(s, dtype=dtype, device=device) / s[-1] ** 0.5 for s in shapes]
    return [torch.randn(n_tiles, embed_dim, dtype=dtype, device=device), *weights]


@pytest.mark.parametrize("n_tiles", [1, TILES - 1, TILES, TILES + 1, 300])
def test_tiles_around_a_block(device, n_tiles):
    assert_kernel_equals_reference(gated_attention, draw(device, n_tiles))


@pytest.mark.parametrize("hidden", [1, HIDDEN - 1, HIDDEN, HIDDEN + 1])
@pytest.mark.parametrize("embed_dim", [1, EMBED, EMBED + 1])
def test_widths_around_a_block(device, hidden, embed_dim):
    assert_kernel_equals_reference(gated_attention, draw(device, 5, embed_dim, hidden))


@pytest.mark.parametrize("n_branches", [1, 3, BRANCHES, BRANCHES + 1])
def test_branches(device, n_branches):
    assert_kernel_equals_reference(gated_attention, draw(device, n_branches=n_branches))


@pytest.mark.parametrize("dropout", [0.25, 0.9])
def test_dropout_drops_the_same_units_everywhere(device, dropout):
    assert_kernel_equals_reference(
        gated_attention, draw(device, 70, hidden=70), dropout=dropout, seed=2**35 + 1
    )


def test_no_tiles(device):
    tensors = [t.requires_grad_() for t in draw(device, 0)]
    logits = gated_attention(*tensors, backend="triton")
    logits.sum().backward()
    assert logits.shape == (0, 2)
    assert not any(t.grad.any() for t in tensors)


def test_arguments_that_are_not_contiguous(device):
    tensors = draw(device)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    assert not spread[1].is_contiguous()
    assert torch.equal(
        gated_attention(*spread, backend="triton"), gated_attention(*tensors, backend="triton")
    )


def test_the_operator_is_registered_correctly(device):
    tensors = [t.requires_grad_() for t in draw(device, 3, 4, 5)]
    torch.library.opcheck(_forward, (*tensors, 0.25, key(1, device)))


@pytest.mark.gpu
def test_bfloat16_and_repetition(device):
    if device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    tensors = draw(device, 20_000, 512, 256, 2, torch.bfloat16)
    # bfloat16 has 8 bits; the pre-activations of the backward pass are rounded to it too.
    assert_kernel_equals_reference(
        gated_attention, tensors, forward=2e-2, backward=2e-2, dropout=0.25, seed=1
    )
    first = gated_attention(*tensors)
    assert all(torch.equal(first, gated_attention(*tensors)) for _ in range(20))
