"""The command line, run inside the test's own process, or at a terminal of its own."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

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


def at_a_terminal(command: Sequence[str], *, columns: int, **environment: str) -> tuple[int, bytes, bytes]:
    """Run a command whose stderr is a terminal of 24 lines: its exit code, its stdout, what the terminal saw."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    environment = os.environ | {"TERM": "xterm", **environment}
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, cwd=ROOT)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # how Linux says that the other side has closed
        pass
    finally:
        os.close(ours)
    printed, _ = done.communicate()
    return done.returncode, printed, seen
