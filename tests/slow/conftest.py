"""What the slow tests share: the pair of real checkpoints, made once for all workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


@pytest.fixture(scope="session")
def real_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as `pretrained` and `posttrained`, beside the example's recipe; not to be written to."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # what the workers share
    folder /= "smollm2"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            new = folder.with_name("smollm2.new")
            command = [sys.executable, EXAMPLE / "make.py", "--out", new]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (new / "recipe.yaml").write_bytes((EXAMPLE / "recipe.yaml").read_bytes())
            new.rename(folder)
    return folder
