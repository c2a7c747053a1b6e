"""Sources that change during a merge, or have values that the output cannot represent: an error, and no leftovers."""

import shutil
from pathlib import Path

import pytest

from slrmerge.errors import BlendError, CheckpointError, SourceChangedError
from slrmerge.merging import stream
from slrmerge.merging.executor import execute, merge
from slrmerge.merging.options import MergeOptions
from tests.checkpoints import Tensor, llama_tensors, random_tensor, read_back, write_checkpoint
from tests.conftest import Pair
from tests.merging.faults import Recorder, age, harm, leftovers
from tests.problems import refused


@pytest.fixture
def calm(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """The pair with old file times, read in small steps, so that a fault can come in the middle of a tensor."""
    for side in ("pre", "post"):
        age(pair.folder / side)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 64)
    return pair


SECOND = "model-00002-of-00002.safetensors"


def chunks_until_second_source(pair: Pair) -> int:
    """How many steps a merge takes until it reads the second post-trained shard for the first time, plus two."""
    first = sum(len(pair.post[name].data) for name in list(pair.post)[: -(-len(pair.post) // 2)])
    return first // 64 + 10


@pytest.mark.parametrize("fault", ["truncated", "emptied", "edited", "grown"])
@pytest.mark.parametrize("size", ["5GB", "2KB"])
def test_a_source_that_changes_while_it_is_read_ends_the_merge(calm: Pair, fault: str, size: str) -> None:
    recipe, path = calm.recipe(restore=[0, 1], max_shard_size=size), calm.folder / "post" / SECOND
    recorder = Recorder(chunks_until_second_source(calm), lambda: harm(path, fault))
    with refused(SourceChangedError, "source-changed") as caught:
        merge(recipe, calm.out, threads=1, progress=recorder)
    assert caught.value.problems[0].where == str(path)
    assert not calm.out.exists()
    assert leftovers(calm.out) == []  # finished pieces are of no use: their source has changed


@pytest.mark.parametrize("fault", ["replaced", "edited", "deleted"])
def test_a_source_that_changes_before_it_is_read_ends_the_merge(calm: Pair, fault: str) -> None:
    plan, path = calm.plan(restore=[2, 3]), calm.folder / "post" / SECOND
    harm(path, fault)
    with refused(SourceChangedError, "source-changed") as caught:
        execute(plan, calm.out)
    assert caught.value.problems[0].where == str(path)
    assert leftovers(calm.out) == []


@pytest.mark.parametrize("fault", ["replaced", "deleted"])
def test_a_source_replaced_or_deleted_after_it_was_opened_keeps_its_old_bytes(calm: Pair, fault: str) -> None:
    plan, path = calm.plan(restore=[0, 1]), calm.folder / "post" / SECOND
    recorder = Recorder(chunks_until_second_source(calm), lambda: harm(path, fault))
    execute(plan, calm.out, options=MergeOptions(threads=1), progress=recorder)
    merged = read_back(calm.out)
    assert all(merged[name] == calm.post[name] for name in calm.post if ".0." not in name and ".1." not in name)


@pytest.mark.parametrize("fault", ["truncated", "grown", "deleted"])
def test_a_side_file_that_changes_after_planning_ends_the_merge(calm: Pair, fault: str) -> None:
    plan, path = calm.plan(restore=[2, 3]), calm.folder / "post" / "tokenizer.json"
    harm(path, fault)
    with refused(SourceChangedError, "source-changed") as caught:
        execute(plan, calm.out)
    assert caught.value.problems[0].where == str(path)
    assert not calm.out.exists()


def test_bools_that_are_neither_0_nor_1_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    tensors = llama_tensors("post") | {"model.mask": Tensor("BOOL", (4,), b"\0\1\2\1")}
    write_checkpoint(tmp_path / "pre", llama_tensors("pre"))
    write_checkpoint(tmp_path / "post", tensors)
    pair = Pair(tmp_path, {}, tensors)
    with refused(CheckpointError, "invalid-bool") as caught:
        merge(pair.recipe(restore=[2, 3]), pair.out)
    assert caught.value.problems[0].where == str(tmp_path / "post")
    assert leftovers(pair.out) == []


@pytest.mark.parametrize("size", ["5GB", "2KB"])
def test_a_value_that_float16_cannot_represent_leaves_nothing(pair: Pair, size: str) -> None:
    huge = random_tensor("F32", (16, 8), "huge")
    tensors = pair.post | {"lm_head.weight": huge._replace(data=b"\x00\x00\x80\x47" + huge.data[4:])}  # 65536
    shutil.rmtree(pair.folder / "post")
    write_checkpoint(pair.folder / "post", tensors)
    with refused(BlendError, "overflow") as caught:
        merge(pair.recipe(restore=[2, 3], dtype="float16", max_shard_size=size), pair.out, threads=1)
    assert caught.value.problems[0].where == "lm_head.weight"
    assert not pair.out.exists()
    assert leftovers(pair.out) == []  # the same merge would fail again, so nothing is kept


def test_a_side_file_edited_to_the_same_length_after_planning_ends_the_merge(calm: Pair) -> None:
    plan, path = calm.plan(restore=[2, 3]), calm.folder / "post" / "config.json"
    path.write_bytes(path.read_bytes().replace(b"6", b"5"))
    with refused(SourceChangedError, "source-changed") as caught:
        execute(plan, calm.out)
    assert caught.value.problems[0].where == str(path)
    assert leftovers(calm.out) == []
