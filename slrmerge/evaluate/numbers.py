"""The number that a worked solution ends in."""

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"(?:(?<![\w)])(?P<minus>[-−]))?[$€£]?"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?<![0-9])(?=\.[0-9]))"
    r"(?P<decimals>\.[0-9]+)?(?:/(?P<divisor>[0-9]+))?"
)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")


def final_number(solution: str) -> Fraction | None:
    """The number after the last `####`, or in the last `\\boxed{}`, or else the last one of all; None without any.

    Exact: commas between thousands, currency signs and a full stop behind it do not matter; a quotient is its value.
    """
    _, marked, after = solution.rpartition("####")
    boxed = _BOXED.findall(solution)
    if marked:
        found = _numbers(after)[:1]
    elif boxed:
        found = _numbers(boxed[-1])[-1:]
    else:
        found = _numbers(solution)[-1:]
    return found[0] if found else None


def _numbers(text: str) -> list[Fraction]:
    text = _FRACTION.sub(r"\1/\2", text.replace("\\$", "$").replace("{,}", ","))
    found = []
    for match in _NUMBER.finditer(text):
        value = Fraction((match["whole"].replace(",", "") or "0") + (match["decimals"] or ""))
        divisor = int(match["divisor"] or 1)
        if divisor:
            found.append((-value if match["minus"] else value) / divisor)
    return found
