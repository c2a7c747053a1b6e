"""Files written and digested in pieces, by any number of threads."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from slrmerge.errors import NoSpaceError, OutputError, Problem
from slrmerge.io import files

PIECE_BYTES = 1 << 24
"""Files are written and digested in pieces of 16 MiB, so that several threads can share one file."""

CHUNK_BYTES = 1 << 20
"""Bytes per read: few calls, and small enough for a core's cache."""

WRITE_BYTES = 1 << 16
"""Bytes per write. Linux caches a write in as large blocks of memory as its length allows; where memory is fragmented,
it moves other pages first to make room for them: beside full caches, merges that write 256 KiB at a time took a third
longer, and those that write 1 MiB several times as long."""

DIGEST_NAME = "xxh3_128"


class Chunk(NamedTuple):
    """Consecutive bytes of a file, valid until the next chunk; `kept` ones are also what a clone brings."""

    data: memoryview
    kept: bool = False


class FileDigest(NamedTuple):
    """A file's size and digest: the xxh3_128 of the xxh3_128 digests of its pieces, in order."""

    file_bytes: int
    digest: str


def pieces(file_bytes: int) -> Iterator[tuple[int, int]]:
    """The start and the end of each piece of a file; an empty file is one empty piece."""
    for start in range(0, max(file_bytes, 1), PIECE_BYTES):
        yield start, min(start + PIECE_BYTES, file_bytes)


def combine(digests: Iterable[bytes]) -> str:
    """The digest of a file from the digests of its pieces."""
    return digest_bytes(b"".join(digests))


def digest_bytes(data: bytes) -> str:
    """The digest of bytes in memory."""
    return f"{DIGEST_NAME}:{xxhash.xxh3_128_hexdigest(data)}"


def reserve(path: Path, file_bytes: int, *, sparse: bool = False) -> None:
    """Create a file, or reuse an existing one, with disk space for `file_bytes` reserved where the system can.

    Writing into reserved space is also faster (by a quarter on ext4). A `sparse` file, most of which is to be cloned,
    only gets its size. Raises NoSpaceError and OutputError.
    """
    with translate_os_errors(path):
        (files.extend if sparse else files.reserve)(path, file_bytes)


def write_piece(
    path: Path,
    start: int,
    chunks: Iterable[Chunk],
    *,
    clone: Callable[[int], bool] = lambda _: False,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> bytes:
    """Write `chunks` to the existing file `path` from byte `start` on; returns the digest of the piece.

    `clone` is called with the file's descriptor first; where it returns True, kept chunks are there already and are
    only digested. Calls `on_bytes(n)` after each chunk. Raises NoSpaceError when the disk is full, OutputError for
    other failures.
    """
    hasher = xxhash.xxh3_128()
    with translate_os_errors(path), open(path, "r+b", buffering=0, opener=files.open_no_link) as file:
        file.seek(start)
        is_cloned = clone(file.fileno())
        for data, kept in chunks:
            hasher.update(data)
            if is_cloned and kept:
                file.seek(len(data), os.SEEK_CUR)
            else:
                left = data
                while left:
                    left = left[os.write(file.fileno(), left[:WRITE_BYTES]) :]
            on_bytes(len(data))
    return hasher.digest()


def write_file(path: Path, chunks: Iterable[bytes | memoryview], *, durable: bool) -> FileDigest:
    """Write a whole file from `chunks`. Raises NoSpaceError and OutputError."""
    digests: list[bytes] = []
    hasher, filled, file_bytes = xxhash.xxh3_128(), 0, 0
    with translate_os_errors(path), open(path, "wb", opener=files.open_no_link) as file:
        for chunk in chunks:
            left = memoryview(chunk)
            file.write(left)
            file_bytes += len(left)
            while left:
                part, left = left[: PIECE_BYTES - filled], left[PIECE_BYTES - filled :]
                hasher.update(part)
                filled += len(part)
                if filled == PIECE_BYTES:
                    digests.append(hasher.digest())
                    hasher, filled = xxhash.xxh3_128(), 0
        file.flush()
        if durable:
            files.sync_file(file.fileno())
    if filled or not digests:
        digests.append(hasher.digest())
    return FileDigest(file_bytes, combine(digests))


def digest_piece(path: Path, start: int, stop: int) -> bytes:
    """The digest of bytes `start` to `stop` of a file on the disk. Raises OutputError where it cannot be read."""
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with translate_os_errors(path), open(path, "rb", buffering=0, opener=files.open_no_wait) as file:
        file.seek(start)
        while start < stop and (count := file.readinto(buffer[: stop - start])):
            hasher.update(buffer[:count])
            start += count
    return hasher.digest()


def digest_file(path: Path) -> FileDigest:
    """The size and digest of a file on the disk. Raises OutputError where it cannot be read."""
    with translate_os_errors(path):
        file_bytes = path.stat().st_size
    return FileDigest(file_bytes, combine(digest_piece(path, *piece) for piece in pieces(file_bytes)))


def git_digest(file: BinaryIO) -> str:
    """The digest by which git, and the Hub for small files, names the content of a file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return f"git-sha1:{hashlib.file_digest(file, lambda: start).hexdigest()}"  # type: ignore[arg-type]


def require_free_bytes(path: Path, needed_bytes: int, what: str, remedy: str) -> None:
    """Raise NoSpaceError unless the disk that `path` is or would be on has `needed_bytes` free for `what`."""
    free = files.free_bytes(path)
    if needed_bytes > free and hasattr(os, "sync"):
        os.sync()  # btrfs frees the space of deleted files when it next writes to the disk
        free = files.free_bytes(path)
    if needed_bytes > free:
        short = f"{what} needs {needed_bytes / 1e9:,.2f} GB, the disk has {free / 1e9:,.2f} GB free"
        remedy = f"free {(needed_bytes - free) / 1e9:,.2f} GB, or {remedy}"
        raise NoSpaceError(Problem("no-space", str(path), short, remedy))


def output_error(path: Path, error: OSError) -> OutputError:
    """The OutputError for an OSError at `path`; NoSpaceError where the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(Problem("no-space", str(path), "the disk is full", "free some space and run again"))
    what = f"cannot be written or read ({error.strerror or error})"
    return OutputError(Problem("io-error", str(path), what, files.open_files_remedy(error)))


@contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Raise OutputError or NoSpaceError, about the file that it names or else `path`, for an OSError in the block."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename or path)  # rmtree's names are relative to a folder that it has open
        translated = output_error(named if named.is_absolute() else path, error)
        for note in getattr(error, "__notes__", ()):
            translated.add_note(note)
        raise translated from error
