"""A mergekit config in the place of a recipe."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slrmerge.checkpoint.location import Source, parse_source
from slrmerge.checkpoint.opening import open_pair
from slrmerge.checkpoint.pair import ModelPair, Side, no_stack_problem
from slrmerge.checkpoint.side_files import RECIPE_NAME
from slrmerge.errors import OptionError, Problem, RecipeError, did_you_mean, raise_all
from slrmerge.io.model import validate_as
from slrmerge.recipe.alphas import Resolution, TensorAlphas
from slrmerge.recipe.mergekit.config import MergekitConfig
from slrmerge.recipe.mergekit.weights import INTERPOLATIONS, resolve_config
from slrmerge.recipe.model import DEFAULT_SHARD_BYTES, Recipe

_UNSUPPORTED_KEYS = {
    "modules": "mergekit would merge each module by its own config",
    "tokenizer": "mergekit would build a new tokenizer",
}
_PARAMETERS = {
    "passthrough": (),
    "linear": ("weight", "normalize", "int8_mask"),
    "task_arithmetic": ("weight", "normalize", "lambda", "int8_mask", "rescale"),
    **{method: (rule.mergekit_parameter or "",) for method, rule in INTERPOLATIONS.items()},
}
"""The parameters of each method; `int8_mask` and `rescale` have no effect with one task model."""


@dataclass(frozen=True)
class MergekitRecipe:
    """A mergekit config of two models, used like a `Recipe`.

    The base model, or else the first model, supplies config and tokenizer, so it is the post-trained side. `dtype` and
    `max_shard_size` (bytes) override the config's.
    """

    config: MergekitConfig
    file: Path | None = None
    dtype_override: str | None = None
    max_shard_size: int = DEFAULT_SHARD_BYTES

    has_rules = is_mergekit = True
    vocabulary = "same"
    written_as = (RECIPE_NAME, "mergekit_config.yml")
    """The names under which a merge writes the recipe as it was run; mergekit's users expect the second."""

    @classmethod
    def from_dict(cls, content: Mapping[Any, Any], file: Path | None = None) -> "MergekitRecipe":
        """A config from plain values. Raises RecipeError with everything that is not a merge of two models."""
        where = str(file or "recipe")
        problems = [
            Problem("unsupported-config", f"{where}: $.{key}", "is not supported in a merge of two checkpoints", why)
            for key, why in _UNSUPPORTED_KEYS.items()
            if key in content
        ]
        try:
            known = {str(key): value for key, value in content.items() if key not in _UNSUPPORTED_KEYS}
            config = validate_as(MergekitConfig, known, where)
        except RecipeError as error:
            raise RecipeError(*problems, *error.problems) from None
        raise_all([*problems, *_config_problems(config, where)], RecipeError)
        return cls(config, file)

    def override(self, **overrides: Any) -> "MergekitRecipe":
        """The same config with another `dtype` or `max_shard_size`. Raises RecipeError."""
        unknown = overrides.keys() - {"dtype", "max_shard_size"}
        raise_all(
            (Problem("unknown-option", key, "cannot be overridden in a mergekit config") for key in sorted(unknown)),
            OptionError,
        )
        current = {"dtype": self.dtype_override, "max_shard_size": self.max_shard_size}
        sides = {"pretrained": self.pretrained, "posttrained": self.posttrained}
        checked = validate_as(Recipe, {**sides, **current, **overrides}, str(self.file or "recipe"))
        return replace(self, dtype_override=checked.dtype, max_shard_size=checked.max_shard_size)

    @property
    def posttrained(self) -> str:
        return _absolute(self.config.model_names[0])

    @property
    def pretrained(self) -> str:
        return _absolute(self.config.model_names[1])

    @property
    def dtype(self) -> str | None:
        return self.dtype_override or self.config.out_dtype or self.config.dtype

    @property
    def blend(self) -> str:
        rule = INTERPOLATIONS.get(self.config.merge_method)
        return rule.name if rule else "linear"

    @property
    def tokenizer(self) -> Side:
        return "pretrained" if self.config.tokenizer_source == self.config.model_names[1] else "posttrained"

    def place(self, path: str) -> str:
        """A place in the config as messages name it."""
        return f"{self.file or 'recipe'}: {path}"

    def source(self, side: Side) -> Source:
        """Where a side's checkpoint is."""
        return parse_source(self.pretrained if side == "pretrained" else self.posttrained)

    def open_pair(self, *, local_files_only: bool = False) -> ModelPair:
        """Open both checkpoints; see `slrmerge.open_pair`."""
        return open_pair(self.source("pretrained"), self.source("posttrained"), local_files_only=local_files_only)

    def resolve(self, pair: ModelPair) -> Resolution:
        """The alpha of every tensor of a pair."""
        where = str(self.file or "recipe")
        if pair.stack is None:
            problem = no_stack_problem(where, "write a recipe that lists the tensors")
            return Resolution(TensorAlphas({}, blend=self.blend), [problem])
        other = self.config.model_names[1]
        return resolve_config(self.config, other, pair.posttrained, pair.stack, blend=self.blend, where=where)

    def notes(self, pair: ModelPair) -> Iterator[str]:
        """What a reader of the plan should know about the config."""
        supplied = "config and tokenizer" if self.tokenizer == "posttrained" else "config"
        base = "base_model" if self.config.base_model else "the first model"
        yield f"{base} supplies {supplied}, so {pair.posttrained} is treated as the post-trained side"
        if self.config.tokenizer_source is not None:
            yield "embedding rows keep their places; mergekit would move them if the two vocabularies differ"
        first, last = self.config.parts[0].sources, self.config.parts[-1].sources
        if len(first) < len(last):
            yield f"norm and head are blended like the last slice; mergekit would copy those of {last[0].model}"

    def as_run(self, pair: ModelPair, folder: Path) -> dict[str, Any]:
        """The config as plain values, with its models pinned and the dtype that was used."""
        del folder  # the folders of a config are absolute
        posttrained, pretrained = self.config.model_names
        pinned = {posttrained: pair.posttrained.reference, pretrained: pair.pretrained.reference}
        content = self.config.rename_models(lambda name: pinned.get(name, name))
        return content | ({"out_dtype": self.dtype_override} if self.dtype_override else {})

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values."""
        return self.config.rename_models(str)

    def rules(self) -> dict[str, Any]:
        """The config, as a search's table shows it."""
        return self.to_dict()


