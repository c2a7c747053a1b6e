"""What the command line prints for people, word for word.

After an intended change: `UPDATE_GOLDEN=1 pytest tests/cli/test_golden.py`, then read the diff.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli import run
from tests.conftest import Pair
from tests.merging.faults import harm, write_files
from tests.searching.pairs import no_pictures

GOLDEN = Path(__file__).parents[1] / "golden"

RECIPES: dict[str, dict[str, Any]] = {
    "restore.yaml": {"restore": [2, 3]},
    "fine.yaml": {
        "restore": [[0, 0], [4, 5]],
        "layers": [{"range": [1, 3], "modules": ["self_attn"], "alpha": 0.5}],
        "tensors": [{"match": "lm_head.*", "alpha": 0.25}],
        "dtype": "float32",
        "max_shard_size": "4KB",
    },
    "wrong.yaml": {"restor": [2, 3], "alpha": 1.5, "layers": [{"range": [3, 2], "alpha": [0]}]},
    "unfit.yaml": {"restore": [4, 9], "tensors": [{"match": "lm_haed.*", "alpha": 1}]},
    "nowhere.yaml": {"pretrained": "./nowhere", "restore": [2, 3]},
    "pair.yaml": {},
}

OUTPUTS = {
    "help": ["--help"],
    "search-space": ["search", "restore.yaml", "--space", "heads"],
    "search-unfit": ["search", "restore.yaml", "--out", "search"],
    "select-nothing": ["select", "post"],
    "plan": ["plan", "restore.yaml", "--out", "hybrid"],
    "plan-fine": ["plan", "fine.yaml"],
    "diff": ["diff", "pre", "post"],
    "diff-nothing": ["diff", "pre", "pre", "pre"],
    "diff-folder": ["diff", "pre"],
    "inspect": ["inspect", "post"],
    "inspect-tensors": ["inspect", "pre", "--tensors"],
    "merge": ["restore.yaml", "--out", "hybrid"],
    "merge-fine": ["fine.yaml", "--out", "hybrid"],
    "wrong": ["wrong.yaml", "--out", "hybrid"],
    "unfit": ["unfit.yaml", "--out", "hybrid"],
    "usage": ["plna", "x"],
    "usage-help": ["help", "serch"],
    "usage-out": ["restore.yaml"],
    "missing-recipe": ["recipes/missing.yaml", "--out", "hybrid"],
    "missing-folder": ["nowhere.yaml", "--out", "hybrid"],
    "missing-model": ["inspect", "nowhere"],
    "nothing-to-merge": ["pair.yaml", "--out", "hybrid"],
    "output-in-source": ["restore.yaml", "--out", "post/hybrid"],
    "verify-missing": ["verify", "nowhere"],
    "verify-no-merge": ["verify", "post"],
    "push-name": ["push", "post", "hybrid"],
    "search-device": ["search", "pair.yaml", "--out", "search", "--device", "abacus"],
    "eval-missing": ["eval", "open-qa", "--data", "qa.json", "--model", "a=./nowhere", "--out", "eval"],
    "eval-options": ["eval", "open-qa", "--data", "qa.json", "--model", "post", "--out", "eval", "--verbalized", "3"],
}

AFTER_A_SEARCH = {
    "select": ["select", "search", "--min-quality", "0.95"],
    "select-soft": ["select", "search", "--min-quality", "0.6"],
    "search-estimate": ["search", "pair.yaml", "--dry-run", "--threads", "1"],
    "search-not-empty": ["search", "pair.yaml", "--out", "search"],
    "search-wrong": ["search", "pair.yaml", "--out", "post/search", "--overwrite"],
    "diff-tiny": ["diff", "pair.yaml"],
}

AFTER_A_MERGE = {
    "verify": ["verify", "hybrid"],
    "verify-altered": ["verify", "altered"],
    "overwrite": ["fine.yaml", "--out", "hybrid", "--overwrite"],
    "not-empty": ["restore.yaml", "--out", "hybrid"],
}


@pytest.fixture
def here(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pair's folder with the recipes in it, as the current folder, so that no path depends on where that is."""
    for name, content in RECIPES.items():
        pair.recipe_file(name, **content)
    write_files(pair.folder / "post", {"code.py": b"", "chat_template.jinja": b"{{ messages }}"})
    monkeypatch.chdir(pair.folder)
    return pair.folder


