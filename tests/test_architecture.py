"""The house rules that a machine can check."""

import json
import re
import subprocess
import sys
from pathlib import Path

import slrmerge

ROOT = Path(__file__).parent.parent


def test_imports_point_one_way() -> None:
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_public_names_are_exactly_these() -> None:
    assert set(slrmerge.__all__) == set(slrmerge._HOMES)
    assert all(getattr(slrmerge, name) is not None for name in slrmerge.__all__)


def _modules_after(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    heavy = {
        "torch",
        "cattrs",
        "rich",
        "transformers",
        "huggingface_hub",
        "numpy",
        "tqdm",
        "safetensors",
        "matplotlib",
    }
    assert not heavy & _modules_after("import slrmerge.cli")


def test_only_what_computes_on_weights_imports_torch() -> None:
    importers = {
        path.relative_to(ROOT) for path in (ROOT / "slrmerge").rglob("*.py") if "import torch" in path.read_text()
    }
    names = ("blend.py", "diff.py", "sweep", "search", "evaluate/local.py", "devices.py")
    allowed = [Path("slrmerge", name) for name in names]
    assert all(any(path.is_relative_to(place) for place in allowed) for path in importers)


def test_only_what_speaks_to_the_hub_imports_its_client() -> None:
    importers = {
        path.relative_to(ROOT / "slrmerge").as_posix()
        for path in (ROOT / "slrmerge").rglob("*.py")
        if re.search("(from|import) huggingface_hub", path.read_text())
    }
    assert all(name.startswith("hub/") or name in ("push.py", "cli/push.py") for name in importers), importers
    assert "huggingface_hub" not in _modules_after("import slrmerge.hub, slrmerge.push, slrmerge.verify")


def test_a_recipe_that_is_no_mergekit_config_costs_nothing_of_mergekits() -> None:
    assert "slrmerge.mergekit.config" not in _modules_after("import slrmerge.cli.show, slrmerge.recipe, slrmerge.hub")


def test_every_module_says_what_it_is() -> None:
    for path in (ROOT / "slrmerge").rglob("*.py"):
        assert path.read_text().startswith('"""'), path
