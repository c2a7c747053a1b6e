"""Tests of `slrmerge.checkpoint`, module by module."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slrmerge.checkpoint.base import TensorReader


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make the file or folder at `path` inaccessible, also to root, who becomes another user meanwhile."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


def read(reader: TensorReader, name: str, start: int = 0, length: int | None = None) -> bytes:
    """The bytes of a tensor from `start` on: `length` of them, or to its end."""
    buffer = bytearray(reader.checkpoint[name].nbytes - start if length is None else length)
    reader.read_into(name, start, memoryview(buffer))
    return bytes(buffer)
