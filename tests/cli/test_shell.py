"""The commands about the command line: help, env, completion, and the short forms of options."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from slrmerge.cli import main
from slrmerge.recipe.load import load_recipe
from tests.cli import run
from tests.conftest import Pair

COMMANDS = sorted(main.commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_the_option_shows(command: str) -> None:
    assert run("help", command).stdout.split() == run(command, "--help").stdout.split()


def test_help_alone_shows_every_command_with_its_whole_summary() -> None:
    text = " ".join(run("help").stdout.split())
    for command in COMMANDS:
        assert main.commands[command].get_short_help_str(limit=1000) in text


def test_the_command_alone_shows_its_help() -> None:
    alone = run()
    assert (alone.exit_code, alone.stdout) == (2, "")
    assert alone.stderr == run("--help").stdout


def test_help_of_an_unknown_command_is_a_usage_error() -> None:
    assert run("help", "plna").exit_code == 2


def test_env_reports_versions_and_names_variables_without_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = run("env", "--json").stdout
    found = json.loads(text)
    assert found["torch"]
    assert "HF_TOKEN" in found["variables"]
    assert "hf_secret" not in text + run("env").stdout


@pytest.mark.parametrize(("shell", "place"), [
    ("bash", ".local/share/bash-completion/completions/slrmerge"),
    ("zsh", ".local/share/zsh/site-functions/_slrmerge"),
    ("fish", ".config/fish/completions/slrmerge.fish"),
])  # fmt: skip
def test_completion_is_installed_where_the_shell_looks(
    shell: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    printed = run("completion")
    assert run("completion", "--install").exit_code == 0
    assert (tmp_path / place).read_text() == printed.stdout
    assert "_SLRMERGE_COMPLETE" in printed.stdout


def test_a_shell_without_completions_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/csh")
    assert run("completion").exit_code == 2


@pytest.mark.parametrize(("words", "offered"), [
    (["rec"], "file"),  # of the default command
    (["inspect", "che"], "file"),
    (["search", "pre", "po"], "file"),
    (["search", "--task", "my"], "file"),
    (["search", "--task", "mon"], "months"),
    (["eval", "open-qa", "--model", "pos"], "file"),
    (["eval", "open-qa", "--extract", "str"], "strict-match"),
    (["help", "sea"], "search"),
])  # fmt: skip
def test_names_and_files_are_completed(words: list[str], offered: str) -> None:
    (item,) = ShellComplete(main, {}, "slrmerge", "_SLRMERGE_COMPLETE").get_completions(words[:-1], words[-1])
    assert offered in (item.type, item.value)


def test_bash_completes_commands() -> None:
    script = run("completion", "bash").stdout
    words = "COMP_WORDS=(slrmerge ve); COMP_CWORD=1; _slrmerge_completion slrmerge; echo ${COMPREPLY[@]}"
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", f"{script}\n{words}"], capture_output=True, text=True, env=variables)
    assert done.stdout.split() == ["verify"]


def test_output_folder_and_dtype_may_be_written_short(pair: Pair) -> None:
    recipe = pair.recipe_file(restore=[2, 3])
    assert run(recipe, pair.folder / "as-mergekit", "-q").exit_code == 0
    assert run(recipe, "-o", pair.folder / "short", "-q", "--dtype", "fp32").exit_code == 0
    assert (pair.folder / "as-mergekit" / "slrmerge.json").exists()
    assert load_recipe(pair.folder / "short" / "slrmerge.yaml").dtype == "float32"


def test_two_output_folders_are_a_usage_error(pair: Pair) -> None:
    recipe = pair.recipe_file(restore=[2, 3])
    assert run(recipe, pair.folder / "one", "--out", pair.folder / "two").exit_code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_no_two_options_of_a_command_share_a_name(command: str) -> None:
    names = [name for each in main.commands[command].params if isinstance(each, click.Option) for name in each.opts]
    assert len(names) == len(set(names))
    assert run(command, "-h").exit_code == 0
