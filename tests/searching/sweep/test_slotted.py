"""A model whose layers are slots: the memory of its made-up weights."""

from pathlib import Path

import pytest

from slrmerge.searching.sweep import slotted
from tests.searching.sweep.models import staged


@pytest.mark.parametrize("takes_memory", [True, False])
def test_made_up_weights_of_a_large_layer_take_no_memory(
    llamas: Path, monkeypatch: pytest.MonkeyPatch, takes_memory: bool
) -> None:
    model = staged(llamas / "post")
    monkeypatch.setattr(slotted, "VIEWS_FROM_BYTES", 1 << 20 if takes_memory else 0)
    for weight in model.fake_layer(0, seed=1).values():
        numbers = weight.numel() if takes_memory else weight.shape[-1]
        assert weight.untyped_storage().nbytes() == numbers * weight.itemsize
