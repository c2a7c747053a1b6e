"""A local file returns the bytes it had when it was listed, or an error."""

import errno
import os
import pickle
from pathlib import Path

import pytest

from slrmerge.checkpoint.files import FileStatus, LocalFile, open_regular, open_within, unreadable
from slrmerge.errors import CheckpointError, SourceChangedError
from slrmerge.io.pieces import output_error
from tests.checkpoint import locked
from tests.problems import refused

CONTENT = b"abcdefg"


@pytest.fixture
def file(tmp_path: Path) -> LocalFile:
    (tmp_path / "x").write_bytes(CONTENT)
    return LocalFile.at(tmp_path / "x")


def filled(file: LocalFile, start: int, *lengths: int) -> list[bytes]:
    """Consecutive reads of a stream that begins at `start`."""
    opened = file.open()
    try:
        stream, found = opened.stream(start, len(CONTENT)), []
        for length in lengths:
            buffer = bytearray(length)
            stream.readinto(memoryview(buffer))
            found.append(bytes(buffer))
        return found
    finally:
        opened.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_no_change_of_the_file(
    file: LocalFile, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail)
    with refused(CheckpointError, "too-many-files-open"):
        file.open()
    for error in (output_error(file.path, OSError(code, "x")), unreadable(file.path, OSError(code, "x"))):
        assert "ulimit" in error.problems[0].remedy


def test_a_file_that_cannot_be_opened_is_named_with_its_folder(
    file: LocalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, *_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files", Path(name).name)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="Too many open files") as caught:
        open_within(file.path.parent, file.path.name)
    assert caught.value.filename == str(file.path)


def test_a_stream_returns_consecutive_bytes(file: LocalFile) -> None:
    assert filled(file, 1, 2, 0, 3, 1) == [b"bc", b"", b"def", b"g"]


def test_streams_of_one_open_file_are_independent(file: LocalFile) -> None:
    opened = file.open()
    first, second = opened.stream(0, 7), opened.stream(3, 7)
    one, other = bytearray(2), bytearray(2)
    for stream, buffer in ((first, one), (second, other), (first, one)):
        stream.readinto(memoryview(buffer))
    assert (bytes(one), bytes(other)) == (b"cd", b"de")
    opened.close()


def test_reading_past_the_end_is_a_truncated_file(file: LocalFile) -> None:
    with refused(SourceChangedError, "source-changed"):
        filled(file, 5, 3)


@pytest.mark.skipif("not hasattr(os, 'preadv')")
def test_short_reads_are_continued(file: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, position: whole(fd, [buffers[0][:2]], position))
    assert filled(file, 0, 7) == [CONTENT]


@pytest.mark.skipif("os.name == 'nt'")
def test_a_read_error_is_reported_with_the_path(file: LocalFile) -> None:
    opened = file.open()
    folder = os.open(file.path.parent, os.O_RDONLY)
    try:
        os.dup2(folder, opened.fd)
        with refused(CheckpointError, "unreadable") as caught:
            opened.stream(0, 1).readinto(memoryview(bytearray(1)))
    finally:
        os.close(folder)
        opened.close()
    assert caught.value.problems[0].where == str(file)


def test_a_stream_of_a_closed_file_does_not_read_another_file(file: LocalFile) -> None:
    opened = file.open()
    stream = opened.stream(0, 1)
    opened.close()
    with open_regular(file.path):  # which gets the number of the closed one
        with refused(CheckpointError, "unreadable"):
            stream.readinto(memoryview(bytearray(1)))
        with refused(CheckpointError, "unreadable"):
            opened.check_unchanged()


@pytest.mark.timeout(10)
@pytest.mark.skipif("os.name == 'nt'")
def test_a_fifo_that_took_the_place_of_a_file_is_refused_at_once(file: LocalFile) -> None:
    file.path.unlink()
    os.mkfifo(file.path)
    with refused(SourceChangedError, "source-changed"):
        file.open()


@pytest.mark.skipif("not os.path.isdir('/dev/fd')")
def test_a_refused_file_is_not_left_open(file: LocalFile) -> None:
    before = len(list(Path("/dev/fd").iterdir()))
    os.truncate(file.path, 1)
    with refused(SourceChangedError, "source-changed"):
        file.open()
    assert len(list(Path("/dev/fd").iterdir())) == before


@pytest.mark.timeout(10)
@pytest.mark.skipif("os.name == 'nt'")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with refused(CheckpointError, "not-a-file") as caught:
            open_regular(path)
        assert caught.value.problems[0].where == str(path)


def test_a_local_file_is_a_value(file: LocalFile) -> None:
    copy = pickle.loads(pickle.dumps(file))
    assert (copy, hash(copy), str(copy)) == (file, hash(file), str(file.path))
    assert filled(copy, 0, 7) == [CONTENT]
    assert (copy.file_bytes, copy.download_bytes, copy.fetch()) == (7, 0, file.path)
    assert file.identity == FileStatus.of(file.path.stat())
    os.utime(file.path, ns=(0, 0))
    assert LocalFile.at(file.path) != file


@pytest.mark.skipif("os.name == 'nt'")
def test_a_file_without_permission_can_no_longer_be_opened(file: LocalFile) -> None:
    with locked(file.path), refused(SourceChangedError, "source-changed"):
        file.open()


@pytest.mark.skipif("os.name == 'nt'")
def test_an_edit_is_noticed_where_the_mtime_was_put_back(file: LocalFile) -> None:
    opened = file.open()
    file.path.write_bytes(CONTENT[::-1])
    put_back = file.status.mtime_ns, file.status.mtime_ns
    os.utime(file.path, ns=put_back)
    while file.path.stat().st_ctime_ns == file.status.ctime_ns:  # the clock of file times is coarse
        os.utime(file.path, ns=put_back)
    with refused(SourceChangedError, "source-changed"):
        opened.check_unchanged()
    with refused(SourceChangedError, "source-changed"):
        file.open()
    opened.close()


@pytest.mark.skipif("not os.path.isdir('/dev/fd')")
def test_a_file_that_nothing_refers_to_is_closed(file: LocalFile) -> None:
    before = len(list(Path("/dev/fd").iterdir()))
    stream = file.open().stream(0, 7)
    buffer = bytearray(7)
    stream.readinto(memoryview(buffer))  # the stream keeps it open
    assert bytes(buffer) == CONTENT
    del stream
    assert len(list(Path("/dev/fd").iterdir())) == before
