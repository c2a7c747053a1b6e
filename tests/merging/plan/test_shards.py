"""Tensors are assigned to files as the ecosystem does, aligned, and files have the planned sizes."""

from pathlib import Path

import pytest
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint.header import DTYPE_BITS, TensorInfo
from slrmerge.merging.plan.model import PlannedTensor
from slrmerge.merging.plan.shards import lay_out, split_by_size
from slrmerge.merging.stream import HybridReader
from tests.checkpoints import llama_tensors
from tests.merging.plan import plan_of, write_pair
from tests.streams import shard_chunks


def planned(name: str, dtype: str, count: int) -> PlannedTensor:
    info = TensorInfo(dtype, (count,), count * DTYPE_BITS[dtype] // 8, 0)
    return PlannedTensor(name, info, 0.0, "copy", None, name)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(1, 60))
@settings(deadline=None, max_examples=200)
def test_files_are_filled_as_huggingface_hub_fills_them(sizes: list[int], limit_bytes: int) -> None:
    state = {f"t{position}": size for position, size in enumerate(sizes)}
    reference = split_state_dict_into_shards_factory(
        state,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit_bytes,
    )
    names = list(state)
    groups = [[names[position] for position in group] for group in split_by_size(sizes, limit_bytes=limit_bytes)]
    assert groups == list(reference.filename_to_tensors.values())
    shards, _ = lay_out([planned(name, "U8", size) for name, size in state.items()], {}, limit_bytes=limit_bytes)
    assert [shard.name for shard in shards] == list(reference.filename_to_tensors)
    assert sum(shard.data_bytes for shard in shards) == reference.metadata["total_size"]


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([], []),
        ([5], [[0]]),
        ([50], [[0]]),
        ([5, 5], [[0, 1]]),
        ([5, 6], [[0], [1]]),
        ([5, 50, 5], [[1], [0, 2]]),
        ([0, 10, 0], [[0, 1, 2]]),
    ],
)
def test_a_file_is_filled_until_the_next_tensor_would_not_fit(sizes: list[int], groups: list[list[int]]) -> None:
    assert split_by_size(sizes, limit_bytes=10) == groups


def test_one_file_is_named_model_and_several_are_numbered() -> None:
    tensors = [planned(f"t{k}", "U8", 6) for k in range(3)]
    assert [shard.name for shard in lay_out(tensors, {}, limit_bytes=18).shards] == ["model.safetensors"]
    assert [shard.name for shard in lay_out(tensors, {}, limit_bytes=10).shards] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


WHOLE_BYTES = st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.integers(0, 9)).filter(
    lambda entry: entry[1] * DTYPE_BITS[entry[0]] % 8 == 0
)


@given(st.lists(WHOLE_BYTES, min_size=1, max_size=20), st.integers(1, 100))
@settings(deadline=None, max_examples=100)
def test_every_tensor_is_placed_once_without_gaps_and_aligned(entries: list[tuple[str, int]], limit_bytes: int) -> None:
    tensors = [planned(f"t{position}", dtype, count) for position, (dtype, count) in enumerate(entries)]
    shards, _ = lay_out(tensors, {}, limit_bytes=limit_bytes)
    for shard in shards:
        assert len(shard.header) % 8 == 0
        assert len(shard.tensors) == 1 or shard.data_bytes <= limit_bytes
        expected = 0
        for tensor, begin, end in shard.spans():
            assert begin == expected
            assert begin % max(1, DTYPE_BITS[tensor.info.dtype] // 8) == 0
            expected = end
        assert shard.data_bytes == expected
    found = sorted((tensor.name, *tensor.info[:2], tensor.info.nbytes) for shard in shards for tensor in shard.tensors)
    assert found == sorted((tensor.name, *tensor.info[:2], tensor.info.nbytes) for tensor in tensors)


def test_tensors_of_one_dtype_keep_their_order_within_a_file() -> None:
    tensors = [planned("a", "U8", 3), planned("b", "F32", 1), planned("c", "U8", 2)]
    ((shard,), _) = lay_out(tensors, {}, limit_bytes=99)
    assert [(tensor.name, begin, end) for tensor, begin, end in shard.spans()] == [
        ("b", 0, 4),
        ("a", 4, 7),
        ("c", 7, 9),
    ]


@pytest.mark.parametrize("size", ["300", "1KB", "2KiB", "5GB"])
@pytest.mark.parametrize("alpha", [0, 0.5])
def test_planned_files_are_as_long_as_written_ones(tmp_path: Path, size: str, alpha: float) -> None:
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"))
    plan = plan_of(tmp_path, alpha=alpha, max_shard_size=size)
    with plan.pair.open() as readers:
        for shard in plan.shards:
            whole = b"".join(shard_chunks(plan, shard, HybridReader(readers)))
            source = (tmp_path / "post" / shard.name).read_bytes() if shard.kept else shard.header
            assert whole[: shard.data_start] == source[: shard.data_start]
            assert len(whole) == shard.file_bytes
    assert plan.output_bytes == sum(shard.file_bytes for shard in plan.shards) + sum(
        file.file_bytes for file in plan.files
    )
