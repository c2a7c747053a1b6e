"""What people write in YAML, read strictly: no key twice, no aliases, nothing endless."""

import os
from pathlib import Path
from typing import Any, Literal

import yaml

from slrmerge.errors import Problem, RecipeError

MAX_BYTES = 1_000_000

Dtype = Literal["float64", "float32", "float16", "bfloat16"]
"""The floating dtypes, in torch's words."""


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
