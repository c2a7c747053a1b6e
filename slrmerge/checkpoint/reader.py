"""A checkpoint's bytes, read at positions into the caller's buffer, or streamed from where they are.

Positioned reads, not a mapping: a mapped file that is cut short kills the process, and its pages count as ours.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Lock
from types import TracebackType
from typing import NamedTuple, Self

from slrmerge.checkpoint.folder import Checkpoint
from slrmerge.checkpoint.header import DTYPE_BITS, Identity, Shard
from slrmerge.errors import CheckpointError, Problem, SourceChangedError

_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
"""Bytes as they are on Windows, and no waiting for a FIFO that took a shard's place."""


class Extent(NamedTuple):
    """A stretch of an open source file: `nbytes` bytes from byte `offset`."""

    fd: int
    offset: int
    nbytes: int
    path: Path

    def read_into(self, buffer: memoryview) -> "Extent":
        """Fill `buffer` with the first bytes of the stretch; returns what is left of it.

        Raises SourceChangedError where the file ends before, CheckpointError where it cannot be read.
        """
        try:
            read_exactly(self.fd, self.offset, buffer)
        except EOFError:
            raise _changed(self.path, "was cut short while it was read") from None
        except OSError as error:
            raise CheckpointError(Problem(str(self.path), f"cannot be read ({error.strerror})")) from error
        return self._replace(offset=self.offset + len(buffer), nbytes=self.nbytes - len(buffer))

    def chunks(self, buffer: memoryview) -> Iterator[memoryview]:
        """The bytes of the stretch, read into `buffer` a part at a time; raises as `read_into` does."""
        left = self
        while left.nbytes:
            chunk = buffer[: left.nbytes]
            left = left.read_into(chunk)
            yield chunk


class CheckpointReader:
    """Reads tensors of one checkpoint; safe to share between threads.

    Each file is opened at its first read and held until the reader is closed, so that one replaced by a rename keeps
    its old bytes. `check_unchanged` tells of the others.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._open: dict[str, int] = {}
        self._closed = False
        self._given_up = Event()
        self._lock = Lock()
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self.give_up()
        self._open.clear()
        self._closing.close()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of tensor `name` from byte `offset` of it; may run on into its neighbours.

        Raises SourceChangedError where the file is not what it was when its header was read, HubError where it is on
        the Hub and cannot be had.
        """
        self._in_turn(name, offset, len(buffer))(buffer)

    def read_elements(self, name: str, steps: range, buffer: memoryview) -> Iterator[tuple[str, int]]:
        """Put elements of tensor `name` at the start of `buffer`, those from one of `steps` to the next at a time.

        Yields their dtype, which must be one of whole bytes, and their number. Raises as `read_into` does.
        """
        dtype = self.checkpoint[name].dtype
        width = DTYPE_BITS[dtype] // 8
        read = self._in_turn(name, steps.start * width, (steps.stop - steps.start) * width)
        for begin in steps:
            count = min(steps.step, steps.stop - begin)
            read(buffer[: count * width])
            yield dtype, count

    def stretch(self, name: str, offset: int, count: int) -> Iterator[memoryview | Extent]:
        """Bytes of tensor `name`: where they lie, or chunks of memory, each valid until the next is asked for.

        Raises as `read_into` does.
        """
        file = self.checkpoint.weight_map[name]
        shard = self.checkpoint.shards[file]
        begin = shard.data_start + shard.tensors[name].data_offsets[0] + offset
        if shard.remote is not None:
            yield from shard.remote.stream(begin, begin + count, given_up=self._given_up)
        else:
            fd = self._open.get(file) or self._descriptor(file, shard)
            yield Extent(fd, begin, count, shard.path)

    def give_up(self) -> None:
        """Let nobody wait any longer for what is on the Hub."""
        self._given_up.set()

    def _in_turn(self, name: str, offset: int, count: int) -> Callable[[memoryview], None]:
        """A function that fills a buffer with the next of these bytes of tensor `name`, each time it is called."""
        parts = self.stretch(name, offset, count)
        left: memoryview | Extent = memoryview(b"")

        def read(buffer: memoryview) -> None:
            nonlocal left
            done = 0
            while done < len(buffer):
                left = left or next(parts)
                if isinstance(left, Extent):
                    left = left.read_into(buffer[done:])
                    return
                chunk = left[: len(buffer) - done]
                buffer[done : done + len(chunk)] = chunk
                done, left = done + len(chunk), left[len(chunk) :]

        return read

    def check_unchanged(self) -> None:
        """Raise SourceChangedError where an opened file has changed since its header was read."""
        with self._lock:
            opened = list(self._open.items())
        for file, fd in opened:
            shard = self.checkpoint.shards[file]
            if Identity.of(os.fstat(fd)) != shard.identity:
                raise _changed(shard.path, "was changed while it was read")

    def _descriptor(self, file: str, shard: Shard) -> int:
        with self._lock:
            if self._closed:
                raise ValueError(f"the reader of {self.checkpoint.folder} is closed")
            if file not in self._open:
                try:
                    fd = os.open(shard.path, os.O_RDONLY | _FLAGS)
                except OSError as error:
                    raise _changed(shard.path, f"cannot be opened any more ({error.strerror})") from error
                self._closing.callback(os.close, fd)
                if Identity.of(os.fstat(fd)) != shard.identity:
                    raise _changed(shard.path, "was changed after its header was read")
                self._open[file] = fd
            return self._open[file]


def read_exactly(fd: int, position: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `position` of an open file; raises EOFError where the file ends before."""
    done = 0
    while done < len(buffer):
        count = _read_at(fd, position + done, buffer[done:])
        if count == 0:
            raise EOFError
        done += count


if hasattr(os, "preadv"):

    def _read_at(fd: int, position: int, buffer: memoryview) -> int:
        return os.preadv(fd, [buffer], position)

else:  # Windows: one seek and one read, under a lock since threads share the descriptor
    _seek_lock = Lock()

    def _read_at(fd: int, position: int, buffer: memoryview) -> int:
        with _seek_lock:
            os.lseek(fd, position, os.SEEK_SET)
            data = os.read(fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _changed(path: Path, what: str) -> SourceChangedError:
    return SourceChangedError(Problem(str(path), what, "run again when nothing else writes to it"))
