"""The README and docs/ match the code: the reference is the commands' own help, recipes parse, Python runs."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

import click
import pytest
import yaml
from click.testing import CliRunner

import slrmerge
from slrmerge import errors
from slrmerge.cli import main
from slrmerge.recipe.model import Recipe
from tests.documentation import DOCS, PAGES, README, REPOSITORY, ROOT, blocks

RECIPES = DOCS / "recipes.md"
REFERENCE = DOCS / "cli.md"
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
WITH_LINKS = [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("examples/*/README.md")]


def reference() -> str:
    """Every command's `--help`, as docs/cli.md shows it."""
    names = ["", *main.list_commands(click.Context(main))]
    runs = [
        (name, CliRunner().invoke(main, [*name.split(), "--help"], prog_name="slrmerge", terminal_width=100))
        for name in names
    ]
    return "".join(f"```text\n$ {f'slrmerge {name}'.strip()} --help\n{run.output}```\n\n" for name, run in runs)


def links(page: Path) -> list[str]:
    """Where a page's links lead, outside its blocks of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [link or source for link, source in LINK.findall(text)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_reference_is_what_help_prints() -> None:
    text = REFERENCE.read_text()
    start, end = text.index("<!-- reference -->\n") + len("<!-- reference -->\n"), text.index("<!-- /reference -->")
    if os.environ.get("UPDATE_GOLDEN"):
        REFERENCE.write_text(text[:start] + "\n" + reference() + text[end:])
        return
    assert text[start:end].strip() == reference().strip()


@pytest.mark.parametrize("text", [*blocks(README, "yaml"), *blocks(RECIPES, "yaml")])
def test_every_recipe_shown_is_a_recipe(text: str) -> None:
    assert Recipe(**yaml.safe_load(text)).restore == ((12, 17),)


@pytest.mark.parametrize("text", blocks(README, "python"))
def test_the_python_shown_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "README.md", "exec"), {})
    assert (tmp_path / "restored" / "model.safetensors").exists()


def test_every_public_name_but_the_values_is_in_the_readme() -> None:
    functions = [name for name in slrmerge.__all__ if name[0].islower()]
    assert [name for name in functions if f"`{name}`" not in README.read_text()] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 180


def test_every_public_name_is_in_the_reference() -> None:
    listed = re.findall(r"^::: slrmerge\.([\w.]+)$", (DOCS / "python.md").read_text(), re.MULTILINE)
    assert set(slrmerge.__all__) <= {name.rpartition(".")[2] for name in listed}
    for name in listed:
        module, _, attribute = name.rpartition(".")
        assert slrmerge._MODULES.get(attribute, module) == module


def test_the_exit_codes_are_those_of_the_errors() -> None:
    rows = re.findall(r"^\| (\d+) \| (?:`(\w+)`)? ?\|", (DOCS / "exit-codes.md").read_text(), re.MULTILINE)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {
        (str(kind.exit_code), kind.__name__)
        for kind in kinds
        if issubclass(kind, errors.SlrmergeError) and kind is not errors.SlrmergeError
    }
    assert set(rows) == codes | {("0", ""), ("1", ""), ("130", ""), ("141", "")}


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com")
    lost = []
    for link in links(page):
        path = re.sub(rf"^(?:{REPOSITORY}/(?:blob|tree)|{raw})/main/", f"{ROOT}/", link)
        if "://" in path:
            continue
        name, _, anchor = unquote(path).partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor not in {"", "only-light", "only-dark"} and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_links_of_the_readme_work_on_a_package_index() -> None:
    assert [link for link in links(README) if not link.startswith("https://")] == []


@pytest.mark.parametrize(
    "name", [".github/workflows/test.yml", ".github/ISSUE_TEMPLATE/bug.yml", ".pre-commit-config.yaml"]
)
def test_files_of_other_tools_parse(name: str) -> None:
    assert yaml.safe_load((ROOT / name).read_text())


def test_the_version_is_the_same_everywhere() -> None:
    version = slrmerge.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    (date,) = re.findall(rf"^## {re.escape(version)} \((\d{{4}}-\d\d-\d\d)\)$", changes, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"])) == (version, date)
