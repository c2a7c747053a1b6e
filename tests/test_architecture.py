"""Rules of the code base that a machine can check."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import slrmerge

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "slrmerge").rglob("*.py"))


def test_imports_point_down() -> None:
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_top_level_has_about_ten_names() -> None:
    names = {path.name for path in (ROOT / "slrmerge").iterdir()} - {"__pycache__", "py.typed"}
    assert len(names) <= 12, names


def test_all_public_names_exist() -> None:
    assert all(getattr(slrmerge, name) is not None for name in slrmerge.__all__)


def _modules_after(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    heavy = {
        "torch",
        "pydantic",
        "rich",
        "transformers",
        "huggingface_hub",
        "numpy",
        "tqdm",
        "safetensors",
        "matplotlib",
        "pandas",
    }
    assert not heavy & _modules_after("import slrmerge.cli")


def test_a_restoration_imports_neither_torch_nor_the_hub() -> None:
    loaded = _modules_after(
        "import slrmerge as slr; slr.merge; slr.plan('examples/tiny/recipe.yaml'); slr.verify; slr.push"
    )
    assert not {"torch", "huggingface_hub", "transformers", "numpy"} & loaded


def _importers(package: str) -> set[str]:
    pattern = re.compile(rf"^\s*(from|import) {package}\b", re.MULTILINE)
    return {path.relative_to(ROOT / "slrmerge").as_posix() for path in MODULES if pattern.search(path.read_text())}


def test_torch_is_imported_only_where_weights_are_computed() -> None:
    allowed = (
        "checkpoint/adapter.py",
        "merging/blend.py",
        "recipe/blend.py",
        "searching/",
        "evaluation/local.py",
        "cli/shell.py",
    )
    assert [name for name in _importers("torch") if not name.startswith(allowed)] == []


def test_the_hub_client_is_imported_only_where_the_hub_is_used() -> None:
    allowed = (
        "errors.py",  # looks at the client's settings before another package imports it
        "checkpoint/hub/",
        "merging/push.py",
        "merging/hub_commit.py",
        "cli/push.py",
        "evaluation/hub_dataset.py",
    )
    assert [name for name in _importers("huggingface_hub") if not name.startswith(allowed)] == []


def test_a_recipe_does_not_import_the_mergekit_dialect() -> None:
    loaded = _modules_after("import slrmerge as slr; slr.plan('examples/tiny/recipe.yaml')")
    assert not [name for name in loaded if name.startswith("slrmerge.recipe.mergekit.")]


def test_every_problem_has_a_code() -> None:
    codes: list[str] = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
                first = node.args[0]
                codes += [first.value] if isinstance(first, ast.Constant) else []
    assert [code for code in codes if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code) or code == "todo"] == []
    assert len(codes) > 100
