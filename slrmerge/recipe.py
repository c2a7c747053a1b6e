"""What to merge, as people write it: YAML in, a checked `Recipe` out, every problem named at once.

A recipe says nothing about any checkpoint's contents; `plan` holds it against two of them.
"""

import os
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError, WithJsonSchema, model_validator

from slrmerge.errors import Problem, RecipeError
from slrmerge.mergekit import is_config
from slrmerge.repository import Repository, Source, parse_source
from slrmerge.written import Dtype, Location, Strict, fault, problems_in, read_map, short

if TYPE_CHECKING:
    from slrmerge.mergekit.rules import Rules

DEFAULT_SHARD_SIZE = "5GB"

Side = Literal["pretrained", "posttrained"]


def parse_bytes(size: object) -> int:
    """A number of bytes from `5GB`, `500 MB`, `2GiB` or an int: GB = 10**9, GiB = 2**30."""
    written = str(size).strip() if type(size) in (int, str) else ""
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*(?:([KMGT])(i?))?B?", written, re.IGNORECASE | re.ASCII)
    if not match:
        raise fault(f"{short(size)} is not a size", "write a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB")
    factor = (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper())
    count = int(Fraction(match[1]) * factor)
    if count < 1:
        raise fault(f"{short(size)} is no room for a tensor", f"the usual size is {DEFAULT_SHARD_SIZE}")
    return count


def _interval(value: object) -> tuple[int, int]:
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(type(end) is int for end in value)):
        raise fault(f"{short(value)} is not an interval", "write [first, last], both ends count")
    first, last = value
    if first < 0:
        raise fault(f"{first} is before the first layer", "layers count from 0")
    if first > last:
        raise fault(f"[{first}, {last}] runs backwards", f"did you mean [{last}, {first}]?")
    return first, last


def _intervals(value: object) -> object:
    """One interval or several, as several."""
    several = isinstance(value, list | tuple) and any(isinstance(entry, list | tuple) for entry in value)
    return tuple(value) if isinstance(value, list | tuple) and several else (_interval(value),)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_full_tuple(value: object) -> object:
    if value == []:
        raise fault("[] is not valid", "give at least one")
    return _as_tuple(value)


def _alpha(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise fault(f"{short(value)} is not a weight", "alpha is the pre-trained side's share, from 0 to 1")
    return float(value)


def _alpha_or_gradient(value: object) -> float | tuple[float, float]:
    if not isinstance(value, list | tuple):
        return _alpha(value)
    if len(value) != 2:
        raise fault(f"{short(value)} is not a gradient", "write [alpha of the first layer, alpha of the last]")
    return _alpha(value[0]), _alpha(value[1])


_ALPHA_SCHEMA = {"type": "number", "minimum": 0, "maximum": 1}
_INTERVAL_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}

Alpha = Annotated[float, BeforeValidator(_alpha), WithJsonSchema(_ALPHA_SCHEMA)]
Interval = Annotated[tuple[int, int], BeforeValidator(_interval), WithJsonSchema(_INTERVAL_SCHEMA)]
Intervals = Annotated[
    tuple[Interval, ...],
    BeforeValidator(_intervals),
    WithJsonSchema({"anyOf": [_INTERVAL_SCHEMA, {"type": "array", "items": _INTERVAL_SCHEMA, "minItems": 1}]}),
    Field(min_length=1),
]
AlphaOrGradient = Annotated[
    float | tuple[float, float],
    BeforeValidator(_alpha_or_gradient),
    WithJsonSchema({"anyOf": [_ALPHA_SCHEMA, {"type": "array", "items": _ALPHA_SCHEMA, "minItems": 2, "maxItems": 2}]}),
]
Text = Annotated[str, Field(min_length=1)]


