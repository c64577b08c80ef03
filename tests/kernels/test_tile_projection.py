"""The first layer in one kernel: sizes around its blocks, standardization, dropout, half precision."""

import pytest
import torch
from comparison import assert_kernel_equals_reference

from hdmil_lib.kernels import tile_projection
from hdmil_lib.kernels.random import key
from hdmil_lib.kernels.tile_projection.gpu import backward_blocks, blocks
from hdmil_lib.kernels.tile_projection.op import _forward

TILES, EMBED, FEATURES, _ = blocks(torch.float32, torch.float32, "sm_80")
SHARE = backward_blocks(torch.float32, "sm_80")[0]


def draw(device, n_tiles=20, n_features=24, embed_dim=20):
    """Features that are far from standard, weight, bias, mean and standard deviation."""
    torch.manual_seed(0)
    std, mean = torch.rand(n_features, device=device) + 0.5, torch.randn(n_features, device=device) * 3
    features = torch.randn(n_tiles, n_features, device=device) * std + mean
    weight = torch.randn(embed_dim, n_features, device=device) / n_features**0.5
    return [features, weight, torch.randn(embed_dim, device=device), mean, std]


def with_constants(*tensors, mean, std, **options):
    """`tile_projection` whose mean and standard deviation get no gradient."""
    number = tensors[0].dtype
    return tile_projection(*tensors, mean.to(number), std.to(number), **options)


def assert_equal(tensors, **options):
    *leaves, mean, std = tensors
    assert_kernel_equals_reference(with_constants, leaves, mean=mean, std=std, **options)


@pytest.mark.parametrize("n_tiles", [1, SHARE + 1, TILES - 1, TILES, TILES + 1, 300])
def test_tiles_around_a_block(device, n_tiles):
    assert_equal(draw(device, n_tiles))


@pytest.mark.parametrize("n_features", [1, FEATURES, FEATURES + 1, 2 * TILES + 1])
@pytest.mark.parametrize("embed_dim", [1, EMBED, EMBED + 1])
def test_widths_around_a_block(device, n_features, embed_dim):
    assert_equal(draw(device, 5, n_features, embed_dim))


@pytest.mark.parametrize("dropout", [0.25, 0.9])
def test_dropout_is_a_function_of_the_seed(device, dropout):
    tensors = draw(device, 70)
    assert_equal(tensors, dropout=dropout, seed=3)
    first, same, other = (
        tile_projection(*tensors, dropout=dropout, seed=s, backend="triton") for s in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    active = tile_projection(*tensors, backend="triton") > 0
    dropped = (first == 0)[active].float().mean()
    assert abs(dropped - dropout) < 4 * (dropout * (1 - dropout) / active.sum()) ** 0.5


@pytest.mark.parametrize("n_picked", [1, SHARE + 1, TILES + 1])
def test_tiles_are_read_where_they_lie(device, n_picked):
    """In any order, more than once, and with the gradient of these tiles alone."""
    tensors = draw(device, 2 * TILES)
    rows = torch.randint(2 * TILES, (n_picked,), device=device)
    assert_equal(tensors, rows=rows, dropout=0.25, seed=3)
    assert_equal(tensors, rows=rows)


def test_a_tile_that_is_projected_again_has_the_same_embedding(device):
    tensors = draw(device, TILES + 9)
    rows = torch.randperm(TILES + 9, device=device)
    options = {"dropout": 0.5, "seed": 7, "backend": "triton"}
    batch = tile_projection(*tensors, rows=rows, **options)
    picked = torch.tensor([TILES + 3, 0, 5, 0], device=device)
    again = tile_projection(*tensors, rows=rows[picked], positions=picked, **options)
    assert torch.equal(again, batch[picked])
    assert_equal(tensors, rows=rows[picked], positions=picked, dropout=0.5, seed=7)


def test_features_as_they_are_and_no_bias(device):
    features, weight, bias, *_ = draw(device)
    assert_kernel_equals_reference(tile_projection, (features, weight, bias))
    assert_kernel_equals_reference(tile_projection, (features, weight))


def test_features_in_half_precision_are_read_without_loss(device):
    features, *others = draw(device, 40)
    half = features.half()
    ours, wanted = (tile_projection(f, *others, backend="triton") for f in (half, half.float()))
    assert torch.equal(ours, wanted)
    assert ours.dtype == torch.float32


def test_no_tiles(device):
    _, weight, bias, mean, std = draw(device)
    weight.requires_grad_()
    embeddings = tile_projection(torch.empty(0, 24, device=device), weight, bias, mean, std, backend="triton")
    assert embeddings.shape == (0, 20)
    assert not torch.autograd.grad(embeddings.sum(), weight)[0].any()


def test_arguments_that_are_not_contiguous(device):
    tensors = draw(device, TILES + 1)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    ours, wanted = (tile_projection(*t, backend="triton") for t in (spread, tensors))
    assert torch.equal(ours, wanted)


def test_the_operator_is_registered_correctly(device):
    features, weight, bias, mean, std = draw(device, 5)
    leaves = (features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
    positions = torch.arange(9, 4, -1, device=device)
    for rows, places in ((None, None), (torch.tensor([3, 0, 3], device=device), positions[:3])):
        torch.library.opcheck(_forward, (*leaves, mean, std, rows, 0.25, key(1, device), places))


@pytest.mark.gpu
def test_bfloat16_and_repetition(device):
    if device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    features, weight, bias, mean, std = draw(device, 1000, 320, 512)
    narrow = (weight.bfloat16().requires_grad_(), bias.bfloat16().requires_grad_())

    def run():
        embeddings = tile_projection(features.half(), *narrow, mean, std, dropout=0.25, seed=1)
        return embeddings, *torch.autograd.grad(embeddings.float().square().sum(), narrow)

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))
    wanted = tile_projection(features, weight, bias, mean, std, dropout=0.25, seed=1, backend="torch")
    assert (run()[0] - wanted).norm() <= 0.02 * wanted.norm()
