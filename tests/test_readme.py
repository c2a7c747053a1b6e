"""The README and docs/ match the code: the reference is the commands' own help, recipes parse, Python runs."""

import os
import re
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import slrmerge
from slrmerge.cli import main
from slrmerge.recipe.model import Recipe

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RECIPES = ROOT / "docs" / "recipes.md"
REFERENCE = ROOT / "docs" / "cli.md"


def blocks(language: str) -> list[str]:
    text = README.read_text() + RECIPES.read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def reference() -> str:
    """Every command's `--help`, as docs/cli.md shows it."""
    names = ["", *main.list_commands(click.Context(main))]
    runs = [
        (name, CliRunner().invoke(main, [*name.split(), "--help"], prog_name="slrmerge", terminal_width=100))
        for name in names
    ]
    return "".join(f"```text\n$ {f'slrmerge {name}'.strip()} --help\n{run.output}```\n\n" for name, run in runs)


def test_the_reference_is_what_help_prints() -> None:
    text = REFERENCE.read_text()
    start, end = text.index("<!-- reference -->\n") + len("<!-- reference -->\n"), text.index("<!-- /reference -->")
    if os.environ.get("UPDATE_GOLDEN"):
        REFERENCE.write_text(text[:start] + "\n" + reference() + text[end:])
        return
    assert text[start:end].strip() == reference().strip()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_every_recipe_shown_is_a_recipe(text: str) -> None:
    assert Recipe(**yaml.safe_load(text)).restore == ((12, 17),)


@pytest.mark.parametrize("text", blocks("python"))
def test_the_python_shown_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "README.md", "exec"), {})
    assert (tmp_path / "hybrid" / "model.safetensors").exists()


def test_every_public_name_but_the_values_is_in_the_readme() -> None:
    functions = [name for name in slrmerge.__all__ if name[0].islower()]
    assert [name for name in functions if f"`{name}`" not in README.read_text()] == []


def test_the_exit_codes_are_those_of_the_errors() -> None:
    from slrmerge import errors

    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.SlrmergeError)
    }
    listed = README.read_text().split("Exit codes: ")[1].split(".")[0]
    assert codes | {0, 2, 130, 141} == {int(number) for number in re.findall(r"(\d+) ", listed)}
