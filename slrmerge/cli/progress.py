"""Progress on a terminal: the current step, bytes, rate and time left; elsewhere a line now and then."""

import sys
from contextlib import suppress
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Never, Self

from slrmerge.cli.output import echo, shown
from slrmerge.io.progress import Progress
from slrmerge.io.sizes import format_duration

if TYPE_CHECKING:
    from tqdm import tqdm

_SECONDS_PER_LINE = 60
"""Without a terminal, the current step is printed after so long without output."""


_WITHOUT_RATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
_WITH_RATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
"""tqdm's own format inverts rates below one per second."""


class TerminalProgress(Progress):
    """Shows a bar on stderr where that is a terminal. Use it in a `with`, in which it calls `tick` every second."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self._quiet = quiet
        self._bar: tqdm[Never] | None = None
        self._is_status = False
        self._name = self._doing = ""
        self._since = self._last_line = monotonic()
        self._done = Event()

    def __enter__(self) -> Self:
        if not self._quiet:
            with suppress(RuntimeError):  # no more threads: then it does not tick
                Thread(target=self._tick_until_done, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        with self._lock:
            self._close()

    def tick(self) -> None:
        """Show how long the current step has taken, where nothing else shows progress."""
        with self._lock:
            if self._done.is_set() or not self._doing:
                return
            if self._bar is not None:
                self._bar.refresh()
            elif monotonic() - self._last_line > _SECONDS_PER_LINE:
                self.on_message(f"{self._doing} ({format_duration(monotonic() - self._since)})")

    def _tick_until_done(self) -> None:
        while not self._done.wait(1):
            self.tick()

    def on_status(self, description: str) -> None:
        self._close()
        self._name = ""
        self._begin(description)
        if not self._has_terminal:
            return
        from tqdm import tqdm

        text, self._is_status = shown(f"{description} ..."), True
        self._bar = tqdm(
            total=0, desc=text, bar_format="{desc} [{elapsed}]", file=sys.stderr, dynamic_ncols=True, leave=False
        )

    def on_start(self, description: str, total: int, unit: str) -> None:
        self._close()
        self._name = description
        self._begin(description)
        if not self._has_terminal:
            return
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            desc=shown(description),
            bar_format=_WITH_RATE if unit else _WITHOUT_RATE,
            unit=unit,
            unit_scale=unit == "B",
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def on_stage(self, description: str) -> None:
        if self._is_status:
            self.on_status(description)
            return
        self._begin(f"{self._name}, {description}" if self._name else description)
        if self._bar is not None:
            self._bar.set_description(shown(self._doing))

    def on_advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def on_finish(self) -> None:
        if self._bar is not None:
            self._bar.set_description(shown(self._name), refresh=False)
            self._bar.update((self._bar.total or 0) - self._bar.n)

    def on_message(self, text: str) -> None:
        self._last_line = monotonic()
        if self._quiet:
            return
        if self._is_status:
            self._close()
        if self._bar is not None:
            self._bar.clear()
        echo(text, err=True)
        if self._bar is not None:
            self._bar.refresh()

    def _begin(self, doing: str) -> None:
        self._doing, self._since = doing, monotonic()

    @property
    def _has_terminal(self) -> bool:
        return not self._quiet and sys.stderr.isatty()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar, self._is_status = None, False
