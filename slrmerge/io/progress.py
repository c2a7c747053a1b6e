"""Progress reporting."""

from threading import Lock


class Progress:
    """Receives the progress of a run and shows nothing; subclasses show it by overriding the `on_` methods.

    Safe to call from several threads: the `on_` methods are called one at a time.
    """

    def __init__(self) -> None:
        self._lock = Lock()

    def status(self, description: str) -> None:
        """Name what is being done where there is nothing to count, such as an import; until the next call."""
        with self._lock:
            self.on_status(description)

    def start(self, description: str, total: int, unit: str = "B") -> None:
        """Begin a new count of `total` bytes, or of another `unit`; "" for one that says nothing to a user."""
        with self._lock:
            self.on_start(description, total, unit)

    def stage(self, description: str) -> None:
        """Name the part of the current count that is being worked on."""
        with self._lock:
            self.on_stage(description)

    def advance(self, count: int) -> None:
        """Add to the current count."""
        with self._lock:
            self.on_advance(count)

    def finish(self) -> None:
        """End the current count, also where a part of it turned out to be needless."""
        with self._lock:
            self.on_finish()

    def message(self, text: str) -> None:
        """Report something that is worth a line of its own."""
        with self._lock:
            self.on_message(text)

    def on_status(self, description: str) -> None:
        """Called by `status`."""

    def on_start(self, description: str, total: int, unit: str) -> None:
        """Called by `start`."""

    def on_stage(self, description: str) -> None:
        """Called by `stage`."""

    def on_advance(self, count: int) -> None:
        """Called by `advance`."""

    def on_finish(self) -> None:
        """Called by `finish`."""

    def on_message(self, text: str) -> None:
        """Called by `message`."""
