"""The recipes we ship have the paper's numbers, and the schema that editors use is the packaged one."""

from pathlib import Path

import pytest
import yaml

from slrmerge.recipe.load import load_recipe, require_rules
from slrmerge.recipe.model import Recipe
from tests.recipe import SCHEMA, VALIDATOR

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))

PAPER = {"llama-3.1-8b": (32, (12, 17), 0.85), "qwen2.5-7b": (28, (12, 27), 0.5), "gemma-2-9b": (42, (17, 27), 0.9)}
"""Layers, chosen interval and soup weight (sections 3.3 and 4.1)."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_recipe_is_valid_here_and_in_an_editor(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    require_rules(recipe)
    VALIDATOR.validate(yaml.safe_load(path.read_text()))
    modeline, comment, *_ = path.read_text().splitlines()
    schema = modeline.removeprefix("# yaml-language-server: $schema=")
    assert yaml.safe_load((path.parent / schema).read_text()) == SCHEMA
    assert comment.startswith("# ")


@pytest.mark.parametrize("model", PAPER)
def test_the_papers_four_recipes_are_there(model: str) -> None:
    layers, (first, last), alpha = PAPER[model]
    length = last - first + 1
    recipes = {kind: load_recipe(RECIPES / f"{model}-{kind}.yaml").rules() for kind in ("slr", "soup", "early", "late")}
    assert recipes == {
        "slr": {"restore": [first, last]},
        "soup": {"alpha": alpha},
        "early": {"restore": [0, length - 1]},
        "late": {"restore": [layers - length, layers - 1]},
    }
