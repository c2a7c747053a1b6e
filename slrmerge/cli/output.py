"""The one place that writes to stdout and stderr: escapes what does not print, and hides the credentials of URLs."""

import errno
import os
import sys
from collections.abc import Mapping
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any, Never, TextIO

import click

from slrmerge.errors import OutputError, Problem, without_credentials
from slrmerge.io.text import printable, to_json

_CURSOR_UP = "\x1b[A"

READER_LEFT = 141
"""The exit code that shells report for a closed pipe."""


def echo(line: str = "", *, err: bool = False) -> None:
    """Print one line on stdout or stderr."""
    click.echo(shown(line), err=err)


def shown(text: str, *, keep: str = "") -> str:
    """What may be shown of a text; see `printable` for `keep`."""
    return printable(without_credentials(text), keep=keep)


def echo_text(text: str) -> None:
    """Print lines on stdout that are printable already: YAML, and the schema."""
    click.echo(printable(text, keep="\n"), nl=False)


def print_json(value: Mapping[str, Any]) -> None:
    click.echo(to_json(value, indent=2, keep=""))


class Table:
    """A table; columns that start with > are aligned right, cells may have several lines."""

    def __init__(self, *columns: str) -> None:
        self._columns, self._rows = columns, list[tuple[str, ...]]()

    def add_row(self, *cells: str) -> None:
        self._rows.append(cells)

    def print(self) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(box=None, pad_edge=False, header_style="bold")
        for column in self._columns:
            name, justify = column.removeprefix(">"), "right" if column[:1] == ">" else "left"
            table.add_column(shown(name, keep="\n"), justify=justify, no_wrap=True)  # type: ignore[arg-type]  # a literal type
        for row in self._rows:
            table.add_row(*(shown(cell, keep="\n") for cell in row))
        console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console.width = 10_000
        with console.capture() as captured:
            console.print(table)
        click.echo(captured.get())


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


def _open_stream(kind: type[TextIOWrapper], fd: int, old: TextIO | None) -> TextIO:
    buffer = BufferedWriter(_Stream(fd, "wb", closefd=False))
    return kind(buffer, old.encoding if old else "utf-8", errors="replace", line_buffering=fd == 2 or buffer.isatty())


class _Messages(TextIOWrapper):
    """stderr, where other libraries print too: their warnings and logs, and progress bars that move the cursor."""

    def write(self, text: str) -> int:
        super().write(_CURSOR_UP.join(printable(part, keep="\n\r\t") for part in text.split(_CURSOR_UP)))
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
    raise OutputError(Problem("stdout-not-writable", "stdout", what, "print it elsewhere")) from error