def _absolute(model: str) -> str:
    """A folder as mergekit finds it: relative to the current folder. Anything else is returned as it is.

    Of a model with a LoRA, written `MODEL+LORA`, both.
    """
    if os.path.exists(model):  # noqa: PTH110 (False for a name that is too long)
        return str(Path(model).absolute())
    below, plus, lora = model.rpartition("+")
    return f"{_absolute(below)}+{_absolute(lora)}" if plus else model


def _config_problems(config: MergekitConfig, where: str) -> Iterator[Problem]:
    method, models = config.merge_method, config.model_names
    if method not in _PARAMETERS:
        what = f"{method} is not supported in a merge of two checkpoints"
        remedy = f"supported: {', '.join(_PARAMETERS)}; use mergekit for others"
        yield Problem("unsupported-method", f"{where}: $.merge_method", what, remedy)
        return
    if len(models) != 2:
        what = "names only one model" if len(models) < 2 else f"names {len(models)} models: {', '.join(models)}"
        yield Problem("not-two-models", f"{where}: $", what, "name two models, or use mergekit")
    if (method in INTERPOLATIONS or method == "task_arithmetic") and config.base_model is None:
        yield Problem("missing-key", f"{where}: $.base_model", "is missing", f"{method} needs a base model")
    bases = [part.base_model for part in config.parts if part.base_model not in (None, config.base_model)]
    if bases:
        what = f"a slice has another base model, {bases[0]}"
        yield Problem("unsupported-config", f"{where}: $.slices", what, "use one base_model for all slices")
    if config.tokenizer_source not in (None, "base", *models):
        what = f"{config.tokenizer_source} is neither base nor one of the two models"
        remedy = "mergekit would build a new tokenizer" if config.tokenizer_source == "union" else "name one of them"
        yield Problem("unsupported-config", f"{where}: $.tokenizer_source", what, remedy)
    known = _PARAMETERS[method]
    levels = [config.parameters, *(part.parameters for part in config.parts)]
    levels += [source.parameters for part in config.parts for source in part.sources]
    for key in dict.fromkeys(key for level in levels for key in level if key not in known):
        remedy = did_you_mean(key, known) if known else "remove it"
        yield Problem("unknown-key", f"{where}: $.parameters", f"{method} does not support {key} here", remedy)
