"""What terminals of any width show: numbers and names are never cut, and tables change their form where they must.

After an intended change: `UPDATE_GOLDEN=1 pytest tests/cli/test_tables.py`, then read the diff.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from slrmerge.cli import main
from slrmerge.cli.output import Table, wrap
from slrmerge.searching.results_folder import read_result
from slrmerge.searching.run import Search
from tests.checkpoint.hub.conftest import hub as hub
from tests.checkpoint.hub.server import HubServer, use
from tests.checkpoints import Tensor, write_checkpoint
from tests.cli import on_a_terminal, run
from tests.cli.test_golden import GOLDEN, compare_text, masked
from tests.conftest import Pair
from tests.searching.pairs import no_pictures

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
    "init": ["init", "pre", "post", "--out", "new.yaml"],
    "export": ["export", "recipe.yaml"],
    "env": ["env"],
    "eval": [
        "eval", "open-qa", "--data", "questions.json", "--samples", "4", "--out", "eval",
        *(word for name in ANSWERS for word in ("--model", f"{name}={name}.jsonl")),
    ],
}  # fmt: skip
AFTER_A_MERGE = {"verify": ["verify", "merged"]}
AFTER_A_SEARCH = {
    "search": ["search", "pair.yaml", "--out", "search"],
    "search-estimate": ["search", "pair.yaml", "--dry-run", "--threads", "1"],
    "select": ["select", "search", "--min-quality", "0.95"],
}
ON_THE_HUB = {"push": ["push", "merged", "ann/hybrid"]}
ALL = COMMANDS | AFTER_A_MERGE | AFTER_A_SEARCH | ON_THE_HUB


@pytest.fixture
def here(pair: Pair, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a pair with what the command named by the parameter `name` needs."""
    monkeypatch.chdir(pair.folder)
    recipe = pair.recipe_file(restore=[2, 3])
    name = request.getfixturevalue("name")
    if name in AFTER_A_SEARCH:
        searched = shutil.copytree(request.getfixturevalue("tiny_search"), pair.folder / "searched")
        monkeypatch.chdir(searched)
        monkeypatch.setattr("slrmerge.searching.estimate.measured_rate", lambda width, dtype, device: 1e11)
        monkeypatch.setattr("slrmerge.searching.scorer.LocalScorer.state_s", lambda self, request: 0.0)
        monkeypatch.setattr("slrmerge.searching.estimate.peak_memory_bytes", lambda: 400_000_000)
        monkeypatch.setattr("slrmerge.searching.options.memory_bytes", lambda: 64 << 30)
        monkeypatch.setattr("slrmerge.searching.plots.draw_result", no_pictures)
        monkeypatch.setattr(Search, "run", lambda self, out, **_: read_result(out))  # it takes half a minute
        return searched
    if name in AFTER_A_MERGE | ON_THE_HUB:
        assert run(recipe, "merged", "--quiet").exit_code == 0
    if name in ON_THE_HUB:
        server: HubServer = request.getfixturevalue("hub")
        server.tokens["hf_ann"] = "ann"
        use(monkeypatch, server, pair.folder / "cache", "hf_ann")
    (pair.folder / "questions.json").write_text(json.dumps(QUESTIONS))
    for label, texts in ANSWERS.items():
        lines = (json.dumps({"prompt": question, "generations": texts}) + "\n" for question in QUESTIONS)
        (pair.folder / f"{label}.jsonl").write_text("".join(lines))
    return pair.folder


def screen(arguments: list[str], columns: int) -> str:
    """What is left on a terminal after a command, without colours: progress has gone."""
    seen = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", on_a_terminal(*arguments, columns=columns))
    lines = (line.rpartition("\r")[2] for line in seen.split("\n"))
    return "\n".join(line for line in lines if not re.match(r".*: +\d+%\|", line))


def stable(name: str, text: str) -> str:
    """A screen without what differs from machine to machine."""
    if name == "env":
        return re.sub(r"(?m)^(\S+ +).+$", r"\1VALUE", text)
    return re.sub(r"http://127\.0\.0\.1:\d+", "HUB", text)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("name", ALL)
def test_a_terminal_shows_what_the_golden_file_has(here: Path, name: str, columns: int) -> None:
    shown = stable(name, screen(ALL[name], columns))
    compare_text(f"terminal/{name}-{columns}", f"$ slrmerge {' '.join(ALL[name])}\n{shown}", here)


