"""Progress on a terminal: bytes, rate and time left; elsewhere a line now and then."""

import sys
from time import monotonic
from typing import TYPE_CHECKING, Never, Self

from slrmerge.cli.output import echo, shown
from slrmerge.io.progress import Progress

if TYPE_CHECKING:
    from tqdm import tqdm

_SECONDS_PER_LINE = 60
"""Without a terminal, a stage is printed when nothing was printed for so long."""


class TerminalProgress(Progress):
    """Shows a bar on stderr where that is a terminal. Use it in a `with`."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self._quiet = quiet
        self._bar: tqdm[Never] | None = None
        self._last_line = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def on_start(self, description: str, total: int, unit: str) -> None:
        self._close()
        if self._quiet or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            desc=shown(description),
            unit=unit,
            unit_scale=True,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def on_stage(self, description: str) -> None:
        if self._bar is not None:
            self._bar.set_description(shown(description))
        elif monotonic() - self._last_line > _SECONDS_PER_LINE:
            self.on_message(description)

    def on_advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def on_message(self, text: str) -> None:
        self._last_line = monotonic()
        if not self._quiet:
            echo(text, err=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