def check(name: str, arguments: list[str], folder: Path) -> None:
    """Compare a command and all its output with its golden file, without what differs from run to run."""
    result = run(*arguments)
    compare(name, arguments, (result.stdout, result.stderr, result.exit_code), folder)


def compare(name: str, arguments: list[str], printed: tuple[str, str, int], folder: Path) -> None:
    stdout, stderr, exit_code = printed
    text = f"$ slrmerge {' '.join(arguments)}\n{stdout}"
    text += "".join(f"2> {line}\n" for line in stderr.splitlines()) + f"exit {exit_code}\n"
    compare_text(name, text, folder)


def compare_text(name: str, text: str, folder: Path) -> None:
    text = masked(text, folder)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def masked(text: str, folder: Path) -> str:
    """Output without what differs from run to run."""
    text = text.replace(str(folder), "HERE")
    text = re.sub(r"in \d+\.\d s \([\d.]+ \w+/s\)", "in TIME (RATE)", text)
    text = re.sub(r"[\d.]+ \w+ free", "FREE free", text)
    text = re.sub(r"2> .*layer \d+ of \d+\n", "", text)  # progress that only a slow machine shows
    text = re.sub(r" +\n", "\n", text)
    text = re.sub(r"\(Expected one of .* device string: ", "(TORCH: ", text)
    return re.sub(r"; available: cpu.*", "; available: DEVICES", text)


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_output_is_that_of_the_golden_file(here: Path, name: str) -> None:
    check(name, OUTPUTS[name], here)


@pytest.mark.parametrize("name", AFTER_A_MERGE)
def test_the_output_after_a_merge_is_that_of_the_golden_file(here: Path, name: str) -> None:
    assert run("restore.yaml", "--out", "hybrid").exit_code == 0
    altered = Path(shutil.copytree(here / "hybrid", here / "altered"))
    (altered / "tokenizer.json").unlink()
    harm(altered / "model-00002-of-00002.safetensors", "edited")
    write_files(altered, {"more.safetensors": b""})
    check(name, AFTER_A_MERGE[name], here)


def test_the_output_of_a_search_is_that_of_the_golden_file(tiny_search: Path) -> None:
    printed = ((tiny_search / "stdout").read_text(), (tiny_search / "stderr").read_text(), 0)
    compare("search", ["search", "pair.yaml", "--out", "search", "--threads", "1"], printed, tiny_search)


@pytest.mark.parametrize("file", ["slr.yaml", "soup.yaml", "early.yaml", "late.yaml"])
def test_the_recipes_of_a_search_are_those_of_the_golden_files(tiny_search: Path, file: str) -> None:
    text = (tiny_search / "search" / file).read_text(encoding="utf-8")
    path = GOLDEN / f"search-{file}"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", AFTER_A_SEARCH)
def test_the_output_after_a_search_is_that_of_the_golden_file(
    tiny_search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = shutil.copytree(tiny_search, tmp_path / "here")
    monkeypatch.chdir(here)
    monkeypatch.setattr("slrmerge.searching.plots.draw_result", no_pictures)
    monkeypatch.setattr("slrmerge.searching.estimate.measured_rate", lambda width, dtype, device: 1e11)
    monkeypatch.setattr("slrmerge.searching.scorer.LocalScorer.state_s", lambda self, request: 0.0)
    monkeypatch.setattr("slrmerge.searching.estimate.peak_memory_bytes", lambda: 400_000_000)
    monkeypatch.setattr("slrmerge.searching.options.memory_bytes", lambda: 64 << 30)
    check(name, AFTER_A_SEARCH[name], here)


def test_a_repository_that_is_not_cached_offline(here: Path) -> None:
    body = "import sys; from slrmerge.cli import main; main(sys.argv[1:])"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "empty")}
    done = subprocess.run(
        [sys.executable, "-c", body, "inspect", "org/model"], capture_output=True, text=True, env=os.environ | offline
    )
    compare("hub-offline", ["inspect org/model"], (done.stdout, done.stderr, done.returncode), here)


def test_there_is_no_golden_file_without_a_test() -> None:
    names = OUTPUTS.keys() | AFTER_A_MERGE.keys() | AFTER_A_SEARCH.keys() | {"search", "hub-offline"}
    names |= {"eval", "eval-creative", "eval-reasoning"}  # test_evaluate
    assert {path.stem for path in GOLDEN.glob("*.txt")} - {"recipe-problems"} == names  # tests/recipe has that