@pytest.mark.parametrize("columns", [80, 140])
def test_the_help_of_every_command_is_that_of_the_golden_file(tmp_path: Path, columns: int) -> None:
    calls = [["help"], *(["help", name] for name in sorted(main.commands))]
    text = "\n".join(f"$ slrmerge {' '.join(call)}\n{screen(call, columns)}" for call in calls)
    compare_text(f"terminal/help-{columns}", text, tmp_path)
    assert max(map(len, text.splitlines())) <= columns


def test_every_command_has_a_golden_file_and_every_file_a_test() -> None:
    commands = main.commands.keys() - {"completion", "schema"}  # which print a file
    assert commands <= ALL.keys() | {"help"}
    names = {f"{name}-{columns}" for name in (*ALL, "help") for columns in (80, 140)}
    assert {path.stem for path in (GOLDEN / "terminal").iterdir()} == names


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("name", ALL)
def test_a_narrow_terminal_shows_all_that_a_wide_one_shows_and_cuts_no_number(here: Path, name: str) -> None:
    shown = masked(stable(name, screen(ALL[name], 40)), here)
    wide = (GOLDEN / "terminal" / f"{name}-140.txt").read_text().partition("\n")[2]
    assert "…" not in shown
    assert set(wide.split()) <= set(shown.split())
    tables = set(shown.splitlines()) - set(wide.splitlines())  # sentences are the same at any width
    assert [line for line in tables if re.search(r"\d[.,]?$", line[:40]) and re.match(r"[.,]?\d", line[40:])] == []


@pytest.mark.parametrize(("text", "width", "lines"), [
    ("relative change", 8, ["relative", "change"]),
    ("layers 2–8 (selected)", 12, ["layers 2–8", "(selected)"]),
    ("soup 0.80 (best soup)", 16, ["soup 0.80", "(best soup)"]),
    ("soup 0.80 (best soup, recipe)", 12, ["soup 0.80", "(best soup,", "recipe)"]),
    ("model.layers.*.mlp.weight", 16, ["model.layers.*.", "mlp.weight"]),
    ("0.123 [0.1, 0.2]", 3, ["0.123", "[0.1,", "0.2]"]),
    ("two lines\nkept", 20, ["two lines", "kept"]),
    ("", 3, [""]),
])  # fmt: skip
def test_text_is_wrapped_between_words_and_parts_of_names(text: str, width: int, lines: list[str]) -> None:
    assert wrap(text, width).split("\n") == lines


def test_colour_marks_errors_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["plan", "missing.yaml"]
    assert "\x1b[1;31merror:\x1b[0m" in on_a_terminal(*command, columns=80)
    assert "\x1b" not in run(*command).stderr
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in on_a_terminal(*command, columns=80)


def test_lines_of_a_table_end_with_their_last_word(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("", "name", ">Q")
    table.add_row("post", "a longer name", "")
    table.add_row("slr", "", "0.9")
    table.print()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == lines


def test_a_second_column_of_text_is_wrapped_where_the_first_is_not_enough(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrmerge.cli.output.get_terminal_size", lambda: os.terminal_size((60, 24)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    table = Table("part", "from", ">size")
    table.add_row(
        "layer 0: input_layernorm, post_attention_layernorm", "slerp, 0.25 of the way from post to pre", "256 B"
    )
    table.print()
    assert capsys.readouterr().out.splitlines() == [
        "part                      from                          size",
        "layer 0:                  slerp, 0.25 of the way from  256 B",
        "input_layernorm,          post to pre",
        "post_attention_layernorm",
        "",
    ]


def test_inspect_shows_a_limited_number_of_rows_and_says_how_many_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrmerge.cli.show._MAX_ROWS", 3)
    tensors = {f"odd{number}": Tensor("F16", (1,), bytes(2)) for number in range(5)}
    folder = write_checkpoint(tmp_path / "model", tensors, {"architectures": ["x" * 5000]})
    lines = [line for line in run("inspect", folder).stdout.splitlines() if line]
    assert [line.split()[0] for line in lines[-4:]] == ["odd0", "odd1", "odd2", "…"]
    assert "2 more rows" in lines[-1]
    assert max(map(len, lines)) < 4000
    every = run("inspect", folder, "--tensors").stdout
    assert all(name in every for name in tensors)
    assert "more rows" not in every
