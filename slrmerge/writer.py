"""Files on disk: written in pieces by any number of threads, digested on the way, durable when they say so."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import xxhash

from slrmerge import files
from slrmerge.errors import NoSpaceError, OutputError, Problem

PIECE_BYTES = 1 << 24
"""Files are written and digested in pieces of 16 MiB, so that several cores can share one file."""

CHUNK_BYTES = 1 << 20
"""Bytes per step: few calls, and small enough to stay in a core's cache."""

DIGEST_NAME = "xxh3_128"


class Written(NamedTuple):
    """A finished file: its size, and the xxh3_128 of the xxh3_128 digests of its pieces, in order."""

    file_bytes: int
    digest: str


def pieces(file_bytes: int) -> Iterator[tuple[int, int]]:
    """Where each piece of a file starts and stops; an empty file is one empty piece."""
    for start in range(0, max(file_bytes, 1), PIECE_BYTES):
        yield start, min(start + PIECE_BYTES, file_bytes)


def combine(digests: Iterable[bytes]) -> str:
    """A file's digest from those of its pieces."""
    return f"{DIGEST_NAME}:{xxhash.xxh3_128_hexdigest(b''.join(digests))}"


def reserve(path: Path, file_bytes: int) -> None:
    """Make a file of this size, or take up the one that is there, and have the disk set room aside for it where it can.

    Room that is known to be there is also written to faster (a quarter, on ext4). Raises as `write_piece` does.
    """
    try:
        files.reserve(path, file_bytes)
    except OSError as error:
        raise output_error(path, error) from error


def write_piece(
    path: Path, start: int, chunks: Iterable[memoryview], *, on_bytes: Callable[[int], None] = lambda _: None
) -> bytes:
    """Write `chunks` to the existing file `path`, from byte `start` on; returns the digest of the piece.

    Whatever is written is told to `on_bytes`.

    Raises NoSpaceError when the disk is full and OutputError for whatever else keeps the file from being written.
    """
    hasher = xxhash.xxh3_128()
    try:
        with open(path, "r+b", buffering=0) as file:
            file.seek(start)
            for chunk in chunks:
                hasher.update(chunk)
                left = chunk
                while left:
                    left = left[os.write(file.fileno(), left) :]
                on_bytes(len(chunk))
    except OSError as error:
        raise output_error(path, error) from error
    return hasher.digest()


def write_content(path: Path, content: bytes, *, fsync: bool) -> Written:
    """Write a whole file from memory; raises as `write_piece` does."""
    try:
        files.write_file(path, content, fsync=fsync)
    except OSError as error:
        raise output_error(path, error) from error
    view = memoryview(content)
    return Written(len(content), combine(xxhash.xxh3_128_digest(view[slice(*piece)]) for piece in pieces(len(content))))


def digest_piece(path: Path, start: int, stop: int) -> bytes:
    """The digest of bytes `start` to `stop` of a file as it is on disk. Raises OutputError where it cannot be read."""
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while start < stop and (count := file.readinto(buffer[: stop - start])):
                hasher.update(buffer[:count])
                start += count
    except OSError as error:
        raise output_error(path, error) from error
    return hasher.digest()


def digest_file(path: Path) -> Written:
    """The size and digest of a file as it is on disk. Raises OutputError where it cannot be read."""
    try:
        file_bytes = path.stat().st_size
    except OSError as error:
        raise output_error(path, error) from error
    return Written(file_bytes, combine(digest_piece(path, *piece) for piece in pieces(file_bytes)))


def output_error(path: Path, error: OSError) -> OutputError:
    """An operating system's refusal in slrmerge's words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(Problem(str(path), "the disk is full", "free some space and run again"))
    return OutputError(Problem(str(path), f"cannot be written or read ({error.strerror or error})"))


@contextmanager
def os_errors_at(target: Path) -> Iterator[None]:
    """Refusals of the operating system that nobody closer has put into words."""
    try:
        yield
    except OSError as error:
        said = output_error(Path(error.filename or target), error)
        for note in getattr(error, "__notes__", ()):
            said.add_note(note)
        raise said from error
