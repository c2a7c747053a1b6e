"""Lines of files, with their numbers and places."""

from io import BytesIO
from pathlib import Path

import pytest

from slrmerge.errors import DataError
from slrmerge.evaluation import lines
from slrmerge.evaluation.lines import Line, lines_of, open_data
from tests.problems import refused


def test_lines_have_numbers_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"one\n\ntwo\nthree"
    assert list(lines_of(BytesIO(data))) == [
        Line(1, 0, b"one\n"), Line(2, 4, b"\n"), Line(3, 5, b"two\n"), Line(4, 9, b"three"),
    ]  # fmt: skip
    assert all(data[line.start :].startswith(line.data) for line in lines_of(BytesIO(data)))
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 2)
    assert b"".join(line.data for line in lines_of(BytesIO(data))) == data


def test_data_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with refused(DataError, "data-unreadable"), open_data(tmp_path / "missing"):
        raise AssertionError
    (tmp_path / "file").touch()
    with refused(DataError, "data-unreadable"), open_data(tmp_path / "file"):
        raise OSError(5, "Input/output error")
