"""Where torch computes."""

import torch

from slrmerge.errors import first_line


def device_problem(device: str) -> str | None:
    """Why torch cannot compute on a device, or None where it can."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return None
