"""Numbers of bytes and seconds as people write and read them: GB = 10**9, GiB = 2**30."""

import re
import reprlib
from fractions import Fraction

from slrmerge.errors import without_credentials


class InvalidSizeError(ValueError):
    """A value that is not a number of bytes: what is wrong with it, and what to write."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what, self.remedy = what, remedy


def parse_bytes(size: object) -> int:
    """The number of bytes in `5GB`, `500 MB`, `2GiB` or an int. Raises InvalidSizeError."""
    text = size.strip() if isinstance(size, str) else shorten(size) if type(size) is int else ""
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*(?:([KMGT])(i?))?B?", text, re.IGNORECASE | re.ASCII)
    if not match:
        what = f"{shorten(size)} is not a size"
        raise InvalidSizeError(what, "write a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB")
    factor = (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper())
    count = int(Fraction(match[1]) * factor)
    if count < 1:
        raise InvalidSizeError(f"{shorten(size)} is less than one byte", "write a size such as 5GB")
    return count


def format_bytes(count: float) -> str:
    """`4.98 GB`, `12.30 MB`, `1.50 kB` or `17 B`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def format_duration(seconds: float) -> str:
    """`9.5 s`, `42 s`, `12 min` or `1.8 h`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def shorten(value: object) -> str:
    """The repr of a value for a message, cut where it is long or deeply nested; without the credentials of URLs.

    Cut, a URL would not be recognised as one.
    """
    shortener = _Shortener()
    shortener.maxlevel, shortener.maxlist, shortener.maxdict, shortener.maxstring, shortener.maxother = 2, 4, 4, 60, 60
    text = shortener.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class _Shortener(reprlib.Repr):
    """reprlib's `Repr` that accepts ints too long for Python to print, and hides credentials."""

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(without_credentials(x), level)

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() <= 1024 else f"<int of {x.bit_length()} bits>"
