"""Shared by the slow tests: the pair of real checkpoints and its search, each made once for all workers."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import slrmerge
from slrmerge.io.strict_yaml import write_yaml
from slrmerge.searching.proxy_tasks import ConstrainedRandomCharacter
from tests.conftest import made_once
from tests.slow.llama_cpp import gguf_of

SLRMERGE = Path(sys.executable).with_name("slrmerge")
RESTORED = [17, 28]
EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
QUESTIONS = ConstrainedRandomCharacter().questions()[::10]
"""Two about digits and two about letters: a search of 465 intervals takes as long as it asks questions."""

# For the steps that all tests wait for. Waiting torch threads would otherwise spin, and take the core from other tests.
ON_EVERY_CORE = {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "passive"}


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command that has to succeed; returns its stdout."""
    variables = os.environ | ON_EVERY_CORE
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def real_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as `pretrained` and `posttrained`, beside the example's recipe; read-only."""
    return made_once(tmp_path_factory, "smollm2", _make_pair)


@pytest.fixture(scope="session")
def real_hybrid(real_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 17–28 of the pair restored, in float32: the checkpoint `hybrid` and its conversion `hybrid.gguf`."""

    def merge(folder: Path) -> None:
        sides = {side: str(real_pair / side) for side in ("pretrained", "posttrained")}
        slrmerge.merge({**sides, "restore": RESTORED, "dtype": "float32"}, folder / "hybrid")
        gguf_of(folder / "hybrid", folder / "hybrid.gguf")

    return made_once(tmp_path_factory, "smollm2-hybrid", merge)


@pytest.fixture(scope="session")
def searched(real_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of all intervals of the pair by `QUESTIONS`, in float32, in which every processor is fast."""

    def search(folder: Path) -> None:
        task = tmp_path_factory.mktemp("task") / "questions.yaml"
        task.write_text(write_yaml({"questions": [asdict(question) for question in QUESTIONS]}))
        options = ["--task", task, "--space", "intervals"]
        run(SLRMERGE, "search", real_pair / "recipe.yaml", "--out", folder, *options)

    return made_once(tmp_path_factory, "smollm2-search", search)


def _make_pair(folder: Path) -> None:
    run(sys.executable, EXAMPLE / "make.py", "--out", folder)
    (folder / "recipe.yaml").write_bytes((EXAMPLE / "recipe.yaml").read_bytes())
