"""Tables on terminals of any width: numbers and names are never cut."""

import re
import sys
from pathlib import Path

import pytest

from tests.cli import on_a_terminal, run
from tests.conftest import Pair

SLRMERGE = str(Path(sys.executable).with_name("slrmerge"))

COMMANDS = [["plan", "recipe.yaml"], ["diff", "pre", "post"], ["inspect", "post", "--tensors"]]


def words(text: str) -> set[str]:
    """What a text says, whatever its form."""
    return set(re.sub(r"\x1b\[[\d;]*m", "", text).split())


@pytest.mark.parametrize("columns", [40, 80, 140])
@pytest.mark.parametrize(
    "command", [["plan", "recipe.yaml"], ["diff", "pre", "post"], ["inspect", "post", "--tensors"]]
)
def test_a_narrow_terminal_shows_all_that_a_pipe_gets(
    command: list[str], columns: int, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.recipe_file(restore=[2, 3])
    monkeypatch.chdir(pair.folder)
    piped = run(*command).stdout
    shown = on_a_terminal([SLRMERGE, *command], columns=columns, cwd=pair.folder)
    assert "…" not in shown
    assert words(piped) <= words(shown)


def test_colour_marks_errors_and_can_be_switched_off(tmp_path: Path) -> None:
    command = [SLRMERGE, "plan", "missing.yaml"]
    assert "\x1b[1;31merror:\x1b[0m" in on_a_terminal(command, columns=80, cwd=tmp_path)
    assert "\x1b" not in on_a_terminal(command, columns=80, cwd=tmp_path, NO_COLOR="1")
    assert "\x1b" not in run(*command[1:]).stderr
