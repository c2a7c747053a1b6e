"""Folders that appear at once: lock, durable write, atomic swap.

A target is never written in place: work happens in a sibling folder which takes the target's name when it is complete.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slrmerge.errors import BusyError, Problem


def staging_folder(target: Path) -> Path:
    """The sibling in which `target` is made."""
    return target.with_name(f".{target.name}.slrmerge-partial")


def set_aside_folder(target: Path) -> Path:
    """Where the old `target` waits during a swap, on systems that cannot exchange two folders in one step."""
    return target.with_name(f".{target.name}.slrmerge-old")


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold `target` against other runs; the lock goes with the process, however it ends.

    Raises BusyError when another run holds it.
    """
    from filelock import FileLock, Timeout

    path = target.with_name(f".{target.name}.slrmerge-lock")
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            Problem(str(target), "another slrmerge is writing it", "wait for that run, or choose another --out")
        ) from None
    try:
        yield
    finally:
        # Unlinked while still held: whoever opened it meanwhile finds its inode gone, and tries again. Where an open
        # file cannot be unlinked (Windows) it stays; once released it may be somebody else's.
        with suppress(OSError):
            path.unlink()
        lock.release()


def create_folder(path: Path, *, fsync: bool) -> None:
    """Make a folder and those above it, with the mode that the umask gives."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode=0o777, parents=True, exist_ok=True)
    for folder in missing if fsync else ():
        sync_folder(folder.parent)


def free_bytes(path: Path) -> int:
    """The room on the disk that `path` is or would be on."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def reserve(path: Path, file_bytes: int) -> None:
    """Make a file, or take up the one that is there, and have the disk set `file_bytes` aside for it where it can.

    Elsewhere the file grows as it is written. (Linux fallocate: what Python has would write zeros where it cannot.)
    """
    fallocate = _linux("fallocate")
    with open(path, "ab") as file:
        if fallocate and file_bytes and fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(file_bytes)):
            number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR):
                raise OSError(number, os.strerror(number), str(path))


def held_bytes(path: Path) -> int:
    """The room that a file has on its disk, as far as the system tells."""
    status = path.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size


def write_file(path: Path, data: bytes, *, fsync: bool) -> None:
    """Write a small file whole, with the mode that the umask gives."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        if fsync:
            sync_file(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file so that its name holds the old content or the new, never half of it."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_bytes(data)
    os.replace(beside, path)


def sync_file(fd: int) -> None:
    """Bring a file's bytes to the disk itself (macOS needs more than fsync for that)."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def sync_path(path: Path) -> None:
    """Bring a closed file's bytes to the disk, whoever wrote them."""
    with open(path, "r+b") as file:
        sync_file(file.fileno())


def sync_folder(path: Path) -> None:
    """Bring a folder's entries to the disk; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(staging: Path, target: Path) -> Path | None:
    """Give the finished `staging` folder the name `target`; returns where an older `target` is now, to be removed.

    On Linux the two names are exchanged in one step. Elsewhere the old folder is first set aside: a kill between the
    two renames leaves the target absent and the old folder whole, and `recover` brings it back.
    """
    if not target.exists() or not any(target.iterdir()):
        if os.name == "nt" and target.exists():
            target.rmdir()
        os.replace(staging, target)
        leftover = None
    elif _exchange(staging, target):
        leftover = staging
    else:
        leftover = set_aside_folder(target)
        os.replace(target, leftover)
        try:
            os.replace(staging, target)
        except OSError:
            os.replace(leftover, target)
            raise
    return leftover


def recover(target: Path) -> bool:
    """Mend what a kill inside `publish` left behind; True when an old `target` was brought back."""
    old = set_aside_folder(target)
    if not old.exists():
        return False
    if target.exists():
        shutil.rmtree(old)
        return False
    os.replace(old, target)
    return True


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step (Linux renameat2); False where kernel or file system cannot."""
    renameat2 = _linux("renameat2")
    if renameat2 is None:
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return done == 0


def _linux(name: str) -> Any:
    """A function of Linux's C library that Python has not; None elsewhere and where the library has not either."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None) if sys.platform == "linux" else None
