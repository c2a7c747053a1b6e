"""What a checkpoint asks of a file that is not on this disk. `hub` has the one kind there is."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

    def here(self) -> Path | None:
        """A copy that is on this disk already, unchecked."""
        ...

    def fetch(self, on_bytes: Callable[[int], None] = lambda _: None, *, given_up: Event | None = None) -> Path:
        """The whole file on this disk, found to be what its digest says; fetched again if what is here is not.

        Raises HubError and NoSpaceError.
        """
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


@contextmanager
def waiting_threads(count: int) -> Iterator[tuple[ThreadPoolExecutor, Event]]:
    """A pool for work that mostly waits, and an event that ends the waiting: set when something fails, or by Ctrl-C."""
    given_up = Event()
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool, given_up
        except BaseException:
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
