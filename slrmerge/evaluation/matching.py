"""Matches a response to an accepted answer by its words."""

import re
import unicodedata
from collections.abc import Iterable, Mapping

SYMBOL_LENGTH = 2
"""Names of up to this length match case-sensitively: `IN`, `OH` and `He` are also words."""

LONGEST_NAME = 20
"""Maximum number of words in a name."""

END = 1000
"""Number of characters at the end of a response in which a stated answer is searched: regular expressions take time."""

_WORD = re.compile(r"\b\w++(?:['’.-]++\w++)*+")

_LETTERS = re.compile(r"[^\W_]+")
"""What `str.isalnum` accepts."""

_SUFFIX = re.compile(r"\([^()]*+\)\W*+\Z")
"""What may follow an answer: another name in brackets, and punctuation."""

_PREFIX = re.compile(
    r"(?:^|[:=“\"*`]|\b(?:is|are|be|say|choose|pick|answer|is called|is named))\W*(?:the\b)?$", re.IGNORECASE
)
"""What may precede an answer at the end of a response."""


def normalise(text: str) -> str:
    """Words of letters and digits, one space between; no accents, no leading article, lower case but for symbols."""
    # Character by character: sorting thousands of accents on one letter takes quadratic time.
    decomposed = (c for char in text for c in unicodedata.normalize("NFKD", char))
    plain = text if text.isascii() else "".join(c for c in decomposed if not unicodedata.combining(c))
    words = _LETTERS.findall(plain)
    if len(words) > 1 and words[0].casefold() in ("the", "a", "an") and len("".join(words[1:])) > 1:
        words = words[1:]
    joined = " ".join(words)
    return joined if len(joined) <= SYMBOL_LENGTH else joined.casefold()


def names_of(answers: Iterable[Iterable[str]]) -> dict[str, int]:
    """Each accepted name, normalized, with the index of its answer; a name of two answers belongs to the first."""
    found: dict[str, int] = {}
    for index, names in enumerate(answers):
        for name in filter(None, map(normalise, names)):
            found.setdefault(name, index)
    return found


def match_whole(response: str, names: Mapping[str, int]) -> int | None:
    """The answer that the whole response is a name of."""
    return names.get(normalise(response))


def match_stated(response: str, names: Mapping[str, int]) -> int | None:
    """The answer at the end of the response, alone or after "is" or similar, a colon or a quotation mark.

    Ignores brackets after it. A name elsewhere in the response does not match: `Kansas City` is not Kansas.
    """
    text = response.strip()
    start = max(0, len(text) - END)
    suffix = _SUFFIX.search(text, start)
    end = suffix.start() if suffix else len(text)
    words = list(_WORD.finditer(text, start, end))
    for place in words[-LONGEST_NAME:]:  # the longest ending first: West Virginia before Virginia
        answer = names.get(normalise(text[place.start() : end]))
        if answer is not None:
            return answer if _PREFIX.search(text, start, place.start()) else None
    return None
