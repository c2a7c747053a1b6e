"""Files with a line of JSON for each thing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from slrmerge.checkpoint.files import open_regular
from slrmerge.errors import CheckpointError, DataError, Problem

MAX_LINE_BYTES = 1 << 28

PROBLEMS_SHOWN = 10
"""Invalid lines that an error names."""


class Line(NamedTuple):
    """A line of a file with its number, and where it starts, in bytes."""

    number: int
    start: int
    data: bytes


def lines_of(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file from its start; one of more than MAX_LINE_BYTES is cut up."""
    start = 0
    for number, data in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
        yield Line(number, start, data)
        start += len(data)


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """A regular file that is open for the block. Raises DataError where it cannot be opened, or read in the block."""
    try:
        with _open(path) as file:
            yield file
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise DataError(Problem("data-unreadable", str(path), what, "check the path")) from error


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except CheckpointError as error:
        raise DataError(*error.problems) from None
