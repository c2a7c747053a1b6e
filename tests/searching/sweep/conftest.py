"""What the tests of sweeps share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.searching.sweep.models import write_models


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    """Tiny products are slower on several, and tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama pair, to be read only."""
    return write_models(tmp_path_factory.mktemp("llamas"), "llama")
