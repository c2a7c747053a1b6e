"""Every config and recipe in the documentation is valid, and those that are called equal are."""

from typing import Any

import pytest
import yaml

from slrmerge.checkpoint.layers import LayerStack
from slrmerge.recipe.alphas import TensorAlphas, resolve_rules
from slrmerge.recipe.load import as_recipe
from slrmerge.recipe.mergekit.recipe import MergekitRecipe
from slrmerge.recipe.mergekit.weights import resolve_config
from slrmerge.recipe.model import Recipe
from tests.checkpoints import llama_tensors
from tests.documentation import DOCS, blocks

BLOCKS = blocks(DOCS / "mergekit.md", "yaml")
STACK = LayerStack("model.layers", 32)
NAMES = list(llama_tensors(0, layers=32, hidden=1, vocabulary=1))


def alphas_of(content: dict[str, Any]) -> TensorAlphas:
    """The alphas of a recipe or config for a model of 32 layers."""
    recipe = as_recipe(content)
    if isinstance(recipe, MergekitRecipe):
        other = recipe.config.model_names[1]
        alphas, problems = resolve_config(recipe.config, other, NAMES, STACK, blend=recipe.blend, where="docs")
    else:
        assert isinstance(recipe, Recipe)
        alphas, problems = resolve_rules(recipe, NAMES, STACK, blend=recipe.blend)
    assert problems == []
    return alphas


@pytest.mark.parametrize("text", BLOCKS, ids=lambda text: text.splitlines()[0])
def test_every_block_is_a_merge(text: str) -> None:
    content = yaml.safe_load(text)
    assert text.startswith("# mergekit" if "merge_method" in content else "# slrmerge")
    assert any(alphas_of(content).values())


@pytest.mark.parametrize("first", [0, 3], ids=["restoration", "soup"])
def test_configs_and_the_recipes_beside_them_give_the_same_merge(first: int) -> None:
    config, recipe = (yaml.safe_load(text) for text in BLOCKS[first : first + 2])
    assert "merge_method" in config
    assert "pretrained" in recipe
    assert alphas_of(config) == alphas_of(recipe)
    sides = [(each.pretrained, each.posttrained) for each in map(as_recipe, (config, recipe))]
    assert sides[0] == sides[1]


def test_the_page_shows_every_method_with_an_example_of_its_own() -> None:
    shown = {content["merge_method"] for content in map(yaml.safe_load, BLOCKS) if "merge_method" in content}
    assert shown == {"passthrough", "linear", "slerp"}
