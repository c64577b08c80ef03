"""What `prescreen` runs on a GPU: the packed network, made once."""

import numpy as np
import pytest
import torch

from hdmil_lib.inference import prescreen
from hdmil_lib.inference.prescreen import packed
from hdmil_lib.models import LIPN


def test_a_network_is_packed_once_and_again_when_a_number_changes():
    lipn, other = LIPN().eval(), LIPN().eval()
    with torch.inference_mode():
        first = packed(lipn)
        assert packed(lipn) is first and packed(other) is not first
    with torch.no_grad():
        lipn.classifier.bias += 1
    assert packed(lipn) is not first
    torch.testing.assert_close(packed(lipn)[-1], first[-1] + 1)
    second = packed(lipn)
    lipn.load_state_dict(other.state_dict())
    assert packed(lipn) is not second


@pytest.mark.gpu
def test_scores_of_a_gpu_are_those_of_a_cpu_in_16_bits():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    torch.manual_seed(0)
    lipn = LIPN().eval()
    patches = np.random.default_rng(0).integers(0, 256, (5000, 16, 16, 3), dtype=np.uint8)
    expected = prescreen(lipn, patches)[1]
    np.testing.assert_allclose(prescreen(lipn.cuda(), patches)[1], expected, atol=1e-2)  # 11 bits a layer
