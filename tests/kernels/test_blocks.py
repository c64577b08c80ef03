"""Blocks of the targets that differ from the usual ones, and which target a GPU is taken for."""

from types import SimpleNamespace

import pytest
import test_gated_attention_pool
import test_lipn_forward
import test_s4d_convolution
import torch
from comparison import assert_kernel_equals_reference

from hdmil_lib.kernels import blocks, s4d_convolution


@pytest.mark.parametrize("target", ["sm_75", "sm_90", "gfx1100"])
def test_a_kernel_with_the_blocks_of_a_target_equals_its_reference(target, device, monkeypatch):
    monkeypatch.setattr(blocks, "INTERPRETED", target)
    test_lipn_forward.test_branches(device, 3)
    test_gated_attention_pool.test_masked_ragged_bags_with_dropout(device, 2)
    assert_kernel_equals_reference(s4d_convolution, test_s4d_convolution.draw(device, 600, 3, 4))


@pytest.mark.parametrize(
    ("capability", "target"),
    [((7, 0), "sm_75"), ((7, 5), "sm_75"), ((8, 0), "sm_80"), ((8, 6), "sm_89"), ((8, 9), "sm_89"),
     ((9, 0), "sm_90"), ((10, 0), "sm_90"), ((12, 0), "sm_120"), ((12, 1), "sm_120")],
)  # fmt: skip
def test_the_target_of_a_gpu_of_nvidia(capability, target, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert blocks._of_gpu.__wrapped__(torch.device("cuda", 0)) == target


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("gfx90a:sramecc+:xnack-", "gfx942"),
        ("gfx942", "gfx942"),
        ("gfx1030", "gfx1100"),
        ("gfx1201", "gfx1100"),
    ],
)
def test_the_target_of_a_gpu_of_amd(name, target, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    assert blocks._of_gpu.__wrapped__(torch.device("cuda", 0)) == target
