"""JSON that is read, and everything that is refused."""

from math import inf, isnan
from typing import Any

import pytest

from slrmerge.io.strict_json import MAX_DEPTH, InvalidJsonError, parse_json


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{}", {}),
        ('{"a": [1, -2.5e3, true, null, "é"]}'.encode(), {"a": [1, -2500.0, True, None, "é"]}),
        (r'"\ud83d\ude00 \\ud800"', "😀 \\ud800"),
        ('{"a": {"b": 1}, "c": {"b": 1}}', {"a": {"b": 1}, "c": {"b": 1}}),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, None),
        ("[" + "[]," * 500 + "1]", [*([[]] * 500), 1]),
    ],
)
def test_ordinary_json_is_read(text: bytes | str, value: Any) -> None:
    assert parse_json(text) == value or value is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        b'"\xe9"',
        '"a"'.encode("utf-16"),
        '{"a": 1, "a": 2}',
        '[{"a": 1, "b": 3, "a": 1}]',
        "NaN",
        "[-Infinity]",
        "1e400",
        '{"a": [-1e999]}',
        "9" * 5000,
        r'"\ud800"',
        r'{"\uDFFF": 1}',
        r'["\uDE00\ud83d"]',
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        '{"a":' * 500 + "1" + "}" * 500,
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
    ],
    ids=lambda text: repr(text[:30]),
)
def test_json_that_cannot_be_trusted_is_refused_briefly(text: bytes | str) -> None:
    with pytest.raises(InvalidJsonError) as caught:
        parse_json(text)
    assert 0 < len(str(caught.value)) < 200


def test_nan_and_infinity_are_read_where_python_writes_them() -> None:
    first, second = parse_json("[NaN, -Infinity]", allow_nan=True)
    assert (isnan(first), second) == (True, -inf)
    with pytest.raises(InvalidJsonError):
        parse_json("1e400", allow_nan=True)
