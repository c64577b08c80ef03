"""DMIN's pass over the embeddings in one kernel, against its three operators one after the other."""

import pytest
import torch
from comparison import BACKWARD, FORWARD, assert_kernel_equals_reference
from test_gated_attention import draw

from hdmil_lib.kernels import self_distillation_pool
from hdmil_lib.kernels.random import key
from hdmil_lib.kernels.segments import Segments
from hdmil_lib.kernels.self_distillation_pool.gpu import TILES, backward_blocks
from hdmil_lib.kernels.self_distillation_pool.op import MAX_BRANCHES, _forward

BACKWARD_TILES = backward_blocks(torch.float32, "sm_80")[0]


def far_from_the_threshold(tensors, **options):
    """The same tensors; no tile is so close to the threshold that rounding decides about it."""
    *_, logits, _ = self_distillation_pool(*[t.double() for t in tensors], **options)
    assert (logits.sigmoid() - 0.5).abs().min() > 1e-6
    return tensors


@pytest.mark.parametrize("n_tiles", [1, BACKWARD_TILES + 1, TILES - 1, TILES, TILES + 1, 200])
def test_tiles_around_a_chunk(device, n_tiles):
    tensors = far_from_the_threshold(draw(device, n_tiles))
    assert_kernel_equals_reference(self_distillation_pool, tensors)


@pytest.mark.parametrize("n_branches", [1, 3, MAX_BRANCHES])
def test_ragged_bags_with_dropout_and_noise(device, n_branches):
    lengths = (3, 0, TILES + 1, 1)
    tensors = draw(device, sum(lengths), n_branches=n_branches)
    options = {"segments": Segments(lengths, device), "dropout": 0.25, "seed": 4, "noise_seed": 7}
    assert_kernel_equals_reference(self_distillation_pool, tensors, temperature=0.7, threshold=0.4, **options)


def test_sizes_that_no_block_divides(device):
    tensors = draw(device, 40, 37, 45)
    assert_kernel_equals_reference(self_distillation_pool, tensors, noise_seed=1)


def test_a_branch_that_selects_nothing_pools_its_best_tile(device):
    tensors = draw(device, 50)
    tensors[-1][0] = -30.0  # the bias of the first branch
    student, teacher, logits, mask = self_distillation_pool(*tensors, backend="triton")
    assert not mask[:, 0].any()
    assert torch.equal(student[0], tensors[0][logits[:, 0].argmax()])
    assert not torch.equal(student[0], teacher[0])
    assert_kernel_equals_reference(self_distillation_pool, tensors)


def test_tiles_that_are_in_no_bag(device):
    """As a GPU has them after a choice that does not wait; their gradients are zeros."""
    tensors = [t.requires_grad_() for t in draw(device, 60)]
    kept = torch.rand(60, device=device) < 0.5
    rows, open_ended = Segments((25, 35), device).select(kept, wait=False)
    _, exact = Segments((25, 35), device).select(kept, wait=True)
    results = []
    for chosen, segments in ((rows, open_ended), (rows[: exact.n_tiles], exact)):
        own = [tensors[0][chosen], *tensors[1:]]
        student, teacher, *_ = self_distillation_pool(*own, segments=segments, backend="triton")
        grads = torch.autograd.grad((student * 2 + teacher).square().sum(), tensors)
        results.append((student, teacher, *grads))
    for ours, wanted in zip(*results, strict=True):
        assert ours.shape == wanted.shape
        assert (ours - wanted).norm() <= (FORWARD + BACKWARD) * wanted.norm()
    assert not results[0][2][~kept].any()


def test_arguments_that_are_not_contiguous(device):
    tensors = draw(device, TILES + 1)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    both = (self_distillation_pool(*t, noise_seed=3, backend="triton") for t in (spread, tensors))
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(*both, strict=True))


def test_more_branches_than_a_product_has_run_one_operator_after_the_other(device):
    tensors = draw(device, 5, n_branches=MAX_BRANCHES + 1)
    assert self_distillation_pool(*tensors)[0].shape[0] == MAX_BRANCHES + 1
    with pytest.raises(ValueError, match="score_bias has 9 branches, the kernel takes at most 8"):
        self_distillation_pool(*tensors, backend="triton")


def test_the_operator_is_registered_correctly(device):
    tensors = [t.requires_grad_() for t in draw(device, 5, 4, 5)]
    bags = Segments((2, 3), device).chunks()
    torch.library.opcheck(_forward, (*tensors, *bags, 0.25, key(1, device), key(2, device), 0.7, 0.5))


@pytest.mark.gpu
def test_bfloat16_and_repetition(device):
    if device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    tensors = draw(device, 1000, 512, 256)
    narrow = [t.bfloat16().requires_grad_() for t in tensors]
    options = {"segments": Segments((400, 600), device), "dropout": 0.25, "seed": 1, "noise_seed": 2}

    def run():
        student, teacher, logits, mask = self_distillation_pool(*narrow, **options)
        return student, teacher, logits, *torch.autograd.grad((student + teacher).sum(), narrow)

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))
    _, teacher, logits, _ = self_distillation_pool(*tensors, **options, backend="torch")
    assert (run()[1] - teacher).norm() <= 0.02 * teacher.norm()
    assert (run()[2] - logits).norm() <= 0.02 * logits.norm()
