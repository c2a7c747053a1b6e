"""One file on disk: written once from front to back, digested on the way, durable when it says so."""

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import xxhash

from slrmerge import files
from slrmerge.errors import NoSpaceError, OutputError, Problem

DIGEST_NAME = "xxh3_128"


class Written(NamedTuple):
    """A finished file: its size and the digest of its bytes (`xxh3_128:…`, as `xxhsum -H2` prints it)."""

    file_bytes: int
    digest: str


def write_chunks(
    path: Path, chunks: Iterable[memoryview], *, fsync: bool, on_bytes: Callable[[int], None] = lambda _: None
) -> Written:
    """Write `chunks` to `path`, telling `on_bytes` of every one.

    The digest covers the bytes as they were meant, so that reading the file back proves the disk. Raises NoSpaceError
    when the disk is full and OutputError for whatever else keeps the file from being written.
    """
    hasher = xxhash.xxh3_128()
    total = 0
    try:
        with open(path, "wb", buffering=0) as file:
            for chunk in chunks:
                hasher.update(chunk)
                _write_all(file.fileno(), chunk)
                total += len(chunk)
                on_bytes(len(chunk))
            if fsync:
                files.sync_file(file.fileno())
    except OSError as error:
        raise output_error(path, error) from error
    return Written(total, f"{DIGEST_NAME}:{hasher.hexdigest()}")


def digest_file(path: Path, *, on_bytes: Callable[[int], None] = lambda _: None) -> Written:
    """The size and digest of a file as it is on disk. Raises OutputError where it cannot be read."""
    hasher = xxhash.xxh3_128()
    total = 0
    buffer = memoryview(bytearray(1 << 20))
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                total += count
                on_bytes(count)
    except OSError as error:
        raise output_error(path, error) from error
    return Written(total, f"{DIGEST_NAME}:{hasher.hexdigest()}")


def output_error(path: Path, error: OSError) -> OutputError:
    """An operating system's refusal in slrmerge's words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(
            Problem(str(path), "the disk is full", "free some space and run again: finished shards are kept")
        )
    return OutputError(Problem(str(path), f"cannot be written or read ({error.strerror or error})"))


def _write_all(fd: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(fd, chunk) :]
