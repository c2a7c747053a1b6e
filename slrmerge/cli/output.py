"""The one place that writes to stdout and stderr: escapes what does not print, and hides the credentials of URLs."""

import errno
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedWriter, FileIO, TextIOWrapper
from itertools import zip_longest
from shutil import get_terminal_size
from typing import Any, Never, TextIO

import click

from slrmerge.errors import OutputError, Problem, cut, without_credentials
from slrmerge.io.text import printable, to_json

_KEPT = re.compile(r"(\x1b\[(?:A|0m|1;3[136]m))")
"""What is not escaped on stderr: the cursor moves of progress bars, and the colours of `echo`."""

_COLOURS = {"error": "\x1b[1;31m", "warning": "\x1b[1;33m", "note": "\x1b[1;36m"}
_PLAIN = "\x1b[0m"

HUB_VERBOSITY = "HF_HUB_VERBOSITY"

READER_LEFT = 141
"""The exit code that shells report for a closed pipe."""


def echo(line: str = "", *, err: bool = False) -> None:
    """Print one line on stdout or stderr; on a terminal `error:`, `warning:` and `note:` are in colour."""
    text = shown(line)
    head, colon, rest = text.partition(": ")
    if colon and head in _COLOURS and "NO_COLOR" not in os.environ:
        text = f"{_COLOURS[head]}{head}:{_PLAIN} {rest}"  # click removes the colour where there is no terminal
    click.echo(text, err=err)


_MAX_LINE = 3500
"""More than the place, the text and the remedy of a Problem have together."""


def shown(text: str, *, keep: str = "") -> str:
    """What may be shown of a text; see `printable` for `keep`."""
    return printable(cut(without_credentials(text), _MAX_LINE), keep=keep)


def echo_text(text: str) -> None:
    """Print lines on stdout that are printable already: YAML, and the schema."""
    click.echo(printable(text, keep="\n"), nl=False)


def describe_stdout() -> str:
    """The encoding of stdout, and whether it is a terminal."""
    return f"{sys.stdout.encoding}, {'a terminal' if sys.stdout.isatty() else 'not a terminal'}"


def print_json(value: Mapping[str, Any]) -> None:
    click.echo(to_json(value, indent=2, keep=""))


class Table:
    """A table; columns that start with > are aligned right, cells may have several lines.

    On a terminal that is too narrow, headers are wrapped between words, then the first column, then other columns of
    text; where that is not enough, each row becomes a block of lines. So nothing is cut.
    """

    def __init__(self, *columns: str) -> None:
        self._columns = [shown(column, keep="\n") for column in columns]
        self._rows = list[list[str]]()

    def add_row(self, *cells: str) -> None:
        self._rows.append([shown(cell, keep="\n") for cell in cells])

    def print(self) -> None:
        room = get_terminal_size().columns if sys.stdout.isatty() else None
        names = [column.removeprefix(">") for column in self._columns]
        rows = self._fit([names, *self._rows], room)
        if rows:
            lines = self._table_lines(rows)
        else:
            lines = (line for row in self._rows for line in self._block_lines(names, row, room or 0))
        click.echo("".join(f"{line}\n" for line in lines))

    def _fit(self, rows: list[list[str]], room: int | None) -> list[list[str]] | None:
        """The rows, of which the header is the first, in `room` columns, None where they do not fit."""
        if room is None or _excess(rows, room) <= 0:
            return rows
        header, *others = rows
        narrow = _widths(others or rows)
        rows = [[wrap(name, width, _SHORT_WORD) for name, width in zip(header, narrow, strict=True)], *others]
        for place, name in enumerate(self._columns):
            is_text = not (name.startswith(">") or any("\n" in row[place] for row in others))
            if (excess := _excess(rows, room)) > 0 and (is_text or not place):
                width = max(_widths(rows)[place] - excess, _NARROW if place else 0)
                width = max(width, *_widths([[wrap(row[place], width)] for row in rows]))  # of its longest word
                rows = [[*row[:place], wrap(row[place], width), *row[place + 1 :]] for row in rows]
        return rows if _excess(rows, room) <= 0 else None

    def _table_lines(self, rows: Sequence[Sequence[str]]) -> Iterator[str]:
        widths = _widths(rows)
        height = max(cell.count("\n") for cell in rows[0])
        names = ["\n" * (height - cell.count("\n")) + cell for cell in rows[0]]
        for number, row in enumerate([names, *rows[1:]]):
            for cells in zip_longest(*(cell.split("\n") for cell in row), fillvalue=""):
                line = "  ".join(map(_pad, cells, widths, self._columns))
                yield line.rstrip() if number else _bold(line.rstrip())

    def _block_lines(self, names: Sequence[str], row: Sequence[str], room: int) -> Iterator[str]:
        """A row as its first cell and, below it, the others, each with its column's name."""
        head, *others = (cell.replace("\n", " ") for cell in row)
        yield _bold(f"{names[0]} {head}".strip())
        widest = max(map(len, names[1:]), default=0)
        indent = widest + 4
        for name, cell in zip(names[1:], others, strict=True):
            if cell:
                lines = wrap(cell, room - indent, _SPACED).replace("\n", "\n" + " " * indent)
                yield f"  {name:{widest}}  {lines}"


