"""Commands and Python in the documentation run as written on the example pair, and print what is shown."""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slrmerge.cli import main
from tests.documentation import DOCS, ROOT, blocks, run_console

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("documentation"), pytest.mark.timeout(600)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the examples, and nothing that an earlier command wrote."""
    shutil.copytree(ROOT / "examples" / "tiny", tmp_path / "examples" / "tiny")
    return tmp_path


def run_python(text: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", text], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_quick_start_prints_what_it_shows(folder: Path) -> None:
    for text in blocks(DOCS / "quickstart.md", "console"):
        run_console(text, folder)
    (text,) = blocks(DOCS / "running.md", "python")
    run_python(text, folder)


@pytest.mark.parametrize("text", blocks(DOCS / "python.md", "python"), ids=lambda text: text.splitlines()[2])
def test_the_python_page_runs(text: str, folder: Path) -> None:
    run_python(text, folder)


def test_the_exit_codes_page_prints_what_it_shows(folder: Path) -> None:
    for text in blocks(DOCS / "exit-codes.md", "console"):
        run_console(text, folder)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    mkdocs = Path(sys.executable).with_name("mkdocs")
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", tmp_path / "site"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pages = {page.parent.name for page in (tmp_path / "site").glob("*/index.html")}
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= pages
    commands = (tmp_path / "site" / "commands" / "index.html").read_text("utf-8")
    assert "UNSET" not in commands
    for command in (main, *main.commands.values()):
        example = re.findall(r"\x08\n *(.+)", command.help or "")[0]
        assert f"<code>{html.escape(example, quote=False)}" in commands


def test_the_picture_shows_what_the_example_pair_answers(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "examples" / "tiny" / "picture.py", "--out", tmp_path], check=True)
    for name in ("restored-light.svg", "restored-dark.svg"):  # texts are paths, each after a comment that has its words
        drawn, kept = (
            re.findall("<!-- (.+?) -->", (folder / name).read_text()) for folder in (tmp_path, DOCS / "images")
        )
        assert drawn == kept
        assert kept.count("4") > 15


def test_the_notebook_runs(folder: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "save the notebook without its outputs"
    resources = {"metadata": {"path": str(folder)}}
    done = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    text = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", []))
    assert "layers 2–8" in text
