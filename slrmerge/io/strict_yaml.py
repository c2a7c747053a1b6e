"""YAML read strictly: UTF-8, of limited size, no key twice."""

import os
from pathlib import Path
from typing import Any

import yaml

from slrmerge.errors import Problem, RecipeError

MAX_BYTES = 1_000_000
MAX_VALUES = 1_000_000
"""More than any file of that size contains by itself: only aliases lead there."""


def read_mapping(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file. Raises RecipeError."""
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            raw = file.read(MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        why = error.strerror if isinstance(error, OSError) else error
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({why})"
        raise RecipeError(Problem("recipe-unreadable", str(path), what, "name a recipe file")) from error
    if file_bytes > MAX_BYTES:
        what = f"has {file_bytes:,} bytes; a recipe has at most {MAX_BYTES:,}"
        raise RecipeError(Problem("recipe-too-large", str(path), what))
    content = _parse(path, raw)
    if not isinstance(content, dict):
        what = "does not contain a mapping"
        raise RecipeError(Problem("wrong-type", str(path), what, "start with `pretrained: FOLDER`"))
    return content


def write_yaml(content: Any) -> str:
    """Plain values as YAML, in their order; short lists on one line."""
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return text


def _parse(path: Path, raw: bytes) -> Any:
    try:
        return yaml.load(raw.decode("utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except UnicodeDecodeError as error:
        raise RecipeError(Problem("not-utf8", str(path), f"is not UTF-8 text (byte {error.start})")) from None
    except yaml.YAMLError as error:
        raise RecipeError(Problem("invalid-yaml", str(path), f"invalid YAML: {_one_line(error)}")) from None
    except RecursionError:
        raise RecipeError(Problem("invalid-yaml", str(path), "is nested too deeply")) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but duplicate keys and aliases without end are errors."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _count_values(node, {}) > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem="its aliases stand for too many values", problem_mark=node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # what PyYAML's constructors let through
            raise yaml.MarkedYAMLError(problem=f"invalid value: {error}", problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a single value", problem_mark=key.start_mark)
            if key.value in seen and key.value != "<<":
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int | None]) -> int:
    """The number of values below `node` with aliases written out; raises YAMLError where an alias contains itself."""
    if node in counts:
        known = counts[node]
        if known is None:
            raise yaml.MarkedYAMLError(problem="an alias refers to what contains it", problem_mark=node.start_mark)
        return known
    counts[node] = None
    inner = node.value if isinstance(node, yaml.CollectionNode) else []
    values = [value for pair in inner for value in pair] if isinstance(node, yaml.MappingNode) else inner
    total = counts[node] = 1 + sum(_count_values(value, counts) for value in values)
    return total


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: {what}"
    return " ".join(str(error).split())
