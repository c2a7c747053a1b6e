"""A config → the two sides of a recipe and its rules, or everything that cannot be said so."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slrmerge.errors import Problem, RecipeError, did_you_mean, raise_all
from slrmerge.mergekit.config import Config
from slrmerge.mergekit.rules import Rules
from slrmerge.structure import FaultsError, structured

_REFUSED_KEYS = {
    "modules": "mergekit would merge each module by a config of its own",
    "tokenizer": "mergekit would build a new tokenizer",
}
# `int8_mask` and `rescale` are of no effect where there is one task model.
_PARAMETERS = {
    "passthrough": (),
    "linear": ("weight", "normalize", "int8_mask"),
    "task_arithmetic": ("weight", "normalize", "lambda", "int8_mask", "rescale"),
    "slerp": ("t",),
}


def read_config(content: Mapping[Any, Any], where: str) -> tuple[dict[str, Any], Rules]:
    """A mergekit config as the content of a recipe without rules, and its rules.

    mergekit's base model gives config and tokenizer, so it is the post-trained side; without one, the first model that
    is named. Raises RecipeError with everything that cannot be said as a merge of two checkpoints.
    """
    problems = [
        Problem(f"{where}: $.{key}", "cannot be said as a merge of two checkpoints", why)
        for key, why in _REFUSED_KEYS.items()
        if key in content
    ]
    try:
        config = structured(Config, {key: value for key, value in content.items() if key not in _REFUSED_KEYS}, where)
    except FaultsError as error:
        raise RecipeError(*problems, *error.problems) from None
    raise_all([*problems, *_config_problems(config, where)], RecipeError)
    donor, other = config.named
    recipe: dict[str, Any] = {"pretrained": _from_here(other), "posttrained": _from_here(donor)}
    if dtype := config.out_dtype or config.dtype:
        recipe["dtype"] = dtype
    if config.merge_method == "slerp":
        recipe["blend"] = "slerp"
    if config.tokenizer_source == other:
        recipe["tokenizer"] = "pretrained"
    return recipe, Rules(config, other, where)


def _from_here(model: str) -> str:
    """A folder as mergekit finds it, which is from where it is run; anything else as it is."""
    return str(Path(model).absolute()) if os.path.exists(model) else model  # noqa: PTH110 (a name too long is no error)


def _config_problems(config: Config, where: str) -> Iterator[Problem]:
    method, models = config.merge_method, config.named
    if method not in _PARAMETERS:
        what = f"{method} is no merge that takes each tensor from two checkpoints alike"
        yield Problem(f"{where}: $.merge_method", what, f"known: {', '.join(_PARAMETERS)}; for others use mergekit")
        return
    if len(models) != 2:
        said = "names only one model" if len(models) < 2 else f"names {len(models)} models: {', '.join(models)}"
        yield Problem(f"{where}: $", said, "a merge here is of two")
    if method in ("slerp", "task_arithmetic") and config.base_model is None:
        yield Problem(f"{where}: $.base_model", "is missing", f"{method} starts from it")
    bases = {part.base_model for part in config.layers} - {None, config.base_model}
    if bases:
        what = f"a slice has {bases.pop()} as its base"
        yield Problem(f"{where}: $.slices", what, "mergekit would start some layers from another model")
    if config.tokenizer_source not in (None, "base", *models):
        what = f"{config.tokenizer_source} is neither base nor one of the two models"
        why = "mergekit would build a new tokenizer" if config.tokenizer_source == "union" else "name one of them"
        yield Problem(f"{where}: $.tokenizer_source", what, why)
    known = _PARAMETERS[method]
    levels = [config.parameters, *(part.parameters for part in config.layers)]
    levels += [source.parameters for part in config.layers for source in part.sources]
    for key in dict.fromkeys(key for level in levels for key in level if key not in known):
        remedy = did_you_mean(key, known) if known else "leave it out"
        yield Problem(f"{where}: $.parameters", f"{method} has no {key} here", remedy)
