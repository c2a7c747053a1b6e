"""What a search decides before it scores: the dtype of its first pass, and the tokenizer of its prompts."""

import pytest
import torch

from slrmerge.errors import PlanError
from slrmerge.recipe.load import load_recipe
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.run import Search
from tests.problems import refused
from tests.searching.pairs import TEMPLATE, SmallPair

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


def test_the_prompts_are_those_of_the_side_whose_tokenizer_the_hybrids_have(small: SmallPair, hurried: None) -> None:
    (small.folder / "pre" / "chat_template.jinja").write_text("<|end|>" + TEMPLATE)
    assert small.search().prepared.prompts[0].text.startswith("<|user|>")
    search = small.search(small.recipe(tokenizer="pretrained"))
    assert search.prepared.prompts[0].text.startswith("<|end|><|user|>")
    search.run(small.out)
    assert load_recipe(small.out / "slr.yaml").tokenizer == "pretrained"


def test_a_recipe_with_another_tokenizer_is_refused(small: SmallPair) -> None:
    other = small.recipe_file("other.yaml", alpha=0.5, tokenizer="pretrained")
    with refused(PlanError, "other-tokenizer") as caught:
        _ = small.search(also=other).prepared
    assert caught.value.problems[0].where == "other.yaml: $.tokenizer"
