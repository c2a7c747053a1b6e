"""The recipes we ship say what the paper says, and the schema editors use is the one the code has."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from slrmerge.recipe import Recipe, load_recipe, recipe_schema

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))

PAPER = {"llama-3.1-8b": (32, (12, 17), 0.85), "qwen2.5-7b": (28, (12, 27), 0.5), "gemma-2-9b": (42, (17, 27), 0.9)}
"""Layers, chosen interval and soup weight (sections 3.3 and 4.1)."""


def test_the_shipped_schema_is_the_codes_own() -> None:
    shipped = json.loads((RECIPES / "recipe.schema.json").read_text())
    assert shipped == recipe_schema(), "renew it: slrmerge schema > recipes/recipe.schema.json"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_recipe_is_valid_here_and_in_an_editor(path: Path) -> None:
    assert isinstance(load_recipe(path), Recipe)
    jsonschema.validate(yaml.safe_load(path.read_text()), recipe_schema())
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n#")


@pytest.mark.parametrize("model", PAPER)
def test_the_papers_four_recipes_are_there(model: str) -> None:
    layers, (first, last), alpha = PAPER[model]
    length = last - first + 1
    recipes = {kind: load_recipe(RECIPES / f"{model}-{kind}.yaml") for kind in ("slr", "soup", "early", "late")}
    assert recipes["slr"].restore == ((first, last),)
    assert recipes["soup"].alpha == alpha
    assert recipes["early"].restore == ((0, length - 1),)
    assert recipes["late"].restore == ((layers - length, layers - 1),)
