"""The same merges in mergekit: a restoration must give the same bytes, a soup the same numbers."""

import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from slrmerge import merge_checkpoints, parse_recipe
from tests.checkpoints import Tensor, read_back

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MERGEKIT = ROOT / ".venv-mergekit" / "bin" / "mergekit-yaml"
TINY = ROOT / "examples" / "tiny"
PRE, POST = str(TINY / "pretrained"), str(TINY / "posttrained")


def mergekit(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """What mergekit makes of a config."""
    if not MERGEKIT.exists():
        pytest.fail(f"{MERGEKIT} is missing: run this through `make slow`")
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run([MERGEKIT, folder / "mergekit.yaml", folder / "theirs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return read_back(folder / "theirs")


def slrmerge(folder: Path, **rule: object) -> dict[str, Tensor]:
    merge_checkpoints(parse_recipe({"pretrained": PRE, "posttrained": POST, **rule}), folder / "ours")
    return read_back(folder / "ours")


def test_a_restoration_gives_mergekits_bytes(tmp_path: Path) -> None:
    layers = json.loads((TINY / "posttrained" / "config.json").read_text())["num_hidden_layers"]
    first, last = 3, 5
    slices = [(POST, 0, first), (PRE, first, last + 1), (POST, last + 1, layers)]
    theirs = mergekit(
        tmp_path,
        {
            "merge_method": "passthrough",
            "base_model": POST,
            "slices": [{"sources": [{"model": model, "layer_range": [start, end]}]} for model, start, end in slices],
        },
    )
    assert slrmerge(tmp_path, restore=[first, last]) == theirs


def floats(tensor: Tensor) -> list[float]:
    count = len(tensor.data) // 2
    return [struct.unpack("<f", b"\0\0" + tensor.data[2 * i : 2 * i + 2])[0] for i in range(count)]


def test_a_soup_gives_mergekits_numbers_to_the_last_bit_but_one(tmp_path: Path) -> None:
    theirs = mergekit(
        tmp_path,
        {
            "merge_method": "linear",
            "models": [{"model": PRE, "parameters": {"weight": 0.85}}, {"model": POST, "parameters": {"weight": 0.15}}],
            "dtype": "bfloat16",
        },
    )
    ours = slrmerge(tmp_path, alpha=0.85)
    assert ours.keys() == theirs.keys()
    pre, post = read_back(Path(PRE)), read_back(Path(POST))
    for name in ours:
        sides = zip(floats(ours[name]), floats(theirs[name]), floats(pre[name]), floats(post[name]), strict=True)
        for a, b, before, after in sides:
            # They divide by the sum of the weights: a rounding more in fp32, so at most one bfloat16 step apart,
            # but for sums that cancel, where the rounding of the terms shows.
            assert abs(a - b) <= max(abs(a), abs(b)) * 2**-7 + (abs(before) + abs(after)) * 2**-22
