"""What a checkpoint asks of a file that is not on this disk. `hub` has the one kind there is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol

from slrmerge.repository import Repository


class RemoteFile(Protocol):
    """A file elsewhere, read in stretches or fetched whole. As a string it is how messages name it.

    `digest` is what the place that has it says of its content: `sha256:…`, or `git-sha1:…` as git names blobs.
    """

    @property
    def file_bytes(self) -> int: ...
    @property
    def digest(self) -> str: ...

    def stream(self, start: int, stop: int, *, given_up: Event | None = None) -> Iterator[memoryview]:
        """Exactly the bytes from `start` to `stop`, in order; a chunk is valid until the next is asked for.

        Tries again where something went wrong, unless `given_up` is set. Raises HubError.
        """
        ...

    def fetch(self, on_bytes: Callable[[int], None] = lambda _: None) -> Path:
        """The whole file on this disk, found to be what its digest says. Raises HubError and NoSpaceError."""
        ...

    def check(self, path: Path) -> None:
        """Raise HubError unless the copy at `path` is what the digest says."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """A repository as it is at one commit. `files` are all it holds there, whether or not they are on this disk too."""

    repository: Repository
    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def pinned(self) -> Repository:
        """The repository at this very commit."""
        return Repository(self.repository.name, self.commit)

    def __str__(self) -> str:
        return f"{self.repository.name}@{self.commit[:7]}"
