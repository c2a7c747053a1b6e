"""Devices by name, and the dtype that suits them."""

import pytest
import torch

from slrmerge.errors import OptionError
from slrmerge.searching.device import BIG_PARAMETERS, default_dtype, require_device
from tests.problems import refused

CPU = torch.device("cpu")
FAST, SLOW = 1e12, 1e10


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_an_available_device_is_returned(name: str) -> None:
    assert require_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "cuda:-1", "cuda:one", "meta"])
def test_a_device_that_cannot_compute_is_refused(name: str) -> None:
    with refused(OptionError, "device-unavailable") as caught:
        require_device(name)
    assert caught.value.problems[0].where == "device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_is_refused_where_there_is_none(name: str) -> None:
    with refused(OptionError, "device-unavailable"):
        require_device(name)


def test_an_index_that_does_not_exist_is_refused_with_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*shape: int, device: torch.device) -> torch.Tensor:
        if device.index >= 2:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.ones(*shape)

    monkeypatch.setattr("torch.zeros", zeros)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert require_device("cuda:1") == torch.device("cuda", 1)
    with refused(OptionError, "device-unavailable") as caught:
        require_device("cuda:2")
    assert "cuda:0, cuda:1" in caught.value.problems[0].remedy


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_large_model_runs_in_the_dtype_that_this_processor_is_faster_at(
    monkeypatch: pytest.MonkeyPatch, half: torch.dtype
) -> None:
    rates = {torch.float32: 1e11}
    monkeypatch.setattr("slrmerge.searching.device.measured_rate", lambda width, dtype, device: rates[dtype])
    rates[half] = FAST
    assert default_dtype(BIG_PARAMETERS, CPU, half) is half
    assert default_dtype(BIG_PARAMETERS - 1, CPU, half) is torch.float32
    rates[half] = SLOW
    assert default_dtype(BIG_PARAMETERS, CPU, half) is torch.float32
    assert default_dtype(BIG_PARAMETERS, torch.device("cuda:0"), half) is half
