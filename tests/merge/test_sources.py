"""Sources that change under a merge, or hold what the output cannot: a clear error, and nothing left behind."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from slrmerge import execute, merge_checkpoints, stream
from slrmerge.cli.progress import TerminalProgress
from slrmerge.errors import BlendError, CheckpointError, SourceChangedError
from tests.checkpoints import Tensor, llama_tensors, random_tensor, read_back, write_checkpoint
from tests.cli import run
from tests.conftest import Pair
from tests.merge.faults import Recorder, age, harm, leftovers


class Fault(NamedTuple):
    """Something that happens to the post-trained side's second shard, and how it is said."""

    name: str
    what: str


FAULTS = [
    Fault("truncated", "was cut short while it was read"),
    Fault("emptied", "was cut short while it was read"),
    Fault("edited", "was changed while it was read"),
    Fault("grown", "was changed while it was read"),
]


@pytest.fixture
def calm(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """The pair with old file times, read in small steps so that there is a middle to every tensor."""
    for side in ("pre", "post"):
        age(pair.folder / side)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 64)
    return pair


SECOND = "model-00002-of-00002.safetensors"


def chunks_until_second_source(pair: Pair) -> int:
    """How many steps a merge takes until it reads the second post-trained shard for the first time, plus two."""
    first = sum(len(pair.post[name].data) for name in list(pair.post)[: -(-len(pair.post) // 2)])
    return first // 64 + 10


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("size", ["5GB", "2KB"])
def test_a_source_that_changes_while_it_is_read_ends_the_merge(
    calm: Pair, monkeypatch: pytest.MonkeyPatch, fault: Fault, size: str
) -> None:
    recipe, path = calm.recipe_file(restore=[0, 1], max_shard_size=size), calm.folder / "post" / SECOND
    recorder = Recorder(chunks_until_second_source(calm), lambda: harm(path, fault.name))
    monkeypatch.setattr(TerminalProgress, "advance", lambda self, count: recorder.advance(count))
    result = run(recipe, "--out", calm.out, "--threads", 1)
    assert result.stderr.splitlines() == [
        "error: a source changed while it was read",
        f"  {path}: {fault.what}; run again when nothing else writes to it",
    ]
    assert (result.exit_code, result.stdout) == (9, "")
    assert not calm.out.exists()
    assert leftovers(calm.out) == []  # what is finished is of no use: its source is another one now


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("replaced", "was changed after its header was read"),
        ("edited", "was changed after its header was read"),
        ("deleted", "cannot be opened any more (No such file or directory)"),
    ],
)
def test_a_source_that_changes_before_it_is_read_ends_the_merge(calm: Pair, fault: str, what: str) -> None:
    plan, path = calm.plan(restore=[2, 3]), calm.folder / "post" / SECOND
    harm(path, fault)
    with pytest.raises(SourceChangedError) as caught:
        execute(plan, calm.out)
    assert str(caught.value) == f"{path}: {what}; run again when nothing else writes to it"
    assert leftovers(calm.out) == []


@pytest.mark.parametrize("fault", ["replaced", "deleted"])
def test_a_source_replaced_or_deleted_after_it_was_opened_keeps_its_old_bytes(calm: Pair, fault: str) -> None:
    plan, path = calm.plan(restore=[0, 1]), calm.folder / "post" / SECOND
    execute(plan, calm.out, progress=Recorder(chunks_until_second_source(calm), lambda: harm(path, fault)), threads=1)
    merged = read_back(calm.out)
    assert all(merged[name] == calm.post[name] for name in calm.post if ".0." not in name and ".1." not in name)


@pytest.mark.parametrize("fault", ["truncated", "grown", "deleted"])
def test_a_side_file_that_changes_meanwhile_is_named(calm: Pair, fault: str) -> None:
    plan, path = calm.plan(restore=[2, 3]), calm.folder / "post" / "tokenizer.json"
    harm(path, fault)
    with pytest.raises(SourceChangedError) as caught:
        execute(plan, calm.out)
    assert caught.value.problems[0].where == str(path)
    assert not calm.out.exists()


def test_bools_that_are_neither_0_nor_1_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    tensors = llama_tensors("post") | {"model.mask": Tensor("BOOL", (4,), b"\0\1\2\1")}
    write_checkpoint(tmp_path / "pre", llama_tensors("pre"))
    write_checkpoint(tmp_path / "post", tensors)
    pair = Pair(tmp_path, {}, tensors)
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoints(pair.recipe(restore=[2, 3]), pair.out)
    assert str(caught.value) == f"{tmp_path / 'post'}: model.mask is BOOL and holds bytes other than 0 and 1"
    assert leftovers(pair.out) == []


@pytest.mark.parametrize("size", ["5GB", "2KB"])
def test_a_value_that_float16_cannot_hold_leaves_nothing(pair: Pair, size: str) -> None:
    huge = random_tensor("F32", (16, 8), "huge")
    tensors = pair.post | {"lm_head.weight": huge._replace(data=b"\x00\x00\x80\x47" + huge.data[4:])}  # 65536
    shutil.rmtree(pair.folder / "post")
    write_checkpoint(pair.folder / "post", tensors)
    with pytest.raises(BlendError) as caught:
        merge_checkpoints(pair.recipe(restore=[2, 3], dtype="float16", max_shard_size=size), pair.out, threads=1)
    assert str(caught.value) == (
        "lm_head.weight: has values past float16's 65504; use dtype: bfloat16 or float32 in the recipe"
    )
    assert not pair.out.exists()
    assert leftovers(pair.out) == []  # the same command would fail again, so nothing is worth keeping


def test_a_side_file_edited_to_the_same_length_after_planning_is_named(calm: Pair) -> None:
    plan, path = calm.plan(restore=[2, 3]), calm.folder / "post" / "config.json"
    path.write_bytes(path.read_bytes().replace(b"6", b"5"))
    with pytest.raises(SourceChangedError) as caught:
        execute(plan, calm.out)
    assert str(caught.value) == f"{path}: was changed while it was read; run again"
    assert leftovers(calm.out) == []
