"""Text from files, servers and models, made safe for where it is shown: terminal, JSON, Markdown, CSV."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from typing import Any

IN_PROSE = "\n\t\u200c\u200d\u00a0\u3000"
"""What prose may contain besides printable characters: lines, joiners of emoji and of Persian, wide spaces."""


def printable(text: str, *, keep: str = "") -> str:
    """`text` with every character that does not print escaped (`\\x1b`, `\\u202e`, `\\n`), except those in `keep`.

    These are control characters, bidirectional overrides, lone surrogates, and whatever else `str.isprintable` refuses.
    """
    if text.isprintable():
        return text
    return text.translate(_Escapes(keep, lambda char: char.encode("unicode_escape").decode()))


def to_json(value: Any, *, indent: int | None = None, keep: str = IN_PROSE) -> str:
    """JSON; what does not print, or UTF-8 cannot encode, is escaped, except its line breaks and what is in `keep`."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    if text.replace("\n", "").isprintable():
        return text
    return text.translate(_Escapes(f"\n{keep}", lambda char: json.dumps(char)[1:-1]))


class _Escapes(dict[int, str]):
    """For `str.translate`: each character where it prints or is in `keep`, else what `escape` makes of it."""

    def __init__(self, keep: str, escape: Callable[[str], str]) -> None:
        self._keep, self._escape = keep, escape

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = found = char if char.isprintable() or char in self._keep else self._escape(char)
        return found


def markdown(text: str) -> str:
    """`text` in a line or a table cell of Markdown: no HTML, link, code, heading, list or line break (but emphasis)."""
    text = re.sub(r"[\\`<>&|]|\](?=[(\[:])", r"\\\g<0>", printable(text).lstrip())
    text = re.sub(r"^(?=(#+|[*+-])(\s|$)|([-*_=~])\s*\3)", r"\\", text)
    return re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", text)


def markdown_code(text: str) -> str:
    """`text` as code inside a line of Markdown."""
    text = printable(text)
    fence = "`" * (1 + _longest_run(text))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def markdown_block(language: str, text: str) -> str:
    """Lines of `text` as a block of code in Markdown."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


_FORMULA = re.compile(r"'*(\s*[=+\-@＝＋－＠]|[\t\r\n])")
"""The start of what a spreadsheet runs, or of what `to_csv` made of it."""


def to_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV; a text that a spreadsheet would run as a formula gets an apostrophe before it."""
    lines: list[str] = []
    for row in (header, *rows):
        line = StringIO()
        writer = csv.writer(line, lineterminator="\r\n")  # so that a cell with either of them is quoted
        writer.writerow(f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in row)
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines).encode("utf-8", "backslashreplace").decode()  # a lone surrogate is shown as `printable` does


def from_csv(cell: str) -> str:
    """A text as it was before `to_csv` put an apostrophe before it."""
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell
