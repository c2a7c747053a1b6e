"""What a search decides before it scores: the dtype of its first pass."""

import pytest
import torch

from slrmerge.searching.options import SearchOptions
from slrmerge.searching.run import Search
from tests.searching.pairs import SmallPair

FAST, SLOW = 1e12, 1e10


def first_dtype(
    pair: SmallPair, monkeypatch: pytest.MonkeyPatch, bfloat16: float, dtype: str | None = None
) -> torch.dtype:
    """The dtype of the first pass of a large model where matrix products in bfloat16 have this rate."""
    rates = {torch.bfloat16: bfloat16, torch.float32: 1e11}
    monkeypatch.setattr("slrmerge.searching.prepare.BIG_PARAMETERS", 1)
    monkeypatch.setattr("slrmerge.searching.prepare.measured_rate", lambda width, dtype, device: rates[dtype])
    return Search(pair.recipe(), SearchOptions(dtype=dtype)).prepared.first.dtype


def test_a_large_model_runs_in_the_dtype_that_this_processor_is_faster_at(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first_dtype(small, monkeypatch, FAST) is torch.bfloat16
    assert first_dtype(small, monkeypatch, SLOW) is torch.float32
    assert first_dtype(small, monkeypatch, SLOW, "bfloat16") is torch.bfloat16
