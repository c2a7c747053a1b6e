"""The final number of a worked solution."""

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction

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
