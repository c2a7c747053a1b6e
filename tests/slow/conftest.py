"""Shared by the slow tests: a pair of real checkpoints, and a merge of it."""

import subprocess
import sys
from pathlib import Path

import pytest

import slrmerge
from tests.slow.llama_cpp import gguf_of

RESTORED = [17, 28]
EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"

WITH_SMOLLM2 = [
    pytest.mark.slow,
    pytest.mark.xdist_group("smollm2"),  # one process makes the pair, so that no other waits for it
    pytest.mark.timeout(1800),  # the first test makes the pair
    pytest.mark.filterwarnings("default"),  # those of other libraries
]


@pytest.fixture(scope="session")
def real_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as `pretrained` and `posttrained`, beside the example's recipe; read-only."""
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, EXAMPLE / "make.py", "--out", folder, "--steps", "4"], check=True)
    (folder / "recipe.yaml").write_bytes((EXAMPLE / "recipe.yaml").read_bytes())
    return folder


@pytest.fixture(scope="session")
def real_hybrid(real_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 17–28 of the pair restored, in float32: the checkpoint `hybrid` and its conversion `hybrid.gguf`."""
    folder = tmp_path_factory.mktemp("smollm2-hybrid")
    sides = {side: str(real_pair / side) for side in ("pretrained", "posttrained")}
    slrmerge.merge({**sides, "restore": RESTORED, "dtype": "float32"}, folder / "hybrid")
    gguf_of(folder / "hybrid", folder / "hybrid.gguf")
    return folder
