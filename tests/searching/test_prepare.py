"""What a search decides before it scores: the dtype of its first pass."""

import pytest
import torch

from slrmerge.errors import OptionError
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.run import Search
from tests.problems import refused
from tests.searching.pairs import SmallPair


def test_the_first_pass_has_the_dtype_that_was_chosen_or_suits_the_device(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Search(small.recipe()).prepared.first.dtype is torch.float32
    monkeypatch.setattr("slrmerge.searching.prepare.default_dtype", lambda parameters, device: torch.bfloat16)
    assert Search(small.recipe()).prepared.first.dtype is torch.bfloat16
    assert Search(small.recipe(), SearchOptions(dtype="float32")).prepared.first.dtype is torch.float32


def test_the_device_of_a_cluster_has_a_valid_name(small: SmallPair) -> None:
    with refused(OptionError, "device-unavailable"):
        Search(small.recipe(), SearchOptions(device="abacus", ray="local"))
    assert Search(small.recipe(), SearchOptions(device="cuda:0", ray="local")).device == torch.device("cpu")
