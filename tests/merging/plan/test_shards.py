"""Tensors are assigned to files as the ecosystem does, aligned, and files have the planned sizes."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint.header import DTYPE_BITS, TensorInfo
from slrmerge.merging.executor import execute
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.model import PlannedTensor
from slrmerge.merging.plan.shards import lay_out, split_by_size
from slrmerge.merging.stream import HybridReader
from tests.checkpoints import Tensor, llama_tensors, random_tensor, write_checkpoint
from tests.conftest import Pair
from tests.merging.plan import plan_of, write_pair
from tests.streams import shard_bytes, shard_chunks


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


# kept shards


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@given(
    st.lists(
        st.tuples(st.sampled_from(["BF16", "F32", "U8", "BOOL", "I64"]), st.integers(1, 12)), min_size=4, max_size=12
    ),
    st.integers(1, 3),
    st.sets(st.integers(0, 11)),
    st.sampled_from(["5GB", "100"]),
    st.integers(1, 7),
)
@settings(deadline=None, max_examples=25)
def test_the_safetensors_library_reads_the_same_tensors_from_kept_and_from_new_shards(
    entries: list[tuple[str, int]], shards: int, restored: set[int], size: str, stretch: int
) -> None:
    """Whatever the order of the dtypes, and however a file is divided into ranges."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        sides: dict[str, dict[str, Tensor]] = {
            side: {f"t{k}": random_tensor(dtype, (count,), f"{side}{k}") for k, (dtype, count) in enumerate(entries)}
            for side in ("pre", "post")
        }
        write_checkpoint(folder / "pre", sides["pre"], {})
        write_checkpoint(folder / "post", sides["post"], {}, shards=shards)
        alphas = {f"t{k}": 1.0 for k in restored if k < len(entries)} or {"t0": 1.0}
        plan = plan_of(folder, tensors=[{"match": name, "alpha": 1} for name in alphas], max_shard_size=size)
        expected = {name: sides["pre" if name in alphas else "post"][name] for name in sides["post"]}
        found: dict[str, bytes] = {}
        for shard, raw in zip(plan.shards, shard_bytes(plan, stretch=stretch), strict=True):
            for tensor, info in safetensors.deserialize(raw):
                found[tensor] = bytes(info["data"])
                assert (info["dtype"], tuple(info["shape"])) == expected[tensor][:2]
            if shard.is_unchanged:
                assert raw == shards_of(folder / "post")[shard.name]
        assert found == {name: tensor.data for name, tensor in expected.items()}
        assert bool(plan.resharded) is not all(shard.kept for shard in plan.shards)


@pytest.mark.parametrize(
    ("rules", "resharded"),
    [
        ({}, ""),
        ({"max_shard_size": "1KB"}, "max_shard_size"),
        ({"dtype": "bfloat16"}, ""),
        ({"dtype": "float32"}, "dtype"),
    ],
    ids=str,
)
def test_the_post_trained_shards_are_kept_where_they_fit(pair: Pair, rules: dict[str, Any], resharded: str) -> None:
    plan = pair.plan(restore=[4, 5], **rules)
    assert bool(plan.resharded) is bool(resharded)
    assert resharded in plan.resharded
    execute(plan, pair.out, options=MergeOptions(fsync=False))
    post, out = shards_of(pair.folder / "post"), shards_of(pair.out)
    if resharded:
        assert [shard.kept for shard in plan.shards] == [None] * len(plan.shards)
        return
    assert out.keys() == post.keys()
    assert [shard.is_unchanged for shard in plan.shards] == [out[name] == post[name] for name in sorted(post)]
    assert [shard.is_unchanged for shard in plan.shards] == [True, False]
    for shard in plan.shards:
        assert out[shard.name][: shard.data_start] == post[shard.name][: shard.data_start]


def test_shards_that_a_loader_would_misread_are_not_kept(pair: Pair) -> None:
    post = pair.folder / "post"
    first = "model-00001-of-00002.safetensors"
    (post / first).rename(post / "model.safetensors")
    index = post / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first, "model.safetensors"))
    plan = pair.plan(restore=[4, 5])
    assert "model.safetensors" in plan.resharded
    assert [(shard.name, shard.kept) for shard in plan.shards] == [("model.safetensors", None)]


def test_a_single_tensor_that_is_larger_than_a_shard_may_be_has_its_kept_shard(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"big": random_tensor("BF16", (500,), side)}, {})
    assert plan_of(tmp_path, alpha=1, max_shard_size="100").resharded == ""
