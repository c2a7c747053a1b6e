"""One file on disk: every byte of it, its digest, and the system's refusals in words."""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from slrmerge import files, writer
from slrmerge.errors import NoSpaceError, OutputError
from slrmerge.writer import Written, combine, digest_file, output_error, reserve, write_content, write_piece

CHUNKS = [b"head", b"", b"x" * 100_000, b"tail"]
DATA = b"".join(CHUNKS)


def digest(*pieces: bytes) -> str:
    """The digest of a file with these pieces."""
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(b''.join(map(xxhash.xxh3_128_digest, pieces)))}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


def test_a_piece_is_what_was_given_and_its_digest_is_that_of_its_bytes(path: Path) -> None:
    told: list[int] = []
    found = write_piece(path, 0, map(memoryview, CHUNKS), on_bytes=told.append)
    assert path.read_bytes() == DATA
    assert found == xxhash.xxh3_128_digest(DATA)
    assert digest_file(path) == Written(len(DATA), digest(DATA))
    assert told == [4, 0, 100_000, 4]


def test_a_reserved_file_has_its_size_and_its_room_at_once(path: Path) -> None:
    reserve(path, 100_000)
    if sys.platform == "linux":
        assert path.stat().st_size == 100_000
        assert files.held_bytes(path) >= 100_000
    write_piece(path, 50_000, [memoryview(b"x" * 50_000)])
    reserve(path, 100_000)
    assert path.read_bytes() == bytes(50_000) + b"x" * 50_000


def test_a_file_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    reserve(tmp_path / "new", 0)
    assert (tmp_path / "new").read_bytes() == b""


def fallocate_fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    class Library:
        def fallocate(self, *arguments: object) -> int:
            ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(files.sys, "platform", "linux")  # type: ignore[attr-defined]
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: Library())


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_no_room_can_be_set_aside_a_file_grows_as_it_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fallocate_fails(monkeypatch, number)
    reserve(path, 100_000)
    assert path.stat().st_size == 0
    write_piece(path, 5, [memoryview(b"tail")])
    assert path.read_bytes() == bytes(5) + b"tail"


def test_no_room_is_said_when_a_file_is_reserved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fallocate_fails(monkeypatch, errno.ENOSPC)
    with pytest.raises(NoSpaceError) as caught:
        reserve(path, 100_000)
    assert str(caught.value) == f"{path}: the disk is full; free some space and run again"


def test_pieces_written_in_any_order_make_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PIECE_BYTES", 4096 * 10)
    places = list(writer.pieces(len(DATA)))
    assert places == [(0, 40960), (40960, 81920), (81920, 100_008)]
    found = {place: write_piece(path, place[0], [memoryview(DATA)[slice(*place)]]) for place in reversed(places)}
    assert path.read_bytes() == DATA
    assert digest_file(path).digest == combine(found[place] for place in places)
    assert digest_file(path).digest == digest(*(DATA[slice(*place)] for place in places))


def test_an_empty_file_is_one_empty_piece(path: Path) -> None:
    assert digest_file(path) == write_content(path, b"", fsync=False) == Written(0, digest(b""))


def test_a_buffer_that_is_used_again_for_every_chunk_is_written_in_time(path: Path) -> None:
    buffer = bytearray(1)

    def chunks() -> Iterator[memoryview]:
        for value in b"abc":
            buffer[0] = value
            yield memoryview(buffer)

    write_piece(path, 0, chunks())
    assert path.read_bytes() == b"abc"


def test_a_system_that_takes_a_few_bytes_at_a_time_gets_them_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:999]))
    write_piece(path, 0, map(memoryview, CHUNKS))
    assert path.read_bytes() == DATA


FULL = "file: the disk is full; free some space and run again"


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, NoSpaceError, FULL),
        (errno.EDQUOT, NoSpaceError, FULL),
        (errno.EFBIG, OutputError, "file: cannot be written or read (File too large)"),
        (errno.EIO, OutputError, "file: cannot be written or read (Input/output error)"),
        (errno.EACCES, OutputError, "file: cannot be written or read (Permission denied)"),
    ],
)
def test_a_refusal_of_the_system_is_said_in_words(number: int, kind: type[OutputError], message: str) -> None:
    error = output_error(Path("file"), OSError(number, os.strerror(number)))
    assert (type(error), str(error)) == (kind, message)


def test_a_refusal_without_a_number_keeps_its_own_words() -> None:
    error = output_error(Path("link"), OSError("Cannot call rmtree on a symbolic link"))
    assert str(error) == "link: cannot be written or read (Cannot call rmtree on a symbolic link)"


@pytest.mark.parametrize("where", ["missing/file", "."])
def test_a_place_that_cannot_be_written_or_read_is_named(tmp_path: Path, where: str) -> None:
    reason = "Is a directory" if where == "." else "No such file or directory"
    for act in (
        digest_file,
        lambda path: write_content(path, b"", fsync=False),
        lambda path: write_piece(path, 0, []),
    ):
        with pytest.raises(OutputError) as caught:
            act(tmp_path / where)
        assert str(caught.value) == f"{tmp_path / where}: cannot be written or read ({reason})"
