"""JSON in a model's reply, wherever it is."""

import json
from collections.abc import Iterator
from typing import Any


def json_values(text: str) -> Iterator[Any]:
    """The JSON objects and lists in a text, in order; without those nested in another."""
    decoder, at = json.JSONDecoder(), 0
    while starts := [place for place in (text.find("{", at), text.find("[", at)) if place >= 0]:
        try:
            value, at = decoder.raw_decode(text, min(starts))
        except ValueError:
            at = min(starts) + 1
        except RecursionError:  # the next bracket would recurse as deeply
            return
        else:
            yield value


def whole_number(reply: str, key: str, *, top: int) -> int | None:
    """The number from 0 to `top` at `key` of the last JSON object with that key; None where there is none."""
    found = [value[key] for value in json_values(reply) if isinstance(value, dict) and key in value]
    number = found[-1] if found else None
    return number if type(number) is int and 0 <= number <= top else None
