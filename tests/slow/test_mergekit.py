"""The same merges in mergekit: its configs run by both tools, and our recipes exported and run by it.

Copies must give the same bytes; blends the same numbers to one rounding.
"""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from tests.checkpoints import Tensor, read_back
from tests.cli import run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("mergekit"), pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-mergekit" / "bin" / "python"
TINY = ROOT / "examples" / "tiny"
PRE, POST = str(TINY / "pretrained"), str(TINY / "posttrained")
LAYERS = 10

RUN_ALL = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
import yaml
for config, out in json.loads(sys.argv[1]):
    loaded = MergeConfiguration.model_validate(yaml.safe_load(open(config)))
    run_merge(loaded, out, MergeOptions(copy_tokenizer=True))
"""


def slices(*parts: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": model, "layer_range": [first, stop]}]} for model, first, stop in parts]


def both(first: int, stop: int, post: Any, pre: Any) -> dict[str, Any]:
    weights = {POST: post, PRE: pre}
    return {
        "sources": [
            {"model": model, "layer_range": [first, stop], "parameters": {"weight": weight}}
            for model, weight in weights.items()
        ]
    }


WIDE = {"dtype": "float32", "out_dtype": "bfloat16"}
COPIES: dict[str, dict[str, Any]] = {
    "middle": {"slices": slices((POST, 0, 3), (PRE, 3, 6), (POST, 6, LAYERS))},
    "first, with embeddings": {"slices": slices((PRE, 0, 3), (POST, 3, LAYERS))},
    "last, with norm and head": {"slices": slices((POST, 0, 7), (PRE, 7, LAYERS))},
    "first, without embeddings": {"slices": slices((POST, 0, 0), (PRE, 0, 3), (POST, 3, LAYERS))},
}
BLENDS: dict[str, dict[str, Any]] = {
    "soup": {
        "merge_method": "linear",
        "models": [{"model": PRE, "parameters": {"weight": 0.85}}, {"model": POST, "parameters": {"weight": 0.15}}],
        "dtype": "bfloat16",
    },
    "weights that are normalised": {
        "merge_method": "linear",
        "base_model": POST,
        "models": [{"model": PRE, "parameters": {"weight": 1}}, {"model": POST, "parameters": {"weight": 3}}],
        **WIDE,
    },
    "gradients and filters": {
        "merge_method": "linear",
        "base_model": POST,
        "models": [
            {"model": PRE, "parameters": {"weight": [0, 0.5, 1]}},
            {
                "model": POST,
                "parameters": {"weight": [{"filter": "self_attn", "value": [1, 0.2]}, {"value": 0.6}]},
            },
        ],
        "dtype": "bfloat16",
    },
    "slices with gradients": {
        "merge_method": "linear",
        "base_model": POST,
        "slices": [both(0, 4, [0.1, 0.9], 0.5), both(4, 5, [0.2, 0.4], 1), both(5, LAYERS, 0.25, 0.75)],
        "dtype": "bfloat16",
    },
    "task arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": PRE,
        "models": [{"model": POST, "parameters": {"weight": 0.7}}],
        "parameters": {"lambda": 0.5},
        **WIDE,
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": POST,
        "slices": [
            {"sources": [{"model": POST, "layer_range": [0, LAYERS]}, {"model": PRE, "layer_range": [0, LAYERS]}]}
        ],
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
        "dtype": "bfloat16",
    },
    "slerp of models": {
        "merge_method": "slerp",
        "base_model": POST,
        "models": [{"model": PRE}],
        "parameters": {"t": 0.4},
        "dtype": "bfloat16",
    },
}
EXPORTED_COPIES: dict[str, dict[str, Any]] = {
    "interval": {"restore": [3, 5]},
    "all layers": {"restore": [0, LAYERS - 1]},
    "first and last": {"restore": [[0, 2], [7, LAYERS - 1]]},
    "embeddings too": {"restore": [0, 2], "tensors": [{"match": "model.embed_tokens.*", "alpha": 1}]},
}
EXPORTED_BLENDS: dict[str, dict[str, Any]] = {
    "soup": {"alpha": 0.85},
    "both": {"restore": [2, 4], "layers": [{"range": [6, 8], "alpha": 0.5}]},
    "gradient": {"layers": [{"range": [2, 6], "alpha": [0.2, 0.8]}], "alpha": 0.1},
    "module": {"layers": [{"range": [2, 6], "alpha": 0.5, "modules": ["self_attn"]}]},
    "slerp": {"blend": "slerp", "alpha": 0.3},
    "slerped gradient": {
        "blend": "slerp",
        "layers": [{"range": [2, 6], "alpha": [0.2, 0.8]}],
        "tensors": [{"match": "model.embed_tokens.*", "alpha": 0.5}],
    },
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by both tools: a folder for each, with `theirs` and `ours`."""
    if not PEER.exists():
        pytest.fail(f"{PEER} is missing: run this through `make slow`")
    folder, jobs = tmp_path_factory.mktemp("mergekit"), []
    configs = {f"copy {name}": {"merge_method": "passthrough", "base_model": POST, **c} for name, c in COPIES.items()}
    configs |= {f"blend {name}": config for name, config in BLENDS.items()}
    for name, content in configs.items():
        (folder / name).mkdir(parents=True)
        config = folder / name / "config.yml"
        config.write_text(yaml.safe_dump(content))
        jobs.append((config, folder / name / "theirs"))
        merge(config, folder / name / "ours")
    for name, rules in {**EXPORTED_COPIES, **{f"{n}, blended": r for n, r in EXPORTED_BLENDS.items()}}.items():
        case = folder / f"export {name}"
        case.mkdir(parents=True)
        (case / "recipe.yaml").write_text(yaml.safe_dump({"pretrained": PRE, "posttrained": POST, **rules}))
        exported = run("export", case / "recipe.yaml")
        assert exported.exit_code == 0, exported.stderr
        (case / "config.yml").write_text(exported.stdout)
        jobs.append((case / "config.yml", case / "theirs"))
        merge(case / "recipe.yaml", case / "ours")
    command = [str(PEER), "-c", RUN_ALL, json.dumps([[str(path) for path in job] for job in jobs])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def merge(recipe: Path, out: Path) -> None:
    result = run(recipe, "--out", out)
    assert result.exit_code == 0, result.stderr


def floats(tensor: Tensor) -> NDArray[np.float32]:
    assert tensor.dtype == "BF16"
    bits = np.frombuffer(tensor.data, dtype="<u2").astype(np.uint32) << 16
    values: NDArray[np.float32] = bits.view(np.float32)
    return values


def tools(case: Path) -> Iterable[dict[str, Tensor]]:
    return (read_back(case / "theirs"), read_back(case / "ours"))


@pytest.mark.parametrize(
    "name", [*(f"copy {name}" for name in COPIES), *(f"export {name}" for name in EXPORTED_COPIES)]
)
def test_copies_are_mergekits_bytes(merged: Path, name: str) -> None:
    theirs, ours = tools(merged / name)
    assert ours == theirs


@pytest.mark.parametrize(
    "name", [*(f"blend {name}" for name in BLENDS), *(f"export {name}, blended" for name in EXPORTED_BLENDS)]
)
def test_blends_are_mergekits_numbers_to_one_rounding(merged: Path, name: str) -> None:
    theirs, ours = tools(merged / name)
    pre, post = read_back(Path(PRE)), read_back(Path(POST))
    assert ours.keys() == theirs.keys()
    assert ours != post
    for tensor in ours:
        a, b = floats(ours[tensor]), floats(theirs[tensor])
        # One step of bfloat16, except where the terms cancel, which exposes their rounding in fp32.
        terms = np.abs(floats(pre[tensor])) + np.abs(floats(post[tensor]))
        assert np.all(np.abs(a - b) <= np.maximum(np.abs(a), np.abs(b)) * 2**-7 + terms * 2**-21), tensor


def test_a_merge_contains_its_config(merged: Path) -> None:
    case = merged / "blend slerp"
    written = yaml.safe_load((case / "ours" / "mergekit_config.yml").read_text())
    assert written == yaml.safe_load((case / "config.yml").read_text())
    assert run("verify", case / "ours").exit_code == 0
