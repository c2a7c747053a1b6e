"""JSON in a model's reply, wherever it is."""

import json
import re
from collections.abc import Iterator
from typing import Any

MOST_INVALID = 10_000
"""Maximum number of brackets that are not JSON: each takes time that grows with the text."""

_BRACKET = re.compile(r"[\[{]")


def json_values(text: str) -> Iterator[Any]:
    """The JSON objects and lists in a text, in order; without those nested in another."""
    decoder, at, invalid = json.JSONDecoder(), 0, 0
    while (bracket := _BRACKET.search(text, at)) and invalid < MOST_INVALID:
        try:
            value, at = decoder.raw_decode(text, bracket.start())
        except ValueError:
            at, invalid = bracket.end(), invalid + 1
        except RecursionError:  # the next bracket would recurse as deeply
            return
        else:
            yield value


def whole_number(reply: str, key: str, *, top: int) -> int | None:
    """The number from 0 to `top` at `key` of the last JSON object with that key; None where there is none."""
    found = [value[key] for value in json_values(reply) if isinstance(value, dict) and key in value]
    number = found[-1] if found else None
    return number if type(number) is int and 0 <= number <= top else None
