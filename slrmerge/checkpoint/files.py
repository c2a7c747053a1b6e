"""The files that a checkpoint is made of: values that can be compared, pickled and opened, wherever the files are.

Local files are read at positions, not mapped: a mapped file that is truncated kills the process, and its pages count as
this process's memory.
"""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO, NamedTuple, Protocol

from slrmerge.errors import CheckpointError, Problem, SlrmergeError, SourceChangedError

_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
"""No newline translation on Windows, and no waiting for a FIFO that took a file's place."""


class ByteStream(Protocol):
    """Consecutive bytes of a file."""

    def readinto(self, buffer: memoryview) -> None:
        """Fill `buffer` with the next bytes. Raises SourceChangedError, CheckpointError or HubError."""
        ...


class OpenFile(Protocol):
    """A file that is open for reading; safe to share between threads."""

    def stream(self, start: int, stop: int) -> ByteStream:
        """The bytes from `start` to `stop`."""
        ...

    def check_unchanged(self) -> None:
        """Raise SourceChangedError where the file has changed since it was listed, CheckpointError where unreadable."""
        ...

    def close(self) -> None: ...


class SourceFile(Protocol):
    """A file of a checkpoint, as it was when it was listed. `str()` is how messages name it."""

    @property
    def file_bytes(self) -> int: ...

    @property
    def download_bytes(self) -> int:
        """The bytes to download before the whole file is on this disk."""
        ...

    @property
    def identity(self) -> tuple[object, ...]:
        """What changes whenever the file's content does."""
        ...

    def open(self, cancelled: Event | None = None) -> OpenFile:
        """Open for reading; set `cancelled` to stop waiting for the network."""
        ...

    def fetch(self, on_bytes: Callable[[int], None] = lambda _: None, cancelled: Event | None = None) -> Path:
        """The whole file on this disk, downloaded if need be. Raises HubError and NoSpaceError."""
        ...


class FileStatus(NamedTuple):
    """What a local file was when it was listed; any difference later means that it was changed or replaced."""

    inode: int
    file_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileStatus":
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A SourceFile on this disk."""

    path: Path
    status: FileStatus

    @classmethod
    def at(cls, path: Path) -> "LocalFile":
        return cls(path, FileStatus.of(path.stat()))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def file_bytes(self) -> int:
        return self.status.file_bytes

    @property
    def download_bytes(self) -> int:
        return 0

    @property
    def identity(self) -> tuple[object, ...]:
        return self.status

    def open(self, cancelled: Event | None = None) -> "OpenLocalFile":  # noqa: ARG002 (local reads do not wait)
        """See `SourceFile`. Raises SourceChangedError where the file is no longer what it was."""
        try:
            fd = os.open(self.path, os.O_RDONLY | _FLAGS)
        except OSError as error:
            raise _changed(self.path, f"can no longer be opened ({error.strerror})") from error
        opened = OpenLocalFile(self, fd)
        try:
            opened.check_unchanged()
        except SlrmergeError:
            opened.close()
            raise
        return opened

    def fetch(self, on_bytes: Callable[[int], None] = lambda _: None, cancelled: Event | None = None) -> Path:  # noqa: ARG002
        return self.path


class OpenLocalFile:
    """An OpenFile on this disk. One that is replaced by a rename keeps its old bytes here."""

    def __init__(self, file: LocalFile, fd: int) -> None:
        self.file, self.fd = file, fd

    def stream(self, start: int, stop: int) -> "_LocalStream":  # noqa: ARG002 (the caller reads no further)
        return _LocalStream(self, start)

    def check_unchanged(self) -> None:
        try:
            status = FileStatus.of(os.fstat(self.fd))
        except OSError as error:
            raise unreadable(self.file.path, error) from error
        if status != self.file.status:
            raise _changed(self.file.path, "changed while it was being read")

    def close(self) -> None:
        fd, self.fd = self.fd, -1  # later reads fail, and do not read another file that got the same number
        os.close(fd)


class _LocalStream:
    def __init__(self, file: OpenLocalFile, position: int) -> None:
        self._file, self._position = file, position

    def readinto(self, buffer: memoryview) -> None:
        path, done = self._file.file.path, 0
        while done < len(buffer):
            try:
                count = _read_at(self._file.fd, self._position + done, buffer[done:])
            except OSError as error:
                raise unreadable(path, error) from error
            if count == 0:
                raise _changed(path, "was truncated while it was being read")
            done += count
        self._position += done


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises CheckpointError for anything else (a FIFO would block), and OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(Problem("not-a-file", str(path), "is not a regular file"))
    return open(path, "rb")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The CheckpointError for an OSError at the file that it names, or else at `path`."""
    where = str(error.filename or path)
    return CheckpointError(Problem("unreadable", where, f"cannot be read ({error.strerror})"))


if hasattr(os, "preadv"):

    def _read_at(fd: int, position: int, buffer: memoryview) -> int:
        return os.preadv(fd, [buffer], position)

else:  # Windows: a seek and a read, under a lock since threads share the descriptor
    _seek_lock = Lock()

    def _read_at(fd: int, position: int, buffer: memoryview) -> int:
        with _seek_lock:
            os.lseek(fd, position, os.SEEK_SET)
            data = os.read(fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _changed(path: Path, what: str) -> SourceChangedError:
    return SourceChangedError(Problem("source-changed", str(path), what, "run again when nothing writes to it"))
