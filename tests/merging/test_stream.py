"""Streams of shards: any bits, in any chunks and ranges, of blends and of copies."""

from fractions import Fraction
from pathlib import Path
from random import Random

import pytest

from slrmerge.checkpoint.files import LocalFile
from slrmerge.errors import BlendError
from slrmerge.io.pieces import CHUNK_BYTES
from slrmerge.merging import stream
from slrmerge.merging.plan.model import PlannedFile, PlannedShard
from slrmerge.merging.stream import HybridReader, file_chunks
from tests.checkpoints import Tensor, random_tensor, write_checkpoint
from tests.conftest import Pair
from tests.merging.blends import FORMATS, blend_reference
from tests.merging.plan import plan_of
from tests.problems import refused
from tests.streams import shard_bytes, shard_chunks


def any_bytes(dtype: str, width: int, count: int, seed: str) -> Tensor:
    """Every bit pattern there is, NaN and infinities among them."""
    return Tensor(dtype, (count,), Random(seed).randbytes(count * width))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_any_bits_do_not_depend_on_the_chunks_they_are_computed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    for side in ("pre", "post"):
        tensors = {
            f"t{n}": any_bytes(*kind, side + str(n)) for n, kind in enumerate((("BF16", 2, 999), ("F32", 4, 301)))
        }
        write_checkpoint(tmp_path / side, tensors | {"none": Tensor("F32", (0, 3), b"")}, {})
    plan = plan_of(tmp_path, alpha=0.3, dtype="bfloat16")
    whole = shard_bytes(plan)
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", chunk)
    assert shard_bytes(plan) == whole


@pytest.mark.parametrize("stretch", [8, 7, 1000])
def test_any_bits_do_not_depend_on_the_ranges_that_are_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: int
) -> None:
    for side in ("pre", "post"):
        tensors = {"a": any_bytes("F32", 4, 999, side), "b": any_bytes("I32", 4, 9, side)}
        write_checkpoint(tmp_path / side, tensors | {"c": any_bytes("F32", 4, 50, side)}, {})
    plan = plan_of(tmp_path, alpha=0.7, dtype="bfloat16")
    alone = shard_bytes(plan)
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", 11)
    assert shard_bytes(plan, stretch=stretch) == alone


@pytest.mark.parametrize("stretch", [8, 4096])
def test_overflow_names_its_tensor_whatever_the_stretch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: int
) -> None:
    powers = [FORMATS["F32"].round(Fraction(10**k), negative=False) for k in range(38)]
    large = Tensor("F32", (38,), b"".join(bits.to_bytes(4, "little") for bits in powers))
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"norm.weight": large}, {})
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", 4)
    with refused(BlendError, "overflow") as caught:
        shard_bytes(plan_of(tmp_path, alpha=0.7, dtype="float16"), stretch=stretch)
    assert caught.value.problems[0].where == "norm.weight"


def header_of(shard: PlannedShard, pair: Pair) -> bytes:
    """A shard's own header, or that of the post-trained file where it is kept."""
    kept = (pair.folder / "post" / shard.name).read_bytes() if shard.kept else shard.header
    return kept[: shard.data_start]


def test_a_blended_shard_is_its_header_and_every_tensor_in_turn(pair: Pair) -> None:
    plan = pair.plan(alpha=0.25)
    for shard, raw in zip(plan.shards, shard_bytes(plan), strict=True):
        expected = header_of(shard, pair)
        for tensor in shard.tensors:
            sides = zip(*(memoryview(side[tensor.name].data).cast("H") for side in (pair.pre, pair.post)), strict=True)
            for one, two in sides:
                expected += blend_reference("BF16", 0.25, ("BF16", one), ("BF16", two)).to_bytes(2, "little")
        assert raw == expected


@pytest.mark.parametrize("size", ["5GB", "1KB"])
def test_copied_shards_are_their_headers_and_the_tensors_of_both_sides(pair: Pair, size: str) -> None:
    plan = pair.plan(restore=[[0, 1], [4, 4]], max_shard_size=size)
    restored = tuple(f"model.layers.{layer}." for layer in (0, 1, 4))
    for shard, raw in zip(plan.shards, shard_bytes(plan), strict=True):
        sides = [pair.pre if tensor.name.startswith(restored) else pair.post for tensor in shard.tensors]
        expected = [side[tensor.name].data for side, tensor in zip(sides, shard.tensors, strict=True)]
        assert raw == header_of(shard, pair) + b"".join(expected)


def test_copies_longer_than_a_chunk_come_in_chunks(tmp_path: Path) -> None:
    big = Tensor("U8", (2 * CHUNK_BYTES + 5,), Random(1).randbytes(2 * CHUNK_BYTES + 5))
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"big": big, "small": random_tensor("F32", (3,), side)}, {})
    for alpha in (0, 1):
        plan = plan_of(tmp_path, alpha=alpha)
        with plan.pair.open() as readers:
            chunks = list(shard_chunks(plan, plan.shards[0], HybridReader(readers)))
        assert max(map(len, chunks)) == CHUNK_BYTES
        small = random_tensor("F32", (3,), "pre" if alpha else "post").data
        assert b"".join(chunks)[plan.shards[0].data_start :] == big.data + small


def test_a_side_file_comes_whole_from_disk_or_from_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"x" * (CHUNK_BYTES + 1))
    copied = PlannedFile("t", LocalFile.at(path))
    assert (copied.file_bytes, [len(chunk) for chunk in file_chunks(copied)]) == (CHUNK_BYTES + 1, [CHUNK_BYTES, 1])
    assert list(file_chunks(PlannedFile("t", content=b"{}"))) == [b"{}"]
