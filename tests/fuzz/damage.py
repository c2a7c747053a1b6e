"""Documents that are nearly valid: parts of a valid one are replaced, removed or added, then bytes are."""

import json
import os
from copy import deepcopy
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""More examples, and other ones at each run."""

fuzzed = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

_DEEP = [opening * 3000 + "1" + closing * 3000 for opening, closing in (("[", "]"), ('{"a":', "}"))]
_NEARLY_DEEP = "[" * 110 + "]" * 110
_NUMBERS = ["1e400", "-1e400", "NaN", "Infinity", "9" * 5000, "1" + "0" * 400, "-1", "0", "1.5", "1e-1", str(2**63)]
_TEXTS = ['""', r'"\ud800"', r'"\u0000"', '"../../x"', '"/etc/passwd"', r'"\u001b[2J"', '"é\u202e"', f'"{"a" * 5000}"']
_VALUES = ["null", "true", "[]", "{}", "[[]]", "[null]", '[{"a": 1}]', '{"": null}', _NEARLY_DEEP, *_DEEP]
RAW = [*_NUMBERS, *_TEXTS, *_VALUES]
YAML_ONLY = [
    "*x",
    "&x [*x]",
    "!!int 9:9",
    "!!binary x",
    "!!timestamp x",
    "!!set {a}",
    "9:9:9",
    "yes",
    "010",
    "{<<: 5}",
    "~",
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in inner for place in [(*path, key), *_places(each, (*path, key))]]


@st.composite
def damaged(draw: st.DrawFn, valid: Any, *more: str) -> str:
    """The JSON of `valid` with one to three values replaced, removed or added; `more` are other raw values."""
    content, raw = deepcopy(valid), {}
    for number in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(_places(content)))
        parent = content
        for step in path:
            parent = parent[step]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "remove":
            del parent[key]
            if not content:
                break
            continue
        name = f"@{number}@"
        raw[f'"{name}"'] = draw(st.sampled_from([*RAW, *more]) | st.text(max_size=8).map(json.dumps))
        if action == "replace":
            parent[key] = name
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "", "a/b", "../x", "\x1b", "auto_map", "alpha", "format"]))] = name
        else:
            parent.append(name)
    text = json.dumps(content)
    for name, value in raw.items():
        text = text.replace(name, value)
    return text


@st.composite
def damaged_bytes(draw: st.DrawFn, text: st.SearchStrategy[str]) -> bytes:
    """The text, and in one of three cases with some bytes removed and others put in."""
    data = draw(text).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 2)):
        return data
    start = draw(st.integers(0, len(data)))
    return data[:start] + draw(st.binary(max_size=6)) + data[start + draw(st.integers(0, 20)) :]