class LayerRule(Strict):
    """An alpha for a range of layers, or for some modules inside them."""

    range: Interval = Field(description="First and last layer; both ends count.")
    alpha: AlphaOrGradient = Field(description="The pre-trained share, or [at the first layer, at the last].")
    modules: Annotated[tuple[Text, ...], BeforeValidator(_as_full_tuple)] = Field(
        default=("*",),
        json_schema_extra={"minItems": 1},
        description="Module names (self_attn, q_proj) or globs (mlp.*_proj) inside the layer; absent = all of it.",
    )

    @model_validator(mode="after")
    def _gradient_has_a_slope(self) -> Self:
        first, last = self.range
        if isinstance(self.alpha, tuple) and first == last:
            raise fault(f"a gradient over the single layer {first} has no slope", "write one alpha")
        return self

    def alpha_at(self, layer: int) -> float:
        """The alpha of one layer of the range: linear between the ends of a gradient, which are met exactly."""
        if not isinstance(self.alpha, tuple):
            return self.alpha
        first, last = self.range
        start, end = self.alpha
        return end if layer == last else start + (end - start) * (layer - first) / (last - first)


class TensorRule(Strict):
    """An alpha for every tensor whose full name matches a glob."""

    match: Text = Field(description="A glob over full tensor names, such as model.embed_tokens.*")
    alpha: Alpha = Field(description="The pre-trained share.")


class Recipe(Strict):
    """What to take from where: `alpha` for every tensor, then `restore`, then `layers`, then `tensors`; the last wins.

    Relative folders count from the folder of the recipe's file. Sizes are bytes.
    """

    pretrained: Text = Field(description="The pre-trained checkpoint: a folder, or on the Hub, org/name@revision.")
    posttrained: Text = Field(description="The post-trained checkpoint, likewise. It gives config and tokenizer.")
    restore: Intervals | None = Field(
        default=None, description="Layers to put back to their pre-trained weights: [first, last], or several."
    )
    alpha: Alpha | None = Field(default=None, description="A soup: alpha * pre + (1 - alpha) * post, for every tensor.")
    layers: Annotated[tuple[LayerRule, ...], BeforeValidator(_as_tuple)] = Field(
        default=(), description="Alphas by layer and module; later entries win."
    )
    tensors: Annotated[tuple[TensorRule, ...], BeforeValidator(_as_tuple)] = Field(
        default=(), description="Alphas by tensor name; later entries win."
    )
    dtype: Dtype | None = Field(
        default=None, description="Output dtype of floating tensors; absent = each tensor's post-trained dtype."
    )
    blend: Literal["linear", "slerp"] = Field(
        default="linear",
        description="What alpha means between 0 and 1: a mean, or a place on slerp's way from post- to pre-trained.",
    )
    tokenizer: Side = Field(default="posttrained", description="The side that gives tokenizer and chat template.")
    max_shard_size: Annotated[
        int,
        BeforeValidator(parse_bytes),
        WithJsonSchema({"type": ["string", "integer"], "default": DEFAULT_SHARD_SIZE}),
    ] = Field(default=5_000_000_000, description="The most bytes in one output file, such as 5GB.")

    _file: Path | None = PrivateAttr(default=None)
    _mergekit: "Rules | None" = PrivateAttr(default=None)
    _mergekit_text: bytes | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path | None:
        """Where it was read."""
        return self._file

    @property
    def mergekit(self) -> "Rules | None":
        """The rules of the mergekit config that it was read from, which wait for the layers to be known."""
        return self._mergekit

    @property
    def mergekit_text(self) -> bytes | None:
        """That config as it was written."""
        return self._mergekit_text

    def spelled_out(self, rules: Mapping[str, Any]) -> "Recipe":
        """The same recipe with `rules` in place of a mergekit config's."""
        again = parse_recipe({**self.to_dict(), **rules}, file=self._file)
        again._mergekit_text = self._mergekit_text
        return again

    def place(self, path: str) -> str:
        """A place in the recipe as messages name it, with the file where there is one."""
        return f"{self._file}: {path}" if self._file else path

    def source(self, side: Side) -> Source:
        """Where a side's checkpoint is."""
        return parse_source(getattr(self, side), base=self._file.parent if self._file else Path())

    def sources(self) -> tuple[Source, Source]:
        """Where both checkpoints are. Raises RecipeError where that is the same place."""
        pretrained, posttrained = self.source("pretrained"), self.source("posttrained")
        if _is_same(pretrained, posttrained):
            kind = "repository" if isinstance(pretrained, Repository) else "folder"
            remedy = "name the checkpoint that the other was trained from"
            raise RecipeError(Problem(self.place("$.pretrained"), f"is the same {kind} as posttrained", remedy))
        return pretrained, posttrained

    @property
    def has_rules(self) -> bool:
        """Whether it says what to merge, and not only which two checkpoints."""
        return self._mergekit is not None or any(getattr(self, key) not in (None, ()) for key in _RULES)

    def is_alike(self, content: Mapping[str, Any]) -> bool:
        """Whether the rules among other plain values are this recipe's own."""
        rules = {key: content[key] for key in _RULES if key in content}
        other = Recipe.model_validate({"pretrained": self.pretrained, "posttrained": self.posttrained, **rules})
        return all(getattr(self, key) == getattr(other, key) for key in _RULES)

    def to_dict(self) -> dict[str, Any]:
        """What the recipe says, without what it leaves at its default; sizes in bytes, intervals as a list."""
        return self.model_dump(mode="json", exclude_defaults=True)


