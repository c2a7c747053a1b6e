"""A lock file beside a folder or a file, and a check that what is beside it is this user's."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slrmerge.errors import BusyError, OutputError, Problem, raise_all
from slrmerge.io import files

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
"""Bits of a mode: group or others may write."""


def unsafe(path: Path, kind: str, is_kind: Callable[[int], bool]) -> Iterator[Problem]:
    """Why `path`, where it exists, may be another user's: its parent may be a folder that many can write to."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if not is_kind(status.st_mode):
        yield unsafe_problem(path, "is a link" if stat.S_ISLNK(status.st_mode) else f"is not a {kind}")
    elif hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        yield unsafe_problem(path, "belongs to another user")
    elif os.name != "nt" and status.st_mode & OTHERS_WRITE:
        yield unsafe_problem(path, "can be written to by other users")


def unsafe_problem(path: Path, what: str) -> Problem:
    return Problem("unsafe-staging", str(path), what, "remove it, or choose an output folder elsewhere")


def lock_file(target: Path) -> Path:
    """The file by which `target` is locked."""
    return target.parent.joinpath(f".{target.name}.slrmerge-lock")


@contextmanager
def lock(target: Path) -> Iterator[None]:
    """Hold `target` against other processes; the lock ends with the process, however it ends.

    Raises BusyError when another process holds it, OutputError for a lock file that may be someone else's, and OSError.
    """
    from filelock import FileLock, Timeout

    path = lock_file(target)
    raise_all(unsafe(path, "file", stat.S_ISREG), OutputError)
    # A file that cannot be created, as in /proc, would seem to be locked.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | files.NO_FOLLOW, 0o600))
    held = FileLock(path, mode=0o600, blocking=False)
    try:
        held.acquire()
    except Timeout:
        what, remedy = "another slrmerge process is writing to it", "wait for it, or choose another output folder"
        raise BusyError(Problem("output-busy", str(target), what, remedy)) from None
    try:
        yield
    finally:
        # Unlinked while still held: a process that opened it meanwhile finds its inode gone and tries again. Where an
        # open file cannot be unlinked (Windows) it stays; once released it may belong to another process.
        with suppress(OSError):
            path.unlink()
        held.release()
