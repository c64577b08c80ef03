"""LIPN: the size the paper states, the input it takes, one patch at a time."""

import pytest
import torch
from torch import nn

from hdmil_lib.errors import BagError
from hdmil_lib.models import LIPN
from hdmil_lib.models.lipn import DepthwiseConv


def patches(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 16, 16, 3), generator=generator, dtype=torch.uint8)


def multiply_adds(model, example):
    """Weights of each convolution and linear layer times the places where it is applied."""
    counted = []

    def count(layer, _, output):
        places = output.shape[2] * output.shape[3] if isinstance(layer, nn.Conv2d) else 1
        counted.append(layer.weight.numel() * places)

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model(example)
    for hook in hooks:
        hook.remove()
    return sum(counted)


def test_size_and_cost_are_those_of_the_paper():
    model = LIPN(n_classes=2).eval()
    assert sum(p.numel() for p in model.parameters()) == 33_898
    assert multiply_adds(model, patches(1)) == 127_648


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_one_logit_for_each_patch_and_branch(n, training, n_classes):
    logits = LIPN(n_classes).train(training)(patches(n))
    assert logits.shape == (n, n_classes)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_pixels_are_centered():
    """uint8 / 255 - 0.5, channels first: what reaches the first convolution."""
    model, seen = LIPN().eval(), []
    model.stem[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    example = patches(3)
    model(example)
    expected = example.double().numpy().transpose(0, 3, 1, 2) / 255 - 0.5
    torch.testing.assert_close(seen[0].double(), torch.from_numpy(expected), rtol=0, atol=1e-7)


def test_in_evaluation_a_patch_is_judged_alone():
    model = LIPN().eval()
    example = patches(20)
    alone = torch.cat([model(p[None]) for p in example])
    torch.testing.assert_close(model(example), alone, rtol=1e-4, atol=1e-6)


def test_one_patch_trains_on_the_running_statistics_and_leaves_them():
    model = LIPN()
    for seed in range(3):
        model(patches(50, seed))
    before = {name: b.clone() for name, b in model.named_buffers()}
    logits = model.train()(patches(1))
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    torch.testing.assert_close(logits, model.eval()(patches(1)))


def test_it_learns_to_tell_dark_patches_from_bright_ones():
    torch.manual_seed(0)
    brightness = torch.rand(64) * 200
    example = (brightness[:, None, None, None] + 50 * torch.rand(64, 16, 16, 3)).to(torch.uint8)
    target = (brightness > 100).float()
    model = LIPN()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(example)[:, 0], target).backward()
        optimizer.step()
    # Chance is 0.5; patches at the boundary may go either way.
    assert ((model.eval()(example)[:, 0] > 0) == target.bool()).float().mean() > 0.9


@pytest.mark.parametrize(
    "wrong",
    [patches(2).float(), patches(2).permute(0, 3, 1, 2), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)],
    ids=["float", "channels first", "32 pixels"],
)
def test_other_patches_are_refused_by_shape_and_type(wrong):
    with pytest.raises(BagError, match=r"expected torch.uint8 of shape \(n_tiles, 16, 16, 3\)"):
        LIPN()(wrong)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_convolution_of_small_maps_is_the_convolution(size, stride, kernel):
    torch.manual_seed(0)
    conv = DepthwiseConv(4, 4, kernel, stride, padding=kernel // 2, groups=4, bias=False).double()
    maps = torch.randn(5, 4, size, size, dtype=torch.float64, requires_grad=True)
    wanted = nn.functional.conv2d(maps, conv.weight, None, stride, kernel // 2, groups=4)
    torch.testing.assert_close(conv(maps), wanted)
    inputs = (maps, conv.weight)
    grads = [torch.autograd.grad(output.square().sum(), inputs) for output in (conv(maps), wanted)]
    torch.testing.assert_close(*grads)
