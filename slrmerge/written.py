"""What people write in YAML: read strictly, and every problem of it in words."""

import os
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from slrmerge.errors import Problem, RecipeError, did_you_mean

MAX_BYTES = 1_000_000

Dtype = Literal["float64", "float32", "float16", "bfloat16"]
"""The floating dtypes, in torch's words."""

Location = tuple[int | str, ...]


class Strict(BaseModel):
    """A model that knows its keys, and takes no value for another kind of value."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def fault(what: str, remedy: str) -> PydanticCustomError:
    """What a validator raises: it becomes a Problem at the place of the value."""
    return PydanticCustomError("recipe", "{what}; {remedy}", {"what": what, "remedy": remedy})


def short(value: object) -> str:
    """A value as the recipe shows it, cut where it is long (and where YAML aliases make it endless)."""
    shorten = reprlib.Repr()
    shorten.maxlevel, shorten.maxlist, shorten.maxdict, shorten.maxstring, shorten.maxother = 2, 4, 4, 60, 60
    return shorten.repr(value)


def read_map(path: Path) -> tuple[dict[Any, Any], bytes]:
    """The map of keys to values that a YAML file holds, and its bytes. Raises RecipeError."""
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            raw = file.read(MAX_BYTES)
    except OSError as error:
        raise RecipeError(Problem(str(path), f"cannot be read ({error.strerror})", "name a recipe file")) from error
    if file_bytes > MAX_BYTES:
        raise RecipeError(Problem(str(path), f"is {file_bytes:,} bytes long, which no recipe is"))
    content = _parse(path, raw)
    if not isinstance(content, dict):
        raise RecipeError(Problem(str(path), "is not a map of keys to values", "start with `pretrained: FOLDER`"))
    return content, raw


def _parse(path: Path, raw: bytes) -> Any:
    try:
        return yaml.load(raw.decode("utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except UnicodeDecodeError as error:
        raise RecipeError(Problem(str(path), f"is not UTF-8 text (byte {error.start})")) from None
    except yaml.YAMLError as error:
        raise RecipeError(Problem(str(path), f"is not sound YAML: {_one_line(error)}")) from None
    except RecursionError:
        raise RecipeError(Problem(str(path), "is nested too deeply")) from None


def problems_in(
    where: str, error: ValidationError, model_at: Callable[[Location], type[BaseModel]]
) -> Iterator[Problem]:
    """All that pydantic found, with `$.path`s; `model_at` tells which model a location is in."""
    for detail in error.errors(include_url=False):
        yield _problem(where, detail, model_at)


def _problem(where: str, detail: ErrorDetails, model_at: Callable[[Location], type[BaseModel]]) -> Problem:
    """One of pydantic's findings in slrmerge's words."""
    location = detail["loc"]
    place = _place(location)
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(where, _place(location[:-1]), str(location[-1]), model_at(location[:-1]))
    if kind == "recipe":
        return Problem(f"{where}: {place}", context["what"], context["remedy"])
    if kind == "missing":
        return Problem(f"{where}: {place}", "is missing", "add it")
    if kind == "literal_error":
        value = detail["input"]
        return Problem(f"{where}: {place}", f"{short(value)} is not known", f"use {context['expected']}")
    return Problem(f"{where}: {place}", f"{short(detail['input'])} is not valid", _REMEDIES.get(kind, detail["msg"]))


def _place(location: Location) -> str:
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)


def _unknown(where: str, parent: str, key: str, model: type[BaseModel]) -> Problem:
    return Problem(f"{where}: {parent}", f"unknown key {key}", did_you_mean(key, model.model_fields))


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key given twice is an error rather than the last one's silent win.

    Nor are there aliases: ten lines of them stand for gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"*{event.anchor}: aliases are not read in recipes", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if type(value) is int and value.bit_length() > 64:
                raise ValueError("a number of more than 64 bits")
            return value
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # what its constructors let through
            raise yaml.MarkedYAMLError(problem=f"not a value: {error}", problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                raise yaml.MarkedYAMLError(problem=f"the key {name} stands twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


_REMEDIES = {
    "model_type": "write a map of keys to values",
    "string_too_short": "it cannot be empty",
    "string_type": "write a text",
    "too_short": "give at least one",
    "tuple_type": "write a list",
}
