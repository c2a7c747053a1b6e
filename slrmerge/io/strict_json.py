"""JSON read strictly: UTF-8, no key twice, limited depth, and nothing that cannot be written back; JSON to digest."""

import json
from collections import Counter
from collections.abc import Callable
from math import isfinite
from typing import Any

from slrmerge.io.sizes import shorten

MAX_DEPTH = 128


class InvalidJsonError(ValueError):
    """What is wrong with a JSON text."""


def parse_json(
    data: bytes | bytearray | str,
    *,
    allow_nan: bool = False,
    allow_duplicates: bool = False,
    convert: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """The value of a JSON text. Raises InvalidJsonError.

    With `allow_duplicates` the last of duplicate keys counts, as it does for every loader of configs.

    `convert` replaces each object by a smaller value, innermost first, while it is parsed. `allow_nan` accepts NaN and
    Infinity, which Python writes into configs (`time_step_limit` of Mamba2).
    """

    def constant(text: str) -> float:
        if allow_nan:
            return float(text)
        raise ValueError(f"{text} is not JSON")

    def make_object(pairs: list[tuple[str, Any]]) -> Any:
        made = dict(pairs) if allow_duplicates else _unique_keys(pairs)
        return convert(made) if convert else made

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=make_object, parse_float=_finite, parse_constant=constant)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise InvalidJsonError("nested too deeply") from None
    except UnicodeEncodeError:
        raise InvalidJsonError("a \\u escape is half of a surrogate pair") from None
    except ValueError as error:
        raise InvalidJsonError(str(error)) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise InvalidJsonError("nested too deeply")
    return value


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that digests are of."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; `json` silently keeps the last of duplicate keys."""
    result = dict(pairs)
    if len(result) != len(pairs):
        duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {shorten(duplicate)}")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{shorten(text)} is out of range")
    return value


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer))  # type: ignore[attr-defined]
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return False
    return True
