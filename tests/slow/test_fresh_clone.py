"""The README's set-up commands, as written, in a clone that holds nothing else."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SETUP = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "slrmerge"], check=True)
    return tmp_path / "slrmerge"


def run(script: str, folder: Path, path: str = "") -> str:
    """Run a block of the README in a shell, outside any virtual environment of ours."""
    outside = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    outside["PATH"] = path + outside["PATH"]
    done = subprocess.run(["sh", "-ec", script], cwd=folder, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_demo_ends_in_a_verified_hybrid(clone: Path) -> None:
    assert SETUP[0] == "make demo\n"
    printed = run(SETUP[0], clone)
    assert "sources: the weights are equal bit by bit" in printed
    assert (clone / "hybrid" / "model.safetensors").exists()


def test_pip_install_gives_the_same_command(clone: Path, tmp_path: Path) -> None:
    assert SETUP[2].startswith("pip install .\n")
    subprocess.run(["python3", "-m", "venv", tmp_path / "env"], check=True)
    install = "pip install --no-compile -c constraints.txt ."  # compiling what is not imported takes most of the time
    printed = run(SETUP[2].replace("pip install .", install), clone, f"{tmp_path}/env/bin:")
    assert "sources: the weights are equal bit by bit" in printed


def test_the_other_block_is_what_ci_runs() -> None:
    assert SETUP[1] == "make test\n"
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()
