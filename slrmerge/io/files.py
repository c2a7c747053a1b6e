"""Files and folders on the disk: durable writes, reserved space, atomic replacement."""

import ctypes
import errno
import os
import shutil
import stat
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from slrmerge.errors import require_type
from slrmerge.io.sizes import format_bytes

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)
"""For a FIFO that took a file's place. Windows has neither flag."""


def create_folder(path: Path, *, durable: bool) -> None:
    """Create a folder and its parents, with the mode that the umask gives."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode=0o777, parents=True, exist_ok=True)
    for folder in missing if durable else ():
        sync_folder(folder.parent)


def open_no_link(path: str, flags: int) -> int:
    """An opener that follows no link and waits for no FIFO: what is written to a folder goes into that folder."""
    return os.open(path, flags | NO_FOLLOW | NO_WAIT, 0o666)


def open_no_wait(path: str, flags: int) -> int:
    """An opener for reading that waits for no writer where a FIFO took a file's place."""
    return os.open(path, flags | NO_WAIT)


def open_files_remedy(error: OSError) -> str:
    """What to do where the system's limit on open files is the reason; else nothing."""
    return "allow more open files: ulimit -n 1024" if error.errno in (errno.EMFILE, errno.ENFILE) else ""


def as_path(name: str, value: str | os.PathLike[str]) -> Path:
    """The path that a caller passes as the argument `name`. Raises OptionError for a value of another type."""
    require_type(name, value, (str, os.PathLike), "pass a path")
    return Path(value)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that `path` is or would be on."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def reserve(path: Path, file_bytes: int) -> None:
    """Create a file, or reuse an existing one, and reserve `file_bytes` of disk space for it where the system can.

    Elsewhere the file grows as it is written. Calls fallocate itself: os.posix_fallocate writes zeros where the file
    system cannot reserve space.
    """
    fallocate = _libc_function("fallocate")
    with open(path, "ab", opener=open_no_link) as file:
        if fallocate and file_bytes and fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(file_bytes)):
            number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR):
                raise OSError(number, os.strerror(number), str(path))


def extend(path: Path, file_bytes: int) -> None:
    """Create a file, or reuse an existing one, with a hole up to `file_bytes`."""
    with open(path, "ab", opener=open_no_link) as file:
        os.ftruncate(file.fileno(), file_bytes)


_FICLONERANGE = 0x4020940D
_CANNOT_CLONE = {
    errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EAGAIN
}  # fmt: skip


def clone_range(source: int, target: int, start: int, stop: int) -> bool:
    """Make bytes `start` to `stop` of one open file share the disk space of those of another, until either is written.

    Linux's FICLONERANGE, on file systems such as XFS and btrfs; False where they cannot. Both ends are multiples of the
    file system's block, or the end is that of both files.
    """
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, start, stop - start, start))
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


def allocated_bytes(path: Path) -> int:
    """Bytes of disk space that a file occupies, as far as the system reports them."""
    status = path.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size


def read_file(path: Path, max_bytes: int) -> bytes:
    """A regular file, whole. Raises OSError also for anything else (a FIFO would block), and for a larger file."""
    with open(path, "rb", opener=open_no_wait) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {format_bytes(max_bytes)}", str(path))
    return data


def write_file(path: Path, data: bytes, *, durable: bool) -> None:
    """Write a small file, with the mode that the umask gives."""
    with open(path, "wb", opener=open_no_link) as file:
        file.write(data)
        file.flush()
        if durable:
            sync_file(file.fileno())


def replace_file(
    path: Path, data: bytes | Iterable[bytes], *, beside: Path | None = None, mode: int | None = None
) -> None:
    """Replace a file atomically, by `data` or its lines: its name refers to the old content or to the new.

    They are written to `beside` first, or to `path` with `.new` after its name. `mode` is instead of the umask's.
    """
    beside = beside or path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)  # left by a killed run; or a hard link, through which another file would change
    try:
        with open(beside, "xb", opener=open_no_link) as file:
            if mode is not None:
                beside.chmod(mode)
            file.writelines([data] if isinstance(data, bytes) else data)
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file that a user names, whole or not at all: a full disk leaves what was there.

    Links are followed. A file that is replaced keeps its mode: one that is private stays private.
    """
    if path.exists() and not path.is_file():  # a terminal or a pipe
        path.write_text(text, encoding="utf-8")
    else:
        target = Path(os.path.realpath(path))
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        replace_file(target, text.encode(), beside=target.with_name(f".slrmerge-{os.getpid()}.new"), mode=mode)


def sync_file(fd: int) -> None:
    """Flush an open file to the disk (on macOS with F_FULLFSYNC, which fsync does not imply)."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def sync_path(path: Path) -> None:
    """Flush a closed file to the disk."""
    with open(path, "r+b", opener=open_no_link) as file:
        sync_file(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk; does nothing where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically (Linux renameat2); False where the kernel or the file system cannot."""
    renameat2 = _libc_function("renameat2")
    if renameat2 is None:
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return done == 0


def _libc_function(name: str) -> Any:
    """A function of Linux's C library that Python does not expose; None where there is none."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None) if sys.platform == "linux" else None
