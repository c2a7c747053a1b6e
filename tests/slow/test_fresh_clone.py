"""The README's commands, as written, in a clone that holds nothing else."""

import subprocess
from pathlib import Path

import pytest

from tests.documentation import README, ROOT, blocks, run_block, run_console

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fresh_clone"), pytest.mark.timeout(900)]

INSTALL, DEMO, TEST = blocks(README, "sh")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for both installations, the README's on top of the demo's, which it contains: torch alone takes minutes."""
    folder = tmp_path_factory.mktemp("clone") / "slrmerge"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    return folder


def test_make_demo_ends_in_a_verified_hybrid(clone: Path) -> None:
    assert DEMO == "make demo\n"
    printed = run_block(DEMO, clone, path="")
    assert "sources: the weights are equal bit by bit" in printed
    assert (clone / "demo" / "hybrid" / "model.safetensors").exists()


def test_what_is_installed_prints_what_the_readme_shows(clone: Path) -> None:
    # The same build of torch from the usual index, and nothing compiled that is not imported.
    lines = INSTALL.replace(" --index-url https://download.pytorch.org/whl/cpu", "")
    run_block(lines.replace("pip install", "pip install --no-compile -c constraints.txt"), clone, path="")
    for text in blocks(README, "console"):
        run_console(text, clone, path=f"{clone}/.venv/bin")


def test_the_other_block_is_what_ci_runs() -> None:
    assert TEST == "make test\n"
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()
