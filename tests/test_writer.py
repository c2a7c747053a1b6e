"""One file on disk: every byte of it, its digest, and the system's refusals in words."""

import errno
import os
from pathlib import Path

import pytest
import xxhash

from slrmerge.errors import NoSpaceError, OutputError
from slrmerge.writer import Written, digest_file, output_error, write_chunks

CHUNKS = [b"head", b"", b"x" * 100_000, b"tail"]
DATA = b"".join(CHUNKS)
WRITTEN = Written(len(DATA), f"xxh3_128:{xxhash.xxh3_128_hexdigest(DATA)}")


def test_what_is_written_is_what_was_given_and_its_digest_is_that_of_the_whole(tmp_path: Path) -> None:
    told: list[int] = []
    written = write_chunks(tmp_path / "file", map(memoryview, CHUNKS), fsync=False, on_bytes=told.append)
    assert (tmp_path / "file").read_bytes() == DATA
    assert written == WRITTEN == digest_file(tmp_path / "file")
    assert told == [4, 0, 100_000, 4]


def test_a_digest_is_what_xxhsum_prints(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert digest_file(tmp_path / "file") == Written(0, "xxh3_128:99aa06d3014798d86001c324468d497f")


def test_a_buffer_that_is_used_again_for_every_chunk_is_written_in_time(tmp_path: Path) -> None:
    buffer = bytearray(1)

    def chunks() -> "object":
        for value in b"abc":
            buffer[0] = value
            yield memoryview(buffer)

    write_chunks(tmp_path / "file", chunks(), fsync=False)  # type: ignore[arg-type]
    assert (tmp_path / "file").read_bytes() == b"abc"


def test_a_system_that_takes_a_few_bytes_at_a_time_gets_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:999]))
    assert write_chunks(tmp_path / "file", map(memoryview, CHUNKS), fsync=False) == WRITTEN
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("fsync", [True, False])
def test_a_file_is_synced_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: sizes.append(os.fstat(fd).st_size))
    write_chunks(tmp_path / "file", map(memoryview, CHUNKS), fsync=fsync)
    assert sizes == ([len(DATA)] if fsync else [])


def test_progress_is_told_while_a_file_is_digested(tmp_path: Path) -> None:
    told: list[int] = []
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    digest_file(tmp_path / "file", on_bytes=told.append)
    assert (sum(told), len(told)) == (3_000_000, 3)


FULL = "file: the disk is full; free some space and run again: finished shards are kept"


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
    for act in (digest_file, lambda path: write_chunks(path, [], fsync=False)):
        with pytest.raises(OutputError) as caught:
            act(tmp_path / where)
        assert str(caught.value) == f"{tmp_path / where}: cannot be written or read ({reason})"
