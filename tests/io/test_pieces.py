"""Files written in pieces: every byte, the digests, and errors of the system."""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from slrmerge.errors import NoSpaceError, OutputError
from slrmerge.io import files
from slrmerge.io import pieces as writer
from slrmerge.io.pieces import (
    Chunk,
    FileDigest,
    combine,
    digest_file,
    output_error,
    reserve,
    translate_os_errors,
    write_file,
    write_piece,
)
from tests.problems import refused

CHUNKS = [b"head", b"", b"x" * 100_000, b"tail"]
DATA = b"".join(CHUNKS)


def written(*data: bytes) -> list[Chunk]:
    return [Chunk(memoryview(each)) for each in data]


def digest(*pieces: bytes) -> str:
    """The digest of a file with these pieces."""
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(b''.join(map(xxhash.xxh3_128_digest, pieces)))}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


def test_a_piece_has_the_given_bytes_and_their_digest(path: Path) -> None:
    counts: list[int] = []
    found = write_piece(path, 0, written(*CHUNKS), on_bytes=counts.append)
    assert path.read_bytes() == DATA
    assert found == xxhash.xxh3_128_digest(DATA)
    assert digest_file(path) == FileDigest(len(DATA), digest(DATA))
    assert counts == [4, 0, 100_000, 4]


@pytest.mark.parametrize("is_cloned", [False, True])
def test_kept_chunks_are_written_only_where_nothing_was_cloned(path: Path, is_cloned: bool) -> None:
    """What was cloned is digested and left as it is; the rest is written at its place."""
    path.write_bytes(b"." * 10)
    chunks = [Chunk(memoryview(b"aa"), kept=True), Chunk(memoryview(b"bb")), Chunk(memoryview(b"cc"), kept=True)]
    found = write_piece(path, 2, chunks, clone=lambda _: is_cloned)
    assert path.read_bytes() == (b"....bb...." if is_cloned else b"..aabbcc..")
    assert found == xxhash.xxh3_128_digest(b"aabbcc")


def test_a_sparse_file_has_its_size_and_keeps_its_content(path: Path) -> None:
    path.write_bytes(b"ab")
    reserve(path, 100_000, sparse=True)
    assert path.read_bytes() == b"ab" + bytes(99_998)


def test_a_reserved_file_has_its_size_and_its_space_at_once(path: Path) -> None:
    reserve(path, 100_000)
    if sys.platform == "linux":
        assert path.stat().st_size == 100_000
        assert files.allocated_bytes(path) >= 100_000
    write_piece(path, 50_000, written(b"x" * 50_000))
    reserve(path, 100_000)
    assert path.read_bytes() == bytes(50_000) + b"x" * 50_000


def test_reserving_creates_the_file(tmp_path: Path) -> None:
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
def test_where_space_cannot_be_reserved_a_file_grows_as_it_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fallocate_fails(monkeypatch, number)
    reserve(path, 100_000)
    assert path.stat().st_size == 0
    write_piece(path, 5, written(b"tail"))
    assert path.read_bytes() == bytes(5) + b"tail"


def test_reserving_on_a_full_disk_raises_no_space_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fallocate_fails(monkeypatch, errno.ENOSPC)
    with refused(NoSpaceError, "no-space") as caught:
        reserve(path, 100_000)
    assert caught.value.problems[0].where == str(path)


def test_pieces_written_in_any_order_make_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PIECE_BYTES", 4096 * 10)
    places = list(writer.pieces(len(DATA)))
    assert places == [(0, 40960), (40960, 81920), (81920, 100_008)]
    found = {place: write_piece(path, place[0], written(DATA[slice(*place)])) for place in reversed(places)}
    assert path.read_bytes() == DATA
    assert digest_file(path).digest == combine(found[place] for place in places)
    assert digest_file(path).digest == digest(*(DATA[slice(*place)] for place in places))


def test_an_empty_file_is_one_empty_piece(path: Path) -> None:
    assert digest_file(path) == write_file(path, [], durable=False) == FileDigest(0, digest(b""))


def test_a_buffer_may_be_reused_for_every_chunk(path: Path) -> None:
    buffer = bytearray(1)

    def chunks() -> Iterator[Chunk]:
        for value in b"abc":
            buffer[0] = value
            yield Chunk(memoryview(buffer))

    write_piece(path, 0, chunks())
    assert path.read_bytes() == b"abc"


def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:999]))
    write_piece(path, 0, written(*CHUNKS))
    assert path.read_bytes() == DATA


def test_a_whole_file_has_the_digest_of_its_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PIECE_BYTES", 4096 * 10)
    found = write_file(path, CHUNKS, durable=True)
    assert path.read_bytes() == DATA
    assert found == digest_file(path) == FileDigest(len(DATA), digest(DATA[:40960], DATA[40960:81920], DATA[81920:]))


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOSPC, NoSpaceError, "no-space"),
        (errno.EDQUOT, NoSpaceError, "no-space"),
        (errno.EFBIG, OutputError, "io-error"),
        (errno.EIO, OutputError, "io-error"),
        (errno.EACCES, OutputError, "io-error"),
    ],
)
def test_an_error_of_the_system_becomes_an_output_error(number: int, kind: type[OutputError], code: str) -> None:
    error = output_error(Path("file"), OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert [(problem.code, problem.where) for problem in error.problems] == [(code, "file")]
    assert code == "no-space" or os.strerror(number) in str(error)


def test_an_error_without_a_number_keeps_its_own_text() -> None:
    error = output_error(Path("link"), OSError("Cannot call rmtree on a symbolic link"))
    assert "Cannot call rmtree on a symbolic link" in str(error)


def test_translated_errors_name_the_file_and_keep_their_notes(tmp_path: Path) -> None:
    error = OSError(errno.EIO, "broken", str(tmp_path / "inner"))
    error.add_note("kept")
    with refused(OutputError, "io-error") as caught, translate_os_errors(tmp_path):
        raise error
    assert caught.value.problems[0].where == str(tmp_path / "inner")
    assert caught.value.__notes__ == ["kept"]
    assert caught.value.__cause__ is error


def test_a_name_relative_to_an_open_folder_is_not_taken_for_a_path(tmp_path: Path) -> None:
    error = OSError(errno.EPERM, "not permitted", "inner")
    with refused(OutputError, "io-error") as caught, translate_os_errors(tmp_path):
        raise error
    assert caught.value.problems[0].where == str(tmp_path)


@pytest.mark.parametrize("where", ["missing/file", "."])
def test_a_path_that_cannot_be_written_or_read_is_named(tmp_path: Path, where: str) -> None:
    for act in (
        digest_file,
        lambda path: write_file(path, [], durable=False),
        lambda path: write_piece(path, 0, []),
    ):
        with refused(OutputError, "io-error") as caught:
            act(tmp_path / where)
        assert caught.value.problems[0].where == str(tmp_path / where)
