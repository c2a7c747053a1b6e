"""The README's own evaluation: what restoring layers does to the example pair, by samples instead of probabilities."""

import json
import re
import shlex
from pathlib import Path

import pytest

from slrmerge import load_recipe, merge_checkpoints
from tests.cli import ROOT, run


def shown() -> list[str]:
    """The command as the README shows it."""
    text = re.search(
        r"^slrmerge (eval open-qa --data examples/tiny.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    assert text
    return shlex.split(text[1].replace("\\\n", " "))


def test_the_hybrid_says_more_than_the_post_trained_model_and_a_little_less_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    merge_checkpoints(load_recipe(Path("examples/tiny/recipe.yaml")), Path("hybrid"))
    result = run(*shown(), "--samples", 16, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    change = {
        cell["metric"]: (cell["change_low"], cell["change_high"])
        for cell in report["results"]
        if cell["model"] == "slr"
    }
    assert change["entropy"][0] > 0.3
    assert change["coverage-16"][0] > 0.2
    assert -0.25 < change["precision"][0] < change["precision"][1] <= 0
