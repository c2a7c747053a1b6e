"""What terminals of any width show: numbers and names are never cut, and tables change their form where they must.

After an intended change: `UPDATE_GOLDEN=1 pytest tests/cli/test_tables.py`, then read the diff.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.cli import on_a_terminal, run
from tests.cli.test_golden import GOLDEN, compare_text
from tests.conftest import Pair

SLRMERGE = str(Path(sys.executable).with_name("slrmerge"))

QUESTIONS = {"Name a colour.": ["red", "blue"], "Name a river.": ["Nile"]}
ANSWERS = {
    "the-post-trained-model": ["red", "red", "red", "a red"],
    "layers-2-to-8-restored": ["red", "Blue!", "green", ""],
}

COMMANDS = {
    "plan": ["plan", "recipe.yaml"],
    "merge": ["recipe.yaml", "hybrid"],
    "diff": ["diff", "pre", "post"],
    "inspect": ["inspect", "post", "--tensors"],
    "eval": [
        "eval", "open-qa", "--data", "questions.json", "--samples", "4", "--out", "eval",
        *(word for name in ANSWERS for word in ("--model", f"{name}={name}.jsonl")),
    ],
}  # fmt: skip
AFTER_A_SEARCH = {"select": ["select", "search", "--min-quality", "0.95"]}


@pytest.fixture
def here(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pair's folder as the current one, with a recipe, questions and answers."""
    pair.recipe_file(restore=[2, 3])
    (pair.folder / "questions.json").write_text(json.dumps(QUESTIONS))
    for name, texts in ANSWERS.items():
        lines = (json.dumps({"prompt": question, "generations": texts}) + "\n" for question in QUESTIONS)
        (pair.folder / f"{name}.jsonl").write_text("".join(lines))
    monkeypatch.chdir(pair.folder)
    return pair.folder


def screen(arguments: list[str], columns: int, folder: Path) -> str:
    """What is left on a terminal after a command, without colours: progress has gone."""
    seen = on_a_terminal([SLRMERGE, *arguments], columns=columns, cwd=folder)
    lines = (line.rpartition("\r")[2] for line in re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", seen).split("\n"))
    return "\n".join(line for line in lines if not re.match(r".*: +\d+%\|", line))


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("name", [*COMMANDS, *AFTER_A_SEARCH])
def test_a_terminal_shows_what_the_golden_file_has(here: Path, tiny_search: Path, name: str, columns: int) -> None:
    arguments = COMMANDS.get(name) or AFTER_A_SEARCH[name]
    if name in AFTER_A_SEARCH:
        shutil.copytree(tiny_search, here, dirs_exist_ok=True)
    shown = screen(arguments, columns, here)
    compare_text(f"terminal/{name}-{columns}", f"$ slrmerge {' '.join(arguments)}\n{shown}", here)


def test_there_is_no_golden_file_without_a_test() -> None:
    names = {f"{name}-{columns}" for name in (*COMMANDS, *AFTER_A_SEARCH) for columns in (80, 140)}
    assert {path.stem for path in (GOLDEN / "terminal").iterdir()} == names


def words(text: str) -> set[str]:
    """What a text says, whatever its form, without what differs from run to run."""
    return {word for word in text.split() if not re.fullmatch(r"\(?[\d.]+(?: \w+/s\))?", word)}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_narrow_terminal_shows_all_that_a_pipe_gets(here: Path, name: str) -> None:
    piped = run(*COMMANDS[name]).stdout
    for folder in ("hybrid", "eval"):
        shutil.rmtree(here / folder, ignore_errors=True)
    shown = screen(COMMANDS[name], 40, here)
    assert "…" not in shown
    assert words(piped) <= words(shown)


def test_colour_marks_errors_and_can_be_switched_off(tmp_path: Path) -> None:
    command = [SLRMERGE, "plan", "missing.yaml"]
    assert "\x1b[1;31merror:\x1b[0m" in on_a_terminal(command, columns=80, cwd=tmp_path)
    assert "\x1b" not in on_a_terminal(command, columns=80, cwd=tmp_path, NO_COLOR="1")
    assert "\x1b" not in run(*command[1:]).stderr
