"""YAML read strictly: UTF-8, of limited size and depth, no key twice, and scalars as in YAML 1.2.

PyYAML follows YAML 1.1, where 1:30 is 90, 010 is 8, `no` is false and 1e-3 is a string.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from yaml.composer import Composer

from slrmerge.errors import DataError, Problem, RecipeError, SlrmergeError, first_line
from slrmerge.io.sizes import shorten

MAX_BYTES = 250_000
"""Many times the size of any recipe; parsing it takes seconds."""

MAX_VALUES = 250_000
"""More than a file of that size can contain without aliases."""

MAX_DEPTH = 128
_BYTE_ORDER_MARK = "\ufeff"
_TOO_DEEP = "nested too deeply"

_SCALARS = {
    "null": ("~ n N", r"~|null|Null|NULL|"),
    "bool": ("t T f F", r"true|True|TRUE|false|False|FALSE"),
    "int": ("- + 0 1 2 3 4 5 6 7 8 9", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": (
        "- + . 0 1 2 3 4 5 6 7 8 9",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    ),
}
"""The core schema of YAML 1.2 (10.3.2): tag, first characters, pattern of the whole."""


class YamlFile(NamedTuple):
    """A kind of YAML file: what messages call it, how one starts, and the error that reading it raises."""

    noun: str
    start: str
    error: type[SlrmergeError]


RECIPE_FILE = YamlFile("recipe", "pretrained: FOLDER", RecipeError)
TASK_FILE = YamlFile("task", "questions:", DataError)


def read_mapping(path: Path, kind: YamlFile = RECIPE_FILE) -> dict[Any, Any]:
    """The mapping in a YAML file. Raises the error of its kind."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
            file_bytes = max(len(raw), os.fstat(file.fileno()).st_size)  # a pipe has no size
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        known: dict[type, str] = {FileNotFoundError: "no such file", IsADirectoryError: "is a folder"}
        what = known.get(type(error), f"cannot be read ({error.strerror if isinstance(error, OSError) else error})")
        raise kind.error(Problem(f"{kind.noun}-unreadable", str(path), what, f"name a {kind.noun} file")) from error
    if file_bytes > MAX_BYTES:
        what = f"has {file_bytes:,} bytes; a {kind.noun} has at most {MAX_BYTES:,}"
        raise kind.error(Problem(f"{kind.noun}-too-large", str(path), what))
    content = _parse(path, raw, kind.error)
    if not isinstance(content, dict):
        what = "does not contain a mapping"
        raise kind.error(Problem("wrong-type", str(path), what, f"start with `{kind.start}`"))
    return content


def write_yaml(content: Any) -> str:
    """Plain values as YAML, in their order; short lists on one line; what does not print is escaped."""

    def dump(*, allow_unicode: bool) -> str:
        text: str = yaml.dump(
            content, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode, default_flow_style=None
        )
        return text

    text = dump(allow_unicode=True)
    return text if text.replace("\n", "").isprintable() else dump(allow_unicode=False)


def _parse(path: Path, raw: bytes, failure: type[SlrmergeError]) -> Any:
    try:
        text = raw.decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise failure(Problem("not-utf8", str(path), f"is not UTF-8 text (byte {error.start})")) from None
    try:
        if (place := text.find(_BYTE_ORDER_MARK)) >= 0:  # libyaml skips it at the start of a line
            line = 1 + text.count("\n", 0, place)
            raise yaml.YAMLError(f"line {line}: a byte order mark, which does not print, is not at the start")
        loader = _Loader if _SURROGATE.search(text) else _FastLoader
        return yaml.load(text, Loader=loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise failure(Problem("invalid-yaml", str(path), f"invalid YAML: {_one_line(error)}")) from None


if TYPE_CHECKING:
    _Base = yaml.SafeLoader
else:
    _Base = object


class _Strict(_Base):
    """YAML 1.2's scalars for a safe loader of PyYAML; duplicate keys, depth and aliases without end are errors."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML copies it before it adds to it)
        "<": [("tag:yaml.org,2002:merge", re.compile("<<"))]
    }
    _depth = 0

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            extent = _extent(node, {})
            if extent.values > MAX_VALUES or extent.depth > MAX_DEPTH:
                what = "its aliases stand for too many values" if extent.values > MAX_VALUES else _TOO_DEEP
                raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # missing in types-PyYAML
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # what PyYAML's constructors let through
            what = f"invalid value: {first_line(error)}"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark) from None

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        digits = text.lstrip("+-")
        if len(digits) > 1 and digits.isdigit() and digits[0] == "0":
            what = f"{shorten(text)} has a leading zero, which some read as octal; write {digits.lstrip('0') or '0'}"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node)
        return float(text.replace(".", "") if text[-1:].isalpha() else text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():  # PyYAML refuses `!!map x`
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a single value", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
            if key.value == "<<" and isinstance(value, yaml.SequenceNode):  # PyYAML 6.0.4: the last; YAML: the first
                what = "<< takes one mapping; in a list, programs disagree on which mapping counts"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=value.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Loader(_Strict, yaml.SafeLoader):
    """Parses in Python."""


if TYPE_CHECKING or not yaml.__with_libyaml__:
    _FastLoader = _Loader
else:

    class _FastLoader(_Strict, Composer, yaml.CSafeLoader):
        """Parses with libyaml, several times faster; it refuses the escapes of names that are not UTF-8."""

        def __init__(self, stream: str) -> None:
            Composer.__init__(self)
            yaml.CSafeLoader.__init__(self, stream)


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, but strings are quoted where YAML 1.1 or 1.2 reads something else.

    The outermost mapping has a line for each key, also where all its values are scalars.
    """

    def represent_data(self, data: Any) -> yaml.Node:
        is_outermost = not self.represented_objects
        node = super().represent_data(data)
        if is_outermost and isinstance(node, yaml.MappingNode) and node.value:
            node.flow_style = False
        return node


for _tag, (_first, _pattern) in _SCALARS.items():
    for _class in (_Loader, _FastLoader, _Dumper):
        _starts = [*_first.split(), *([""] if _tag == "null" else [])]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _starts)
for _loader in (_Loader, _FastLoader):
    _loader.add_constructor("tag:yaml.org,2002:int", _loader.construct_int)
    _loader.add_constructor("tag:yaml.org,2002:float", _loader.construct_float)


class _Extent(NamedTuple):
    """The number of values in a node and its depth, with aliases written out."""

    values: int
    depth: int


def _extent(node: yaml.Node, known: dict[yaml.Node, _Extent | None]) -> _Extent:
    """The extent of `node`; raises YAMLError where an alias contains itself."""
    if node in known:
        extent = known[node]
        if extent is None:
            raise yaml.MarkedYAMLError(problem="an alias refers to what contains it", problem_mark=node.start_mark)
        return extent
    known[node] = None
    inner = node.value if isinstance(node, yaml.CollectionNode) else []
    values = [value for pair in inner for value in pair] if isinstance(node, yaml.MappingNode) else inner
    extents = [_extent(value, known) for value in values]
    known[node] = extent = _Extent(
        1 + sum(each.values for each in extents), 1 + max((each.depth for each in extents), default=0)
    )
    return extent


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: {what}"
    return " ".join(str(error).split())
