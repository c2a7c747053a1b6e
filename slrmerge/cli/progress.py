"""Progress on a terminal: bytes, rate and time left; elsewhere only what is worth a line."""

import sys
from typing import TYPE_CHECKING, Never

import click

if TYPE_CHECKING:
    from tqdm import tqdm


class TerminalProgress:
    """A Progress that draws a bar on stderr where that is a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: tqdm[Never] | None = None

    def start(self, what: str, total_bytes: int) -> None:
        self.close()
        if self._quiet or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        self._bar = tqdm(
            total=total_bytes,
            desc=what,
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def say(self, message: str) -> None:
        if not self._quiet:
            click.echo(message, err=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class SearchBar:
    """A SearchProgress: which layer, and a bar over the states of the whole sweep with the time left."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: tqdm[Never] | None = None

    def start(self, what: str, states: int) -> None:
        self.close()
        self.say(what)
        if self._quiet or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        self._bar = tqdm(total=states, unit=" states", file=sys.stderr, dynamic_ncols=True)

    def stage(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description(what)

    def advance(self, states: int) -> None:
        if self._bar is not None:
            self._bar.update(states)

    def say(self, message: str) -> None:
        if not self._quiet:
            click.echo(message, err=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
