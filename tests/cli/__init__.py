"""The command line, run inside the test's own process, or at a terminal of its own."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
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
    with TemporaryFile() as stdout:
        exit_code, seen = _run_at_a_terminal(command, columns, stdout, ROOT, environment)
        stdout.seek(0)
        return exit_code, stdout.read(), seen


def on_a_terminal(command: Sequence[str], *, columns: int, cwd: Path, **environment: str) -> str:
    """What a terminal of 24 lines shows of a command's stdout and stderr."""
    _, seen = _run_at_a_terminal(command, columns, None, cwd, environment)
    return seen.decode().replace("\r\n", "\n")


def _run_at_a_terminal(
    command: Sequence[str], columns: int, stdout: IO[bytes] | None, cwd: Path, environment: Mapping[str, str]
) -> tuple[int, bytes]:
    """The exit code of a command, and what its terminal saw; without `stdout` that is on the terminal, too."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    size = {"COLUMNS": str(columns), "LINES": "24"}  # pytest's workers have others
    variables = {**os.environ, "TERM": "xterm", **size, **environment}
    done = subprocess.Popen(command, stdout=stdout or theirs, stderr=theirs, env=variables, cwd=cwd)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # how Linux says that the other side has closed
        pass
    finally:
        os.close(ours)
    return done.wait(), seen
