"""Which accepted answer a response gives, told by its words alone."""

import unicodedata
from collections.abc import Iterable, Mapping

SHORTEST_NAME = 4
"""Names within longer responses count from so many characters: `IN` and `ME` are words before they are states."""


def normalise(text: str) -> str:
    """Letters and digits only, without case, accents and a leading article; all else is a single space."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    words = "".join(c if c.isalnum() else " " for c in plain).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)


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


def match_named(response: str, names: Mapping[str, int]) -> int | None:
    """The one answer that the response names, in whatever words around it; None where it names none, or several."""
    text = f" {normalise(response)} "
    named = set()
    for name in sorted(names, key=len, reverse=True):  # West Virginia before Virginia
        if len(name) >= SHORTEST_NAME and f" {name} " in text:
            named.add(names[name])
            text = text.replace(f" {name} ", " | ")
    return named.pop() if len(named) == 1 else None
