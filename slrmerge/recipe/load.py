"""Recipes from files and from what callers pass: a recipe, a mergekit config, a path, a dict, or a selection."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from slrmerge.checkpoint.location import Source
from slrmerge.checkpoint.pair import ModelPair, Side
from slrmerge.errors import OptionError, Problem, RecipeError
from slrmerge.io.files import as_path
from slrmerge.io.model import validate_as
from slrmerge.io.strict_yaml import read_mapping
from slrmerge.recipe.alphas import Resolution
from slrmerge.recipe.model import Recipe


class AnyRecipe(Protocol):
    """What a merge needs to know of a recipe: implemented by `Recipe` and `MergekitRecipe`."""

    @property
    def file(self) -> Path | None: ...
    @property
    def pretrained(self) -> str | None: ...
    @property
    def posttrained(self) -> str: ...
    @property
    def dtype(self) -> str | None: ...
    @property
    def blend(self) -> str: ...
    @property
    def tokenizer(self) -> Side: ...
    @property
    def vocabulary(self) -> str: ...
    @property
    def max_shard_size(self) -> int: ...
    @property
    def has_rules(self) -> bool: ...
    @property
    def is_mergekit(self) -> bool:
        """Whether it is a mergekit config, whose two models have no roles but that of the base."""
        ...

    @property
    def written_as(self) -> tuple[str, ...]:
        """The names under which a merge writes the recipe as it was run."""
        ...

    def place(self, path: str) -> str: ...
    def source(self, side: Side) -> Source: ...
    def open_pair(self, *, local_files_only: bool = False) -> ModelPair: ...
    def resolve(self, pair: ModelPair) -> Resolution: ...
    def notes(self, pair: ModelPair) -> Iterator[str]: ...
    def as_run(self, pair: ModelPair, folder: Path) -> dict[str, Any]: ...
    def rules(self) -> dict[str, Any]: ...
    def to_dict(self) -> dict[str, Any]: ...


class HasRecipe(Protocol):
    """What a search selected."""

    @property
    def recipe(self) -> Recipe: ...


RecipeLike = AnyRecipe | HasRecipe | str | os.PathLike[str] | Mapping[str, Any]


def load_recipe(path: str | os.PathLike[str], **overrides: Any) -> AnyRecipe:
    """Read a recipe or a mergekit config; `overrides` that are not None replace its top-level keys.

    Raises RecipeError with every problem, each with its place in the file (`$.layers[0].range`).
    """
    file = as_path("path", path)
    return _from_mapping(read_mapping(file), file, {key: each for key, each in overrides.items() if each is not None})


def as_recipe(value: RecipeLike) -> AnyRecipe:
    """The recipe that `value` is, contains, or names. Raises RecipeError and OptionError."""
    if isinstance(value, str | os.PathLike):
        return load_recipe(value)
    if isinstance(value, Mapping):
        return _from_mapping(value, None, {})
    if hasattr(value, "recipe"):
        return value.recipe
    if hasattr(value, "resolve"):
        return value
    what = f"{type(value).__name__} is not a recipe"
    raise OptionError(Problem("wrong-type", "recipe", what, "pass a recipe, a path, a dict, or a search's choice"))


def require_rules(recipe: AnyRecipe) -> None:
    """Raise RecipeError where a recipe names two checkpoints and nothing to merge."""
    if not recipe.has_rules:
        remedy = "add one of restore, alpha, layers, tensors"
        raise RecipeError(Problem("nothing-to-merge", recipe.place("$"), "nothing to merge", remedy))


def _from_mapping(content: Mapping[Any, Any], file: Path | None, overrides: Mapping[str, Any]) -> AnyRecipe:
    if "merge_method" in content:
        from slrmerge.recipe.mergekit.recipe import MergekitRecipe

        return MergekitRecipe.from_dict(content, file).override(**overrides)
    named = {str(key): value for key, value in content.items()}
    recipe = validate_as(Recipe, {**named, **overrides}, str(file or "recipe"))
    return recipe.loaded_from(file) if file else recipe
