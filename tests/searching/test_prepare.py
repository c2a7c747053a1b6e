"""What a search decides before it scores: the dtype of its first pass, and the tokenizer of its prompts."""

import pytest
import torch

from slrmerge.checkpoint.header import TORCH_DTYPES
from slrmerge.errors import OptionError, PlanError
from slrmerge.recipe.load import load_recipe
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.run import Search
from tests.problems import refused
from tests.searching.pairs import TEMPLATE, SmallPair


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
    Search(small.recipe(), SearchOptions(device="cuda:0", ray="local"))


def test_the_prompts_are_those_of_the_side_whose_tokenizer_the_hybrids_have(small: SmallPair, hurried: None) -> None:
    (small.folder / "pre" / "chat_template.jinja").write_text("<|end|>" + TEMPLATE)
    assert small.search().prepared.prompts[0].text.startswith("<|user|>")
    search = small.search(small.recipe(tokenizer="pretrained"))
    assert search.prepared.prompts[0].text.startswith("<|end|><|user|>")
    search.run(small.out)
    assert load_recipe(small.out / "slr.yaml").tokenizer == "pretrained"


def test_a_prompt_that_the_template_itself_does_not_answer_is_noted(small: SmallPair) -> None:
    assert small.search().prepared.notes == ()
    thought = "<|assistant|>random<|user|>"
    template = TEMPLATE.replace("<|assistant|>{% endif", f"{thought}{{% endif")
    (small.folder / "post" / "chat_template.jinja").write_text(template)
    (note,) = small.search().prepared.notes
    assert thought in note


@pytest.mark.parametrize(
    "setting",
    [{"tokenizer": "pretrained"}, {"dtype": "float16"}, {"vocabulary": "shared"}],
    ids=lambda each: next(iter(each)),
)
def test_a_recipe_that_would_be_stored_or_asked_otherwise_is_refused(small: SmallPair, setting: dict[str, str]) -> None:
    other = small.recipe_file("other.yaml", alpha=0.5, **setting)
    with refused(PlanError, "other-settings") as caught:
        _ = small.search(also=other).prepared
    assert caught.value.problems[0].where == f"other.yaml: $.{next(iter(setting))}"


def test_a_recipe_may_name_the_dtype_that_the_hybrids_have(small: SmallPair) -> None:
    (stored,) = {TORCH_DTYPES[info.dtype] for info in small.open().posttrained.values()}
    other = small.recipe_file("other.yaml", alpha=0.37, dtype=stored)
    assert "other.yaml" in {each.info.label for each in small.search(also=other).prepared.candidates}
