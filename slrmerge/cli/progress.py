"""Progress on a terminal: bytes, rate and time left; elsewhere only what is worth a line."""

import sys
from time import monotonic
from typing import TYPE_CHECKING, Never, Self

import click

if TYPE_CHECKING:
    from tqdm import tqdm

_SECONDS_PER_LINE = 60
"""Off a terminal, a stage is worth a line when nothing was said for so long."""


class TerminalProgress:
    """A Progress that draws a bar on stderr where that is a terminal. Use it in a `with`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: tqdm[Never] | None = None
        self._last_line = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def start(self, what: str, total: int, unit: str = "B") -> None:
        self._close()
        if self._quiet or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            desc=what,
            unit=unit,
            unit_scale=True,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def stage(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description(what)
        elif monotonic() - self._last_line > _SECONDS_PER_LINE:
            self.say(what)

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def say(self, message: str) -> None:
        self._last_line = monotonic()
        if not self._quiet:
            click.echo(message, err=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
