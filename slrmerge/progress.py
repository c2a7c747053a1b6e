"""Who wants to know how far a run is."""

from collections.abc import Callable
from threading import Lock
from typing import Protocol


class Progress(Protocol):
    """Who wants to know how far a run is; called from several threads, one at a time.

    `start` begins a count of bytes, or of something else that is named; `stage` names the part that is being worked on.
    """

    def start(self, what: str, total: int, unit: str = "B") -> None: ...
    def stage(self, what: str) -> None: ...
    def advance(self, count: int) -> None: ...
    def say(self, message: str) -> None: ...


class Silent:
    """A Progress that shows nothing."""

    def start(self, what: str, total: int, unit: str = "B") -> None:
        pass

    def stage(self, what: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def say(self, message: str) -> None:
        pass


def one_at_a_time(advance: Callable[[int], None]) -> Callable[[int], None]:
    """The same function, safe to call from several threads."""
    lock = Lock()

    def locked(count: int) -> None:
        with lock:
            advance(count)

    return locked