def _is_same(first: Source, second: Source) -> bool:
    if isinstance(first, Repository) or isinstance(second, Repository):
        return first == second
    return all(map(os.path.exists, (first, second))) and os.path.samefile(first, second)  # noqa: PTH121


def load_recipe(path: Path, *, pair_only: bool = False, **overrides: object) -> Recipe:
    """Read the recipe, or the mergekit config, at `path`; `overrides` that are not None replace its top-level keys.

    With `pair_only` it may name two checkpoints and nothing to do with them. Raises RecipeError with every problem
    found, each with its place in the file (`$.layers[0].range`).
    """
    content, raw = read_map(path)
    given = {key: value for key, value in overrides.items() if value is not None}
    if not is_config(content):
        return parse_recipe({**content, **given}, file=path, pair_only=pair_only)
    from slrmerge.mergekit.read import read_config

    sides, rules = read_config(content, str(path))
    recipe = parse_recipe({**sides, **given}, file=path, pair_only=True)
    recipe._mergekit, recipe._mergekit_text = rules, raw
    return recipe


def parse_recipe(content: Mapping[str, Any], *, file: Path | None = None, pair_only: bool = False) -> Recipe:
    """A recipe from plain values, as YAML gives them; raises RecipeError with every problem found.

    `file` is where it was read: messages name it, and relative folders count from its folder. `pair_only` as in
    `load_recipe`.
    """
    where = str(file or "recipe")
    problems: list[Problem] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate({str(key): value for key, value in content.items()})
    except ValidationError as error:
        problems.extend(problems_in(where, error, _model_at))
    if not pair_only and _says_nothing(content) and content.keys() <= Recipe.model_fields.keys():
        problems.append(Problem(f"{where}: $", "nothing to merge", f"give one of {', '.join(_RULES)}"))
    if recipe is None or problems:
        raise RecipeError(*problems)
    recipe._file = file
    return recipe


def _model_at(location: Location) -> type[BaseModel]:
    models: dict[str, type[BaseModel]] = {"layers": LayerRule, "tensors": TensorRule}
    return models.get(str(location[0]), Recipe) if location else Recipe


def _says_nothing(content: Mapping[str, Any]) -> bool:
    return all(content.get(key, absent) == absent for key, absent in _RULES.items())


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors (JSON Schema 2020-12)."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "slrmerge recipe"
    schema["anyOf"] = [{"required": [key]} for key in _RULES]
    return schema


_RULES: dict[str, object] = {"restore": None, "alpha": None, "layers": [], "tensors": []}
"""The keys of which one must be there, and what says nothing in each."""
