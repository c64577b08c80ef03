"""The pooling kernels: chunks and bags of all lengths, masks that keep nothing, extreme logits."""

import pytest
import torch
from comparison import assert_kernel_equals_reference

from hdmil_lib.kernels import segment_softmax_pool
from hdmil_lib.kernels.segment_softmax_pool.gpu import BRANCHES, EMBED, TILES
from hdmil_lib.kernels.segment_softmax_pool.op import _forward
from hdmil_lib.kernels.segments import Segments


def draw(device, n_tiles, embed_dim=20, n_branches=2, dtype=torch.float32):
    torch.manual_seed(0)
    embeddings = torch.randn(n_tiles, embed_dim, dtype=dtype, device=device)
    logits = torch.randn(n_tiles, n_branches, dtype=dtype, device=device)
    return embeddings, logits, (torch.rand_like(logits) < 0.5).to(dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_tiles", [1, TILES - 1, TILES, TILES + 1, 300])
def test_tiles_around_a_chunk(device, n_tiles, masked):
    tensors = draw(device, n_tiles)
    assert_kernel_equals_reference(segment_softmax_pool, tensors if masked else tensors[:2])


@pytest.mark.parametrize("embed_dim", [1, EMBED - 1, EMBED, EMBED + 1])
@pytest.mark.parametrize("n_branches", [1, 3, BRANCHES, BRANCHES + 1])
def test_widths_around_a_block(device, embed_dim, n_branches):
    assert_kernel_equals_reference(segment_softmax_pool, draw(device, 9, embed_dim, n_branches))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "lengths", [(5, 0, 3), (0, 0), (TILES, TILES), (1, TILES + 1, 0, 2 * TILES + 3), (300, 1)], ids=str
)
def test_ragged_bags(device, lengths, masked):
    tensors = draw(device, sum(lengths))
    options = {"segments": Segments(lengths, device)}
    assert_kernel_equals_reference(segment_softmax_pool, tensors if masked else tensors[:2], **options)


def test_a_bag_without_tiles_is_pooled_to_zeros(device):
    pooled = segment_softmax_pool(*draw(device, 4), Segments((0, 4, 0), device), backend="triton")
    assert not pooled[[0, 2]].any()
    assert pooled[1].all()


@pytest.mark.parametrize("lengths", [(7,), (3, TILES + 5, 2)], ids=str)
def test_a_branch_that_keeps_nothing_pools_its_best_tile(device, lengths):
    embeddings, logits, mask = draw(device, sum(lengths))
    mask[:, 0] = 0
    logits[1:3, 0] = logits[:, 0].max()  # the first of equal logits counts
    options = {"segments": Segments(lengths, device)}
    pooled = segment_softmax_pool(embeddings, logits, mask, **options, backend="triton")
    torch.testing.assert_close(pooled[0, 0], embeddings[logits[: lengths[0], 0].argmax()])
    assert_kernel_equals_reference(segment_softmax_pool, (embeddings, logits, mask), **options)


def test_logits_far_apart_neither_overflow_nor_vanish(device):
    embeddings, logits, mask = draw(device, 2 * TILES)
    logits[0], logits[TILES + 1], mask[0], mask[TILES + 1] = 300.0, -300.0, 0.0, 1.0
    assert_kernel_equals_reference(segment_softmax_pool, (embeddings, logits, mask))
    assert_kernel_equals_reference(segment_softmax_pool, (embeddings, logits))


def test_tensors_that_are_not_contiguous(device):
    tensors = draw(device, 10)
    spread = [t.T.contiguous().T for t in tensors]
    assert torch.equal(
        segment_softmax_pool(*spread, backend="triton"), segment_softmax_pool(*tensors, backend="triton")
    )


@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_is_registered_correctly(device, masked):
    embeddings, logits, mask = (t.requires_grad_() for t in draw(device, 5))
    bags = Segments((2, 3), device).chunks()
    torch.library.opcheck(_forward, (embeddings, logits, mask if masked else None, *bags))


@pytest.mark.gpu
def test_bfloat16_and_repetition(device):
    if device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    tensors = draw(device, 30_000, 512, 2, torch.bfloat16)
    options = {"segments": Segments((20_000, 10_000), device)}
    # Weights, embeddings and outputs in bfloat16 have 8 bits each.
    assert_kernel_equals_reference(segment_softmax_pool, tensors, forward=2e-2, backward=2e-2, **options)
    first = segment_softmax_pool(*tensors, **options)
    assert all(torch.equal(first, segment_softmax_pool(*tensors, **options)) for _ in range(20))
