"""The frozen LIPN as matrix products equals its convolutions and refuses invalid arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmil_lib.kernels import lipn_forward
from hdmil_lib.kernels.lipn_forward.reference import LAYERS
from hdmil_lib.models import LIPN


def network(n_classes=2, seed=0):
    """Make a LIPN in evaluation mode, with statistics and scales as after training."""
    torch.manual_seed(seed)
    lipn = LIPN(n_classes)
    for layer in lipn.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.2)
    return lipn.eval()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 20))
def test_matrices_are_the_network_in_evaluation(seed, n_classes, n_patches):
    lipn = network(n_classes, seed)
    patches = torch.randint(256, (n_patches, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(lipn_forward(patches, lipn.packed()), lipn(patches), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0, 255])
def test_patches_of_one_value(value):
    lipn, patches = network(), torch.full((3, 16, 16, 3), value, dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(lipn_forward(patches, lipn.packed()), lipn(patches), atol=1e-5, rtol=1e-5)


def test_no_patches():
    assert lipn_forward(torch.empty(0, 16, 16, 3, dtype=torch.uint8), network(3).packed()).shape == (0, 3)


def test_shapes_are_those_of_the_list():
    packed = network().packed()
    assert [tuple(w.shape) for w in packed[:-2:2]] == list(LAYERS.values())


def test_compiled_without_a_break():
    weights, patches = network().packed(), torch.randint(256, (4, 16, 16, 3), dtype=torch.uint8)
    compiled = torch.compile(lipn_forward, fullgraph=True)
    torch.testing.assert_close(compiled(patches, weights), lipn_forward(patches, weights))


WEIGHTS, PATCHES = network().packed(), torch.zeros(2, 16, 16, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("message", "call"),
    {
        "patches is torch.float32": lambda: lipn_forward(PATCHES.float(), WEIGHTS),
        "patches is torch.uint8 of shape": lambda: lipn_forward(PATCHES[:, :8], WEIGHTS),
        "weights has 3 tensors": lambda: lipn_forward(PATCHES, WEIGHTS[:3]),
        r"weights\[2\] has shape": lambda: lipn_forward(PATCHES, [*WEIGHTS[:2], WEIGHTS[4], *WEIGHTS[3:]]),
        r"weights\[5\] is torch.float64": lambda: lipn_forward(
            PATCHES, [w.double() if i == 5 else w for i, w in enumerate(WEIGHTS)]
        ),
        "GPU": lambda: lipn_forward(PATCHES, WEIGHTS, backend="triton"),
    }.items(),
)
def test_bad_input_is_refused_by_name(message, call):
    with pytest.raises(ValueError, match=message):
        call()
