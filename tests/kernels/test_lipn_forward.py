"""The pre-screening kernel: numbers of patches around its block, numbers of branches, extreme pixels."""

import pytest
import torch

from hdmil_lib.kernels import lipn_forward
from hdmil_lib.kernels.lipn_forward.gpu import BRANCHES, PATCHES
from hdmil_lib.kernels.lipn_forward.op import _forward
from hdmil_lib.models import LIPN


def draw(device, n_patches, n_classes=2, dtype=None):
    """Patches, and the weights of a network in this type, by default float32, or float16 on a GPU."""
    dtype = dtype or (torch.float32 if device == "cpu" else torch.float16)
    torch.manual_seed(0)
    network = LIPN(n_classes).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
    patches = torch.randint(256, (n_patches, 16, 16, 3), dtype=torch.uint8, device=device)
    return patches, [w.to(device) for w in network.packed(dtype)]


def assert_equal(patches, weights):
    tolerance = 1e-5 if weights[0].dtype == torch.float32 else 1e-2  # activations in float16 have 11 bits
    exact = lipn_forward(patches, [w.double() for w in weights], backend="torch")
    ours = lipn_forward(patches, weights, backend="triton")
    assert ours.shape == exact.shape
    assert (ours - exact).abs().max() <= tolerance * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("n_patches", [1, PATCHES - 1, PATCHES, PATCHES + 1, 300])
def test_patches_around_a_block(device, n_patches):
    assert_equal(*draw(device, n_patches))


@pytest.mark.parametrize("n_classes", [1, 3, BRANCHES, BRANCHES + 1])
def test_branches(device, n_classes):
    assert_equal(*draw(device, 3, n_classes))


@pytest.mark.parametrize("value", [0, 255])
def test_patches_of_one_value(device, value):
    patches, weights = draw(device, 5)
    assert_equal(torch.full_like(patches, value), weights)


def test_no_patches_and_patches_that_are_not_contiguous(device):
    patches, weights = draw(device, 6)
    assert lipn_forward(patches[:0], weights, backend="triton").shape == (0, 2)
    assert_equal(patches[::2], weights)


def test_the_operator_is_registered_correctly(device):
    torch.library.opcheck(_forward, draw(device, 2))


@pytest.mark.gpu
def test_float16_and_repetition(device):
    if device == "cpu":
        pytest.skip("needs a GPU: large, and races between programs do not occur in the interpreter")
    patches, weights = draw(device, 50_000, dtype=torch.float16)
    assert_equal(patches, weights)
    first = lipn_forward(patches, weights)
    assert all(torch.equal(first, lipn_forward(patches, weights)) for _ in range(20))
