"""Which accepted answer a response gives, told by its words alone."""

import re
import unicodedata
from collections.abc import Iterable, Mapping

SYMBOL_LENGTH = 2
"""So short a name counts only as it is written: `IN`, `OH` and `He` are words too."""

LONGEST_NAME = 20
"""Words that a name has at most."""

_BEHIND = re.compile(r"\s*\([^()]*\)\W*$")
"""What may stand behind an answer: another name of it in brackets, and marks."""

_BEFORE = re.compile(
    r"(?:^|[:=“\"*`]|\b(?:is|are|be|say|choose|pick|answer|is called|is named))\W*(?:the\b)?$", re.IGNORECASE
)
"""What may stand right before an answer at the end of a response."""


def normalise(text: str) -> str:
    """Letters and digits only, other runs as one space; no accents, no leading article, no case but for symbols."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    words = "".join(c if c.isalnum() else " " for c in plain).split()
    if len(words) > 1 and words[0].casefold() in ("the", "a", "an") and len("".join(words[1:])) > 1:
        words = words[1:]
    joined = " ".join(words)
    return joined if len(joined) <= SYMBOL_LENGTH else joined.casefold()


def names_of(answers: Iterable[Iterable[str]]) -> dict[str, int]:
    """Every accepted name, normalised, with the index of its answer; a name that two share is the first one's."""
    found: dict[str, int] = {}
    for index, names in enumerate(answers):
        for name in filter(None, map(normalise, names)):
            found.setdefault(name, index)
    return found


def match_whole(response: str, names: Mapping[str, int]) -> int | None:
    """The answer that the response is, in one of its names."""
    return names.get(normalise(response))


def match_stated(response: str, names: Mapping[str, int]) -> int | None:
    """The answer that the response ends in: behind "is" or the like, a colon or a quotation mark, if anything.

    A bracket behind it does not matter. That a name occurs somewhere is not enough: `Kansas City` is not Kansas.
    """
    text = _BEHIND.sub("", response.strip())
    words = list(re.finditer(r"[\w'’.-]*\w", text))
    for place in words[-LONGEST_NAME:]:  # the longest ending first: West Virginia before Virginia
        answer = names.get(normalise(text[place.start() :]))
        if answer is not None:
            return answer if _BEFORE.search(text[: place.start()]) else None
    return None
