"""The command line, run inside the test's own process, or at a terminal of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import pytest
from click.testing import CliRunner, Result

from slrmerge.cli import main

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> Result:
    """Run `slrmerge ARGUMENTS`: stdout and stderr apart; fails on any exception that would show as a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="slrmerge")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"a traceback: {result.exception!r:.200}") from result.exception
    return result


def codes(result: Result) -> list[str]:
    """The codes of the problems that a command with --json printed, each once, in order."""
    return list(dict.fromkeys(problem["code"] for problem in json.loads(result.stdout)["problems"]))


def refusal(*arguments: object) -> tuple[int, list[str]]:
    """The exit code of a refused command, and the codes of its problems."""
    result = run(*arguments, "--json")
    return result.exit_code, codes(result)


def strict_json(text: str) -> Any:
    """JSON by the standard, which has neither Infinity nor NaN."""

    def refuse(constant: str) -> object:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def at_a_terminal(command: Sequence[str], *, columns: int, **environment: str) -> tuple[int, bytes, bytes]:
    """Run a command whose stderr is a terminal of 24 lines: its exit code, its stdout, what the terminal saw."""
    variables = {**os.environ, **_terminal(columns), **environment}
    with TemporaryFile() as stdout, _terminal_output(columns) as (terminal, seen):
        done = subprocess.Popen(command, stdout=stdout, stderr=terminal, env=variables, cwd=ROOT)
        terminal.close()
        exit_code = done.wait()
        stdout.seek(0)
        return exit_code, stdout.read(), seen.result()


def on_a_terminal(*arguments: object, columns: int) -> str:
    """Run `slrmerge ARGUMENTS` in this process: what a terminal of 24 lines shows of its stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch, _terminal_output(columns) as (terminal, seen):
        for name, value in _terminal(columns).items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        with suppress(SystemExit):
            main([str(argument) for argument in arguments], prog_name="slrmerge")
        terminal.close()
        return seen.result().decode().replace("\r\n", "\n")


def _terminal(columns: int) -> dict[str, str]:
    """The variables that describe a terminal; pytest's workers have others."""
    return {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "24"}


@contextmanager
def _terminal_output(columns: int) -> Iterator[tuple[IO[str], "Future[bytes]"]]:
    """A new terminal to write to, and what it has seen when it is closed."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))

    def read_all() -> bytes:
        seen = b""
        with suppress(OSError):  # how Linux says that the other side has closed
            while chunk := os.read(ours, 4096):
                seen += chunk
        os.close(ours)
        return seen

    with ThreadPoolExecutor(1) as pool, open(theirs, "w", encoding="utf-8") as terminal:
        yield terminal, pool.submit(read_all)