def _bold(line: str) -> str:
    return line if "NO_COLOR" in os.environ else f"\x1b[1m{line}{_PLAIN}"


def _width(text: str) -> int:
    """The columns of a terminal that `text` takes: some characters take two, or none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _pad(cell: str, width: int, column: str) -> str:
    spaces = " " * (width - _width(cell))
    return spaces + cell if column[:1] == ">" else cell + spaces


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The width of each column."""
    return [max(_width(line) for cell in column for line in cell.split("\n")) for column in zip(*rows, strict=True)]


def _excess(rows: Sequence[Sequence[str]], room: int) -> int:
    """How many columns too wide the rows are, with two between cells."""
    return sum(_widths(rows)) + 2 * (len(rows[0]) - 1) - room


_NARROW = 16
"""No column but the first is wrapped to less."""

_WORD = r"\S+?(?:\s+|(?<=[./])(?=[^\W\d]|\*)|$)"
"""A word with the spaces after it, or a part of a name that ends with a dot or a slash."""

_SHORT_WORD = r"\S+?(?:\s+|(?<=[./_])(?=[^\W\d]|\*)|$)"
"""The same, also for parts that end with an underscore."""

_SPACED = r"\S+\s*"
_PHRASE = r"\([^()]*\)\s*"


def wrap(text: str, width: int, word: str = _WORD) -> str:
    """`text` in lines of at most `width` where its words are that short: numbers are never cut."""
    lines: list[str] = []
    for pattern in (f"{_PHRASE}|{word}", word):
        lines = []
        for line in text.split("\n"):
            lines.append("")
            for each in re.findall(pattern, line):
                if lines[-1] and _width(lines[-1] + each.rstrip()) > width:
                    lines.append("")
                lines[-1] += each
        lines = [line.rstrip() for line in lines]
        if max(map(_width, lines)) <= width:
            break
    return "\n".join(lines)


def open_streams() -> None:
    """Make stdout and stderr usable, however the command was started.

    A stream that is closed discards what is printed, and its descriptor is taken: a file that is written must not get
    it. A terminal that cannot show – and × shows ? instead.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    if sys.stdout is sys.__stdout__:
        sys.stdout = _open_stream(TextIOWrapper, 1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _open_stream(_Messages, 2, sys.stderr)


def quieten_hub_client() -> None:
    """Keep the log and the warnings of the Hub's client from stderr: slrmerge says what failed, in its own words.

    HF_HUB_VERBOSITY and PYTHONWARNINGS show them again.
    """
    os.environ.setdefault(HUB_VERBOSITY, "error")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"huggingface_hub\b")


def _open_stream(kind: type[TextIOWrapper], fd: int, old: TextIO | None) -> TextIO:
    buffer = BufferedWriter(_Stream(fd, "wb", closefd=False))
    return kind(buffer, old.encoding if old else "utf-8", errors="replace", line_buffering=fd == 2 or buffer.isatty())


class _Messages(TextIOWrapper):
    """stderr, where other libraries print too: their warnings and logs, and progress bars that move the cursor."""

    def write(self, text: str) -> int:
        parts = _KEPT.split(text)  # what is between, and what is kept
        super().write("".join(part if _KEPT.fullmatch(part) else printable(part, keep="\n\r\t") for part in parts))
        return len(text)


class _Stream(FileIO):
    """stdout or stderr. Once it cannot be written, which only stdout reports, it discards everything."""

    _is_broken = False

    def write(self, data: Any) -> int:
        if not self._is_broken:
            try:
                return super().write(data)
            except OSError as error:
                self._is_broken = True
                if self.fileno() == 1:
                    _report(error)
        return memoryview(data).nbytes


def _report(error: OSError) -> Never:
    if error.errno == errno.EPIPE:
        sys.exit(READER_LEFT)
    what = f"the command is complete, but its result cannot be printed ({error.strerror})"
    raise OutputError(Problem("stdout-not-writable", "stdout", what, "redirect stdout elsewhere")) from error
