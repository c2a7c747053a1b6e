"""What the slow tests share: the pair of real checkpoints and its search, each made once for all workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import made_once

SLRMERGE = Path(sys.executable).with_name("slrmerge")
EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
# For what all else waits for. Threads of torch's that wait would spin, and take the core from the tests beside.
ON_EVERY_CORE = {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "passive"}


def run(*command: object, cwd: Path | None = None) -> str:
    """What a command prints on stdout; it has to succeed."""
    variables = os.environ | ON_EVERY_CORE
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def real_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as `pretrained` and `posttrained`, beside the example's recipe; not to be written to."""
    return made_once(tmp_path_factory, "smollm2", _make_pair)


@pytest.fixture(scope="session")
def searched(real_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick search of the pair in bfloat16: everything asked eight prompts, the leaders all forty in float32."""

    def search(folder: Path) -> None:
        options = ["--quick", "--dtype", "bfloat16", "--space", "intervals"]
        run(SLRMERGE, "search", real_pair / "recipe.yaml", "--out", folder, *options)

    return made_once(tmp_path_factory, "smollm2-search", search)


def _make_pair(folder: Path) -> None:
    run(sys.executable, EXAMPLE / "make.py", "--out", folder)
    (folder / "recipe.yaml").write_bytes((EXAMPLE / "recipe.yaml").read_bytes())
