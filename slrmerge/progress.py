"""Who wants to know how far a run is."""

from typing import Protocol


class Progress(Protocol):
    """Who wants to know how far a merge is; called from several threads, one at a time."""

    def start(self, what: str, total_bytes: int) -> None: ...
    def advance(self, count: int) -> None: ...
    def say(self, message: str) -> None: ...


class Silent:
    """A Progress that shows nothing."""

    def start(self, what: str, total_bytes: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def say(self, message: str) -> None:
        pass
