"""The device that computes, and the dtype that suits it."""

import torch

from slrmerge.errors import OptionError, Problem, first_line
from slrmerge.searching.sweep.cost import measured_rate

BIG_PARAMETERS = 1_000_000_000
"""From this size a model runs in a dtype of 16 bits by default, where that is faster."""

_MEASURED_WIDTH = 1024
"""The width of the matrix products that show which dtype is faster."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`, such as float32."""
    return str(dtype).removeprefix("torch.")


def parse_device(name: str) -> torch.device:
    """The torch device of this name, such as cuda:0. Raises OptionError for a name that torch does not know."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise OptionError(_unavailable(name, error)) from error


def require_device(name: str) -> torch.device:
    """The torch device of this name. Raises OptionError where torch cannot compute on it."""
    device = parse_device(name)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter for a torch without CUDA
        raise OptionError(_unavailable(name, error)) from error
    return device


def default_dtype(parameters: int, device: torch.device, half: torch.dtype = torch.bfloat16) -> torch.dtype:
    """float32; for a large model `half`, unless this processor is slower at it than at float32."""
    if parameters < BIG_PARAMETERS:
        return torch.float32
    if device.type != "cpu":
        return half
    return max((half, torch.float32), key=lambda dtype: measured_rate(_MEASURED_WIDTH, dtype, device))


def _unavailable(name: str, error: Exception) -> Problem:
    """The problem of a device that torch does not have, with those that it has."""
    known = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        known += [f"{kind and kind.type}:{number}" for number in range(torch.accelerator.device_count())]
    what = f"{name} is not available ({first_line(error)})"
    return Problem("device-unavailable", "device", what, f"available: {', '.join(known)}")
