"""JSON in a model's reply, wherever it is."""

import json
import re
from collections.abc import Iterator
from typing import Any

MOST_READ = 10_000_000
"""Characters that are read in vain, from brackets that are not JSON; each bracket counts for `_BRACKET_COST` more."""

_BRACKET_COST = 1000

_BRACKET = re.compile(r"[\[{]")


def json_values(text: str) -> Iterator[Any]:
    """The JSON objects and lists in a text, in order; without those nested in another."""
    decoder, at, in_vain = json.JSONDecoder(), 0, 0
    while (bracket := _BRACKET.search(text, at)) and in_vain < MOST_READ:
        try:
            value, at = decoder.raw_decode(text, bracket.start())
        except ValueError as error:
            end = error.pos if isinstance(error, json.JSONDecodeError) else len(text)
            at, in_vain = bracket.end(), in_vain + _BRACKET_COST + end - bracket.start()
        except RecursionError:  # the next bracket would recurse as deeply
            return
        else:
            yield value


def whole_number(reply: str, key: str, *, top: int) -> int | None:
    """The number from 0 to `top` at `key` of the last JSON object with that key; None where there is none."""
    found = [value[key] for value in json_values(reply) if isinstance(value, dict) and key in value]
    number = found[-1] if found else None
    return number if type(number) is int and 0 <= number <= top else None
