"""The files that a checkpoint is made of: values that can be compared, pickled and opened, wherever the files are.

Local files are read at positions, not mapped: a mapped file that is truncated kills the process, and its pages count as
this process's memory.
"""

import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO, NamedTuple, Protocol

from slrmerge.errors import CheckpointError, Problem, SlrmergeError, SourceChangedError
from slrmerge.io.files import NO_FOLLOW, NO_WAIT, clone_range, open_files_remedy

_FLAGS = os.O_RDONLY | NO_WAIT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
"""No newline translation on Windows, and no waiting."""

_MAX_REFERENCE = 1000
_SHARED_BLOB = re.compile("([0-9a-f]{2})/\\1[0-9a-f]{62}")


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

    def clone_to(self, target: int, start: int, stop: int) -> bool:
        """Make an open file share the bytes from `start` to `stop`; see `io.files.clone_range`."""
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
    """What a local file was when it was listed; any difference later means that it was changed or replaced.

    `ctime_ns` tells where the mtime was put back.
    """

    inode: int
    file_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileStatus":
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A SourceFile on this disk."""

    path: Path
    status: FileStatus

    @classmethod
    def at(cls, path: Path) -> "LocalFile":
        return cls(path, FileStatus.of(path.stat()))

    @classmethod
    def within(cls, folder: Path, name: str) -> "LocalFile":
        """A checkpoint's own file; see `open_within`. What is read later is the file that was checked here."""
        with open_within(folder, name) as file:
            return cls(folder / name, FileStatus.of(os.fstat(file.fileno())))

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
            fd = os.open(self.path, _FLAGS)
        except OSError as error:
            if remedy := open_files_remedy(error):
                what = f"cannot be opened ({error.strerror})"
                raise CheckpointError(Problem("too-many-files-open", str(self.path), what, remedy)) from error
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
    """An OpenFile on this disk, closed at the latest when nothing refers to it.

    One that is replaced by a rename keeps its old bytes here.
    """

    def __init__(self, file: LocalFile, fd: int) -> None:
        self.file, self.fd = file, fd

    def stream(self, start: int, stop: int) -> "_LocalStream":  # noqa: ARG002 (the caller reads no further)
        return _LocalStream(self, start)

    def clone_to(self, target: int, start: int, stop: int) -> bool:
        return clone_range(self.fd, target, start, stop)

    def check_unchanged(self) -> None:
        try:
            now = os.fstat(self.fd)
        except OSError as error:
            raise unreadable(self.file.path, error) from error
        status = FileStatus.of(now)
        if now.st_nlink == 0:  # replaced or deleted, which changes the ctime and nothing else
            status = status._replace(ctime_ns=self.file.status.ctime_ns)
        if status != self.file.status:
            raise _changed(self.file.path, "changed while it was being read")

    def close(self) -> None:
        fd, self.fd = self.fd, -1  # later reads fail, and do not read another file that got the same number
        if fd >= 0:
            os.close(fd)

    __del__ = close


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
    _require_regular(path, path.stat())
    return _opened(os.open(path, _FLAGS), path)


def open_within(folder: Path, name: str) -> BinaryIO:
    """Open a regular file of the checkpoint in `folder` for reading.

    Links are followed within the folder, and within its repository where it is in the Hub's cache. Raises
    CheckpointError for all others, which could publish any file of this disk, and for what is not a file; OSError.
    """
    path = folder / name
    try:
        real = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        if not path.is_symlink():
            raise
        raise CheckpointError(Problem("broken-link", str(path), "is a broken link", "complete the download")) from None
    root = _root_of(Path(os.path.realpath(folder)), real)
    # Hidden files belong to other tools: .git/config may contain a token.
    if root is None or any(part.startswith(".") for part in real.relative_to(root).parts):
        what = f"is a link to {real}, not to a file of the checkpoint"
        remedy = "replace the link by the file if it belongs here"
        raise CheckpointError(Problem("link-outside", str(path), what, remedy))
    _require_regular(path, real.lstat())
    try:
        fd = _open_beneath(root, real.relative_to(root))
    except OSError as error:
        error.filename = str(path)  # not relative to an open folder
        raise
    return _opened(fd, path)


def _root_of(folder: Path, real: Path) -> Path | None:
    """The folder that a checkpoint's file must be in, all links resolved; None where it is not the checkpoint's."""
    if real.is_relative_to(folder):
        return folder
    repository = folder.parent.parent
    if folder.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return None
    if any(real.is_relative_to(repository / inner) for inner in ("blobs", "snapshots")):
        return repository
    # The Hub's client moves blobs that repositories share to `blobs` in the cache, and lists there who refers to them.
    shared = repository.parent / "blobs"
    if real.is_relative_to(shared) and _SHARED_BLOB.fullmatch(real.relative_to(shared).as_posix()):
        with suppress(OSError, ValueError, CheckpointError), open_regular(real.with_name(f"{real.name}.refs")) as file:
            references = [repository.parent / line.strip().decode() for line in file if len(line) < _MAX_REFERENCE]
            blobs = (blob for blob in references if blob.parent == repository / "blobs")
            if any(os.path.realpath(blob) == str(real) for blob in blobs):
                return shared
    return None


def _open_beneath(root: Path, path: Path) -> int:
    """Open a file below `root` through no link at all: what was resolved may have been replaced meanwhile."""
    if os.open not in os.supports_dir_fd:  # Windows
        return os.open(root / path, _FLAGS)
    fd = os.open(root, _FLAGS | os.O_DIRECTORY)
    for part in path.parts:
        parent = fd
        try:
            fd = os.open(part, _FLAGS | NO_FOLLOW, dir_fd=parent)
        finally:
            os.close(parent)
    return fd


def _opened(fd: int, path: Path) -> BinaryIO:
    """A file object for a descriptor, which must be of a regular file."""
    try:
        _require_regular(path, os.fstat(fd))
    except CheckpointError:
        os.close(fd)
        raise
    return os.fdopen(fd, "rb")


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        remedy = "replace it by the file, or move it away"
        raise CheckpointError(Problem("not-a-file", str(path), "is not a regular file", remedy))


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The CheckpointError for an OSError at the file that it names, or else at `path`."""
    where = str(error.filename or path)
    return CheckpointError(Problem("unreadable", where, f"cannot be read ({error.strerror})", open_files_remedy(error)))


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
