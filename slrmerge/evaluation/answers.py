"""The answer in a worked solution, and whether it is the correct one: one function for each way to read it.

Figures compare only where answers were read in the same way: what most papers print was read by lm-evaluation-harness.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

MOST_DIGITS = 50
"""Longer numbers are ignored: they come from a model that repeats itself."""

_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?<![0-9])(?=\.[0-9])"
_NUMBER = re.compile(
    rf"(?:(?<![\w)])(?P<minus>[-−]))?[$€£]?(?P<whole>{_DIGITS})(?P<decimals>\.[0-9]+)?(?:/(?P<divisor>[0-9]+))?"
)
_MARKED = re.compile(r"#### *(?=[-−]?[$€£]?\.?[0-9])")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_STATED = re.compile(r"\banswer\b\W{0,3}(?:is\b|=|:)", re.IGNORECASE)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-−]?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_BETWEEN_THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,! ]|\{,\}(?:\\!)?|,\\!|[\u00a0\u2009\u202f~])(?=[0-9]{3}(?![0-9]))")

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


def final_number(solution: str) -> Fraction | None:
    """The final number of a solution, exactly; None where there is none.

    The first number after the last `####`; else the last one in the last `\\boxed{}`; else the first one after the last
    "answer is" or "answer:"; else the last one. Ignores thousands separators, currency signs and a final full stop; a
    fraction is its value.
    """
    text = _FRACTION.sub(r"\1/\2", _BETWEEN_THOUSANDS.sub("", solution.replace("\\$", "$")))
    if _MARKED.search(text):
        return _after_last(_MARKED, text)
    boxed = (_last(content) for content in reversed(_BOXED.findall(text)))
    found = next((number for number in boxed if number is not None), None)
    if found is None:
        found = _after_last(_STATED, text)
    return _last(text) if found is None else found


def _after_last(pattern: re.Pattern[str], text: str) -> Fraction | None:
    ends = [match.end() for match in pattern.finditer(text)]
    return next(_numbers(_NUMBER.finditer(text[ends[-1] :])), None) if ends else None


def _last(text: str) -> Fraction | None:
    return next(_numbers(reversed(list(_NUMBER.finditer(text)))), None)


def _numbers(matches: Iterable[re.Match[str]]) -> Iterator[Fraction]:
    for match in matches:
        value, divisor = match["whole"].replace(",", "") + (match["decimals"] or ""), match["divisor"] or "1"
        if len(value) <= MOST_DIGITS and len(divisor) <= MOST_DIGITS and int(divisor):
            number = Fraction(value if value[0] != "." else f"0{value}") / int(divisor)
            yield -number if match["minus"] else number


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
