"""Merges on file systems that clone: what is unchanged takes no disk space, and killed runs resume as anywhere else.

Each file system is a file of its own, mounted for the test; skipped where mounting is not permitted.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path
from random import Random

import pytest

from slrmerge.errors import NoSpaceError, SourceChangedError
from slrmerge.io import pieces
from slrmerge.merging.executor import execute
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.verify import verify
from tests.checkpoints import Tensor, llama_tensors, write_checkpoint
from tests.conftest import Pair, mounted
from tests.merging.faults import ROOT, Recorder, Stop, age, harm, leftovers, snapshot, stop
from tests.problems import refused

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("clone"), pytest.mark.timeout(900)]

FAST = MergeOptions(fsync=False, threads=1)


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of an empty file system of 400 MB."""
    folder = tmp_path_factory.mktemp(request.param)
    with mounted(request.param, folder / "root", "400M") as root:
        yield root


@pytest.fixture
def pair(disk: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Two sides of 20 MB, merged in pieces of 1 MiB; of 100 KB for a test that kills merges."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 20)
    folder = disk / "pair"
    hidden = 32 if "killed" in request.node.name else 512
    pre, post = weights("pre", hidden), weights("post", hidden)
    write_checkpoint(folder / "pre", pre)
    write_checkpoint(folder / "post", post, shards=2)
    yield Pair(folder, pre, post)
    shutil.rmtree(folder)


@cache
def weights(seed: str, hidden: int) -> dict[str, Tensor]:
    """The tensors of a six-layer model, of any bytes."""
    rng = Random(seed)
    shapes = {name: tensor.shape for name, tensor in llama_tensors("shapes", hidden=2, vocabulary=2).items()}
    larger = {name: tuple(size * hidden // 2 for size in shape) for name, shape in shapes.items()}
    return {name: Tensor("BF16", shape, rng.randbytes(2 * prod(shape))) for name, shape in larger.items()}


def used_bytes(folder: Path) -> int:
    os.sync()
    return shutil.disk_usage(folder).used


def test_a_merge_takes_the_space_of_what_changed(pair: Pair, tmp_path: Path) -> None:
    before = used_bytes(pair.folder)
    plan = pair.plan(restore=[4, 5])
    execute(plan, pair.out, options=FAST)
    assert used_bytes(pair.folder) - before < 1.05 * plan.changed_bytes + 1_000_000 < plan.output_bytes / 2
    execute(plan, tmp_path / "elsewhere", options=FAST)  # on another disk nothing can be cloned
    written = {path.name: path.read_bytes() for path in pair.out.glob("*.safetensors")}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").glob("*.safetensors")}
    same = "model-00001-of-00002.safetensors"
    assert written[same] == (pair.folder / "post" / same).read_bytes()
    assert verify(pair.out).against_sources


def test_the_output_and_its_sources_are_independent(pair: Pair) -> None:
    execute(pair.plan(restore=[4, 5]), pair.out, options=FAST)
    written = snapshot(pair.out)
    for path in (pair.folder / "post").glob("*.safetensors"):
        path.write_bytes(b"x" * path.stat().st_size)
    os.sync()
    assert snapshot(pair.out) == written


def test_a_merge_fits_where_a_copy_would_not(pair: Pair) -> None:
    plan = pair.plan(restore=[4, 5])
    left = (plan.changed_bytes + plan.output_bytes) // 2
    with open(pair.folder / "filler", "wb") as filler:
        # In steps: what btrfs says is free is only roughly so.
        while (step := (shutil.disk_usage(pair.folder).free - left) // 2) > 1 << 20:
            os.posix_fallocate(filler.fileno(), filler.seek(0, os.SEEK_END), step)
            os.sync()
    assert shutil.disk_usage(pair.folder).free < plan.output_bytes
    with refused(NoSpaceError, "no-space"):
        execute(pair.plan(alpha=0.5), pair.out, options=FAST)
    execute(plan, pair.out, options=FAST)
    assert verify(pair.out).against_sources


@pytest.mark.parametrize("fault", ["edited", "truncated"])
def test_a_source_that_changes_after_its_first_piece_was_cloned_is_noticed(pair: Pair, fault: str) -> None:
    age(pair.folder)
    path = pair.folder / "post" / "model-00001-of-00002.safetensors"
    with refused(SourceChangedError, "source-changed"):
        execute(pair.plan(restore=[4, 5]), pair.out, options=FAST, progress=Recorder(3, lambda: harm(path, fault)))
    assert not pair.out.exists()


def test_an_interrupted_merge_resumes_from_its_pieces(pair: Pair) -> None:
    plan = pair.plan(restore=[[1, 1], [4, 4]])
    with pytest.raises(Stop):
        execute(plan, pair.out, options=FAST, progress=Recorder(15, stop))
    before = used_bytes(pair.folder)
    again = execute(plan, pair.out, options=FAST)
    assert again.resumed_pieces > 5
    assert used_bytes(pair.folder) - before < plan.changed_bytes + 1_000_000
    assert verify(pair.out).against_sources


@pytest.mark.parametrize("mode", ["fresh-cloned", "overwrite-swap-cloned"])
def test_a_merge_killed_before_any_step_is_completed_by_the_next_run(pair: Pair, mode: str) -> None:
    command = [sys.executable, "-m", "tests.merging.faults", mode, str(pair.recipe_file(restore=[4, 5])), str(pair.out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    assert len([row for row in rows if row["at"].startswith("clone")]) >= 4
    assert [row for row in rows if row["then"] != "new" or row["leftovers"]] == []
    assert [row for row in rows if row["resumed"] != row["journaled"]] == []
    assert leftovers(pair.out) == []
