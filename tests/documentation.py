"""The blocks of the documentation, and what it takes to run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
REPOSITORY = "https://github.com/slrmerge/slrmerge"
INSTALLED = str(Path(sys.executable).parent)  # where the command is that the tests are about

_TIMES = re.compile(r"\d[\d.]* (?:[kMG]?B/s|m?s|min)\b")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of `page` in these languages, in order."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def run_block(text: str, folder: Path, *, path: str = INSTALLED) -> str:
    """Run a block of shell commands in `folder`, with `path` before the usual one, and return what it prints."""
    outside = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    outside["PATH"] = f"{path}:{outside['PATH']}".removeprefix(":")
    done = subprocess.run(["sh", "-ec", text], cwd=folder, env=outside, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_console(text: str, folder: Path, *, path: str = INSTALLED) -> None:
    """Run a console block, `$ command` and output by turns, and compare what is printed; `...` is any lines."""
    for command, shown in re.findall(r"^\$ (.*?)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
        printed = _lines(run_block(command, folder, path=path))
        for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE):
            assert _find(_lines(part), printed) is not None, f"$ {command}\n{part}\nis not in\n" + "\n".join(printed)


def _lines(text: str) -> list[str]:
    """Lines without the spaces at their ends, and with times, which differ from run to run, made equal."""
    return [_TIMES.sub("TIME", line.rstrip()) for line in text.splitlines()]


def _find(part: list[str], lines: list[str]) -> int | None:
    starts = range(len(lines) - len(part) + 1)
    return next((start for start in starts if lines[start : start + len(part)] == part), None)
