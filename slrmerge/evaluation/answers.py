"""The answer in a worked solution, and whether it is the correct one: one function for each way to read it.

Figures compare only where answers were read in the same way: what most papers print was read by lm-evaluation-harness.
"""

import re
import signal
import threading
from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from slrmerge.evaluation.numbers import MOST_DIGITS, final_number

MATH_VERIFY = "math-verify"

LIMIT_S = 20
"""Seconds for each comparison of two expressions, which may be of any difficulty."""

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


class Reading(NamedTuple):
    """An answer as it was read, None where there is none, and whether it is correct."""

    text: str | None
    is_correct: bool


def by_number(solution: str, answer: Fraction) -> Reading:
    """`final_number`, compared by value."""
    found = final_number(solution)
    return Reading(None if found is None else str(found), found == answer)


def strict_match(solution: str, answer: Fraction) -> Reading:
    """lm-evaluation-harness's filter of this name for GSM8K: the first number after `#### `."""
    found = _STRICT.search(solution)
    return _as_text(found[1] if found else None, answer)


def flexible_extract(solution: str, answer: Fraction) -> Reading:
    """lm-evaluation-harness's filter of this name for GSM8K: the last number, also with `$`, commas and points."""
    found = [match[0] for match in _FLEXIBLE.finditer(solution)]
    return _as_text(found[-1] if found else None, answer)


def _as_text(found: str | None, answer: Fraction) -> Reading:
    """Compare as that task does: as text, without commas, dollars and a final full stop, so `18.00` is not 18."""
    plain = found and found.replace(",", "").replace("$", "").removesuffix(".")
    with localcontext(prec=MOST_DIGITS):
        correct = f"{(Decimal(answer.numerator) / answer.denominator).normalize():f}"
    return Reading(plain, plain == correct)


def by_math_verify(solution: str, answer: str) -> Reading:
    """What math-verify finds in a solution, compared as an expression: fractions, intervals, sets, equations, …"""
    from math_verify import verify

    found = parse_expression(solution)
    is_correct = bool(found) and verify(_correct(answer), found, timeout_seconds=_limit_s())
    return Reading(str(found[-1]) if found else None, is_correct)


def parse_expression(text: str) -> list[Any]:
    """The expression in a text and how it is written there, as math-verify reads it; empty where there is none."""
    from math_verify import parse

    found: list[Any] = parse(text, parsing_timeout=_limit_s())
    return found


@lru_cache
def _correct(answer: str) -> list[Any]:
    return parse_expression(as_math(answer))


def as_math(answer: str) -> str:
    """A correct answer as math-verify reads it: in dollars, unless it says itself what is mathematics."""
    return answer if "$" in answer or r"\boxed" in answer else f"${answer}$"


def _limit_s() -> int | None:
    """None where no alarm is possible, which math-verify's limits are made of."""
    is_possible = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    return LIMIT_S if is_possible else None


READERS: Mapping[str, Callable[[str, Any], Reading]] = {
    "number": by_number,
    "strict-match": strict_match,
    "flexible-extract": flexible_extract,
    MATH_VERIFY: by_math_verify,
}
"""Ways to read an answer, by name; the second argument is the question's `answer`."""
