"""What to merge, as people write it: YAML in, a checked `Recipe` out, every problem named at once.

A recipe says nothing about any checkpoint's contents; `plan` holds it against two of them.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from slrmerge.errors import Problem, RecipeError
from slrmerge.mergekit import is_config
from slrmerge.repository import Repository, Source, parse_source
from slrmerge.structure import (
    UNWRITTEN,
    Fault,
    FaultsError,
    Prepare,
    Read,
    Text,
    filled,
    keys_of,
    plain,
    short,
    structured,
)
from slrmerge.written import Dtype, read_map

if TYPE_CHECKING:
    from slrmerge.mergekit.rules import Rules
else:
    Rules = Any  # imported only where there is a config, and the types of fields are looked up when a recipe is read

DEFAULT_SHARD_SIZE = "5GB"

Side = Literal["pretrained", "posttrained"]


def parse_bytes(size: object) -> int:
    """A number of bytes from `5GB`, `500 MB`, `2GiB` or an int: GB = 10**9, GiB = 2**30."""
    written = str(size).strip() if type(size) in (int, str) else ""
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*(?:([KMGT])(i?))?B?", written, re.IGNORECASE | re.ASCII)
    if not match:
        raise Fault(f"{short(size)} is not a size", "write a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB")
    factor = (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper())
    count = int(Fraction(match[1]) * factor)
    if count < 1:
        raise Fault(f"{short(size)} is no room for a tensor", f"the usual size is {DEFAULT_SHARD_SIZE}")
    return count


def _interval(value: object) -> tuple[int, int]:
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(type(end) is int for end in value)):
        raise Fault(f"{short(value)} is not an interval", "write [first, last], both ends count")
    first, last = value
    if first < 0:
        raise Fault(f"{first} is before the first layer", "layers count from 0")
    if first > last:
        raise Fault(f"[{first}, {last}] runs backwards", f"did you mean [{last}, {first}]?")
    return first, last


def _intervals(value: object) -> object:
    """One interval or several, as several."""
    several = isinstance(value, list | tuple) and any(isinstance(entry, list | tuple) for entry in value)
    return tuple(value) if isinstance(value, list | tuple) and several else (_interval(value),)


def _alpha(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise Fault(f"{short(value)} is not a weight", "alpha is the pre-trained side's share, from 0 to 1")
    return float(value)


def _alpha_or_gradient(value: object) -> float | tuple[float, float]:
    if not isinstance(value, list | tuple):
        return _alpha(value)
    if len(value) != 2:
        raise Fault(f"{short(value)} is not a gradient", "write [alpha of the first layer, alpha of the last]")
    return _alpha(value[0]), _alpha(value[1])


Alpha = Annotated[float, Read(_alpha)]
Interval = Annotated[tuple[int, int], Read(_interval)]
Intervals = Annotated[tuple[Interval, ...], Prepare(_intervals)]
AlphaOrGradient = Annotated[float | tuple[float, float], Read(_alpha_or_gradient)]


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """An alpha for a range of layers, or for some modules inside them.

    `modules` are names (self_attn, q_proj) or globs (mlp.*_proj) inside the layer.
    """

    range: Interval
    alpha: AlphaOrGradient
    modules: Annotated[tuple[Text, ...], Prepare(filled)] = ("*",)

    def __post_init__(self) -> None:
        first, last = self.range
        if isinstance(self.alpha, tuple) and first == last:
            raise Fault(f"a gradient over the single layer {first} has no slope", "write one alpha")

    def alpha_at(self, layer: int) -> float:
        """The alpha of one layer of the range: linear between the ends of a gradient, which are met exactly."""
        if not isinstance(self.alpha, tuple):
            return self.alpha
        first, last = self.range
        start, end = self.alpha
        return end if layer == last else start + (end - start) * (layer - first) / (last - first)


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """An alpha for every tensor whose full name matches a glob, such as model.embed_tokens.*"""

    match: Text
    alpha: Alpha


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to take from where: `alpha` for every tensor, then `restore`, then `layers`, then `tensors`; the last wins.

    Relative folders count from the folder of `file`, where it was read. Sizes are bytes. The rules of a `mergekit`
    config wait for the layers to be known; `mergekit_text` is the config as it was written. What each key means is in
    recipe.schema.json.
    """

    pretrained: Text
    posttrained: Text
    restore: Intervals | None = None
    alpha: Alpha | None = None
    layers: tuple[LayerRule, ...] = ()
    tensors: tuple[TensorRule, ...] = ()
    dtype: Dtype | None = None
    blend: Literal["linear", "slerp"] = "linear"
    tokenizer: Side = "posttrained"
    max_shard_size: Annotated[int, Read(parse_bytes)] = 5_000_000_000
    file: Path | None = field(default=None, metadata=UNWRITTEN)
    mergekit: Rules | None = field(default=None, metadata=UNWRITTEN)
    mergekit_text: bytes | None = field(default=None, metadata=UNWRITTEN)

    def spelled_out(self, rules: Mapping[str, Any]) -> "Recipe":
        """The same recipe with `rules` in place of a mergekit config's."""
        again = parse_recipe({**self.to_dict(), **rules}, file=self.file)
        return replace(again, mergekit_text=self.mergekit_text)

    def place(self, path: str) -> str:
        """A place in the recipe as messages name it, with the file where there is one."""
        return f"{self.file}: {path}" if self.file else path

    def source(self, side: Side) -> Source:
        """Where a side's checkpoint is."""
        return parse_source(getattr(self, side), base=self.file.parent if self.file else Path())

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
        return self.mergekit is not None or any(getattr(self, key) not in (None, ()) for key in _RULES)

    def is_alike(self, content: Mapping[str, Any]) -> bool:
        """Whether the rules among other plain values are this recipe's own."""
        rules = {key: content[key] for key in _RULES if key in content}
        other = structured(Recipe, {"pretrained": self.pretrained, "posttrained": self.posttrained, **rules}, "")
        return all(getattr(self, key) == getattr(other, key) for key in _RULES)

    def to_dict(self) -> dict[str, Any]:
        """What the recipe says, without what it leaves at its default; sizes in bytes, intervals as a list."""
        written: dict[str, Any] = plain(self)
        return written


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
    return replace(recipe, mergekit=rules, mergekit_text=raw)


def parse_recipe(content: Mapping[str, Any], *, file: Path | None = None, pair_only: bool = False) -> Recipe:
    """A recipe from plain values, as YAML gives them; raises RecipeError with every problem found.

    `file` is where it was read: messages name it, and relative folders count from its folder. `pair_only` as in
    `load_recipe`.
    """
    where = str(file or "recipe")
    problems: list[Problem] = []
    recipe: Recipe | None = None
    try:
        recipe = structured(Recipe, content, where)
    except FaultsError as error:
        problems.extend(error.problems)
    if not pair_only and _says_nothing(content) and content.keys() <= {*keys_of(Recipe)}:
        problems.append(Problem(f"{where}: $", "nothing to merge", f"give one of {', '.join(_RULES)}"))
    if recipe is None or problems:
        raise RecipeError(*problems)
    return replace(recipe, file=file)


def _says_nothing(content: Mapping[str, Any]) -> bool:
    return all(content.get(key, absent) == absent for key, absent in _RULES.items())


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors (JSON Schema 2020-12)."""
    from importlib.resources import files

    schema: dict[str, Any] = json.loads(files("slrmerge").joinpath("recipe.schema.json").read_text("utf-8"))
    return schema


_RULES: dict[str, object] = {"restore": None, "alpha": None, "layers": [], "tensors": []}
"""The keys of which one must be there, and what says nothing in each."""
