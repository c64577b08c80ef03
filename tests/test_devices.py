"""Devices by name, on machines with and without GPUs."""

import pytest
import torch

from hdmil_lib.devices import prefer, resolve, resolve_all
from hdmil_lib.errors import HDMILError


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has a number of CUDA GPUs, the last of which is the current one."""

    def pretend(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: number - 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return pretend


def test_auto_is_the_first_gpu_or_the_cpu(gpus, monkeypatch):
    gpus(0)
    assert resolve() == resolve("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve("auto") == torch.device("cpu"), "mps is used only when named"
    gpus(2)
    assert resolve() == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        ("cuda:0", "cuda:0"),
        ("cuda:1", "cuda:1"),
        ("cuda", "cuda:1"),
        (torch.device("cpu"), "cpu"),
        (torch.device("cuda"), "cuda:1"),
        (torch.device("cuda", 0), "cuda:0"),
    ],
)
def test_a_device_that_is_there_gets_its_index(gpus, asked, expected):
    gpus(2)
    assert resolve(asked) == torch.device(expected)


def test_mps_is_used_when_named(gpus, monkeypatch):
    gpus(0)
    with pytest.raises(HDMILError, match="no device 'mps'"):
        resolve("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve("mps") == resolve("mps:0") == torch.device("mps")
    with pytest.raises(HDMILError, match="'mps:1'.*one of: cpu, mps"):
        resolve("mps:1")


@pytest.mark.parametrize(
    "asked", ["cuda:3", "cuda:-1", "gpu", "meta", "xpu", "", torch.device("cuda", 1), torch.device("meta")]
)
def test_a_device_that_is_not_there_is_refused_and_those_there_are_named(gpus, asked):
    gpus(1)
    with pytest.raises(HDMILError) as caught:
        resolve(asked)
    assert str(caught.value) == (
        f"There is no device {str(asked)!r} here. Use 'auto' or one of: cpu, cuda:0 (GPU number 0)."
    )


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", torch.device("cuda")])
def test_without_a_gpu_only_the_cpu_is_named(gpus, asked):
    gpus(0)
    with pytest.raises(HDMILError, match="one of: cpu\\.$"):
        resolve(asked)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensors_lie_on_the_resolved_gpu():
    assert torch.zeros(1, device=resolve("cuda")).device == resolve("auto") == torch.device("cuda", 0)


def test_all_gpus_share_the_work_by_default(gpus):
    gpus(0)
    assert resolve_all() == [torch.device("cpu")]
    gpus(3)
    assert resolve_all("auto") == [torch.device("cuda", i) for i in range(3)]
    assert resolve_all("cuda:2, cuda:0") == [torch.device("cuda", 2), torch.device("cuda", 0)]
    assert resolve_all(["cuda:1", torch.device("cuda", 1)]) == resolve_all(torch.device("cuda", 1))
    assert resolve_all("cpu") == [torch.device("cpu")]
    with pytest.raises(HDMILError, match="no device 'cuda:3' here"):
        resolve_all("cuda:0,cuda:3")
    with pytest.raises(HDMILError, match="no device ''"):
        resolve_all([])


def test_a_model_on_a_gpu_stays_there_unless_another_device_is_named(gpus):
    gpus(2)
    second = torch.device("cuda", 1)
    assert prefer("auto", second) == second
    assert prefer("cpu", second) == torch.device("cpu")
    assert prefer("auto", torch.device("cpu")) == torch.device("cuda", 0)
    gpus(0)
    assert prefer("auto", torch.device("cpu")) == torch.device("cpu")
