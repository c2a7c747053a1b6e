"""One safetensors file: malformed headers are refused, and written headers read back."""

import errno
import io
import json
import os
import pickle
import random
import sys
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint.files import LocalFile
from slrmerge.checkpoint.header import (
    DTYPE_BITS,
    FLOATING,
    MAX_HEADER_BYTES,
    Shard,
    TensorInfo,
    header_bytes,
    read_shard,
)
from slrmerge.errors import MAX_PROBLEMS, CheckpointError, Problem
from tests.checkpoints import random_tensor as tensor
from tests.checkpoints import raw_file, safetensors_bytes
from tests.problems import refused

OK = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
TWO = safetensors_bytes({"a": tensor("U8", (3,), "a"), "b": tensor("BF16", (2, 2), "b")}, {"format": "pt"})


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, written anew by every example of a property."""
    return tmp_path_factory.mktemp("header") / "model.safetensors"


def shard_of(path: Path, content: bytes) -> Shard:
    path.write_bytes(content)
    return read_shard(LocalFile.at(path))


def refusal(path: Path, content: bytes | None = None, *, code: str = "invalid-header") -> tuple[Problem, ...]:
    """The problems with the file at `path`, all with this code."""
    if content is not None:
        path.write_bytes(content)
    with refused(CheckpointError, code) as caught:
        read_shard(LocalFile.at(path))
    assert all(problem.where == str(path) for problem in caught.value.problems)
    return caught.value.problems


def library_reads(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor's dtype, shape and data as the safetensors library sees them."""
    found = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    return {name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in found}


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2), name: str = "a", **more: Any) -> str:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}})


@pytest.mark.parametrize(
    "header",
    [
        f'{{"a":{OK},"a":{OK}}}',
        f'{{"a":{OK},"\\u0061":{OK}}}',
        f'{{"__metadata__":{{}},"a":{OK},"__metadata__":{{}}}}',
        '{"__metadata__":{"k":"v","k":"w"}}',
        '{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[-Infinity,2]}}',
        '{"a": 1}{}',
        "",
        "[]",
        " {}",
        OK,
        "\ufeff{}",
        b'{"\xff":{}}',
        b'{"\xed\xa0\x80":{}}',
    ],
)
def test_a_header_that_is_not_valid_json_is_refused(tmp_path: Path, header: str | bytes) -> None:
    refusal(tmp_path / "x.safetensors", raw_file(header, b"ab"))


@pytest.mark.parametrize("opening", ["[", '{"k":'])
def test_a_deeply_nested_header_is_refused(tmp_path: Path, opening: str) -> None:
    refusal(tmp_path / "x.safetensors", raw_file('{"a":' + opening * 200_000))


def test_nesting_just_below_the_recursion_limit_is_refused(scratch: Path) -> None:
    limit = sys.getrecursionlimit()
    for depth in range(limit - 150, limit, 3):  # the parser succeeds, describing the problem must too
        refusal(scratch, raw_file('{"a":{"dtype":' + "[" * depth + "]" * depth + ',"shape":[]}}'))


@pytest.mark.parametrize(
    "header",
    [
        '{"a": 1}',
        '{"a": null}',
        entry(shapes=[2]),
        entry(offset=0),
        entry(q=0),
        '{"a":{"shape":[2],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":[2]}}',
        entry("u8"),
        entry("F8"),
        entry(None),
        entry(["U8"]),
        entry(shape=2),
        entry(shape=[-2]),
        entry(shape=[True, 2]),
        entry(shape=[2.0]),
        entry(shape=["2"]),
        entry(shape={"0": 2}),
        f'{{"a":{{"b":{OK}}}}}',
        f'{{"a":{{"dtype":"U8","shape":{OK},"data_offsets":[0,2]}}}}',
        entry(offsets=None),
        entry(offsets=[2]),
        entry(offsets=[0, 1, 2]),
        entry(offsets=[-2, 0]),
        entry(offsets=[2, 0]),
        entry(offsets=[False, 2]),
        entry(offsets=[0, 2.0]),
        entry(shape=[0, 2**63, 2**63], offsets=[0, 0]),
        entry(shape=[2**32, 2**32], offsets=[0, 0]),
        entry(shape=[3]),
        entry("BF16"),
        entry("F64", shape=[], offsets=[0, 0]),
        entry(shape=[0]),
        entry("F4", shape=[3]),
        entry("F6_E2M3", shape=[3]),
        entry("BF16", shape=[128256, 4096], offsets=[0, 1_050_673_150]),
    ],
)
def test_an_invalid_entry_is_refused(tmp_path: Path, header: str) -> None:
    (problem,) = refusal(tmp_path / "x.safetensors", raw_file(header, b"ab"))
    assert problem.what.startswith("tensor 'a'")


@pytest.mark.timeout(5)
def test_a_shape_of_thousands_of_dimensions_is_refused_at_once_and_briefly(tmp_path: Path) -> None:
    (problem,) = refusal(tmp_path / "x.safetensors", raw_file(entry(shape=[2**62] * 40_000, offsets=[0, 0])))
    assert len(str(problem)) < 10_000


def test_of_many_problems_the_first_are_reported(tmp_path: Path) -> None:
    path, header = tmp_path / "x.safetensors", {str(number): number for number in range(2 * MAX_PROBLEMS)}
    path.write_bytes(raw_file(json.dumps(header)))
    with refused(CheckpointError, *["invalid-header"] * MAX_PROBLEMS, "more-problems"):
        read_shard(LocalFile.at(path))


@pytest.mark.parametrize(
    "name", ["", "a\0b", "a\nb", "a\x1b[31m", "a\u202eb", "\ud800", "../a", "a/../../b", "..\\a", "a" * 1001]
)
def test_an_unsafe_tensor_name_is_refused(tmp_path: Path, name: str) -> None:
    (problem,) = refusal(tmp_path / "x.safetensors", raw_file(entry(name=name), b"ab"))
    assert str(problem).isprintable()


@pytest.mark.parametrize("metadata", ["[]", '"pt"', "1", "false", '{"format": 1}', '{"a": null}', '{"a": {}}', OK])
def test_metadata_that_does_not_map_strings_to_strings_is_refused(tmp_path: Path, metadata: str) -> None:
    content = raw_file(f'{{"__metadata__":{metadata},"a":{OK}}}', b"ab")
    refusal(tmp_path / "x.safetensors", content)


@pytest.mark.parametrize("metadata", ["null", "{}", '{"format": "pt"}', '{"": "\\u0000"}'])
def test_metadata_may_be_null_or_strings(tmp_path: Path, metadata: str) -> None:
    shard = shard_of(tmp_path / "x.safetensors", raw_file(f'{{"__metadata__":{metadata},"a":{OK}}}', b"ab"))
    assert shard.tensors == {"a": TensorInfo("U8", (2,), 2, 0)}


def test_all_invalid_entries_are_reported_at_once(tmp_path: Path) -> None:
    header = '{"__metadata__":7,"a":{},"b":' + OK + ',"":' + OK + "}"
    assert len(refusal(tmp_path / "x.safetensors", raw_file(header, b"ab"))) == 3


@pytest.mark.parametrize(
    ("spans", "data", "code"),
    [
        ([(1, 2)], 2, "invalid-header"),
        ([(0, 2), (3, 5)], 5, "invalid-header"),
        ([(3, 5), (0, 2)], 5, "invalid-header"),
        ([(0, 2), (1, 3)], 3, "invalid-header"),
        ([(0, 2), (0, 2)], 2, "invalid-header"),
        ([(0, 4), (2, 2)], 4, "invalid-header"),
        ([(2**40, 2**40)], 2, "invalid-header"),
        ([(0, 2), (2, 5)], 6, "invalid-header"),
        ([], 1, "invalid-header"),
        ([(0, 0)], 4000, "invalid-header"),
        ([(0, 2), (2, 5)], 4, "truncated"),
        ([(0, 2000)], 0, "truncated"),
    ],
)
def test_data_with_holes_overlaps_or_a_wrong_end_is_refused(
    tmp_path: Path, spans: list[tuple[int, int]], data: int, code: str
) -> None:
    entries = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in zip("ab", spans, strict=False)
    }
    content = raw_file(json.dumps(entries), bytes(data))
    assert len(refusal(tmp_path / "x.safetensors", content, code=code)) == 1


def test_a_file_truncated_anywhere_is_refused(scratch: Path) -> None:
    assert list(shard_of(scratch, TWO).tensors) == ["a", "b"]
    for length in range(len(TWO)):
        refusal(scratch, TWO[:length], code="truncated")


@pytest.mark.parametrize("header_length", [1, 9, 2**32, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(tmp_path: Path, header_length: int) -> None:
    content = header_length.to_bytes(8, "little") + b"{}      "[: header_length - 1]
    refusal(tmp_path / "x.safetensors", content, code="truncated")


def test_a_header_past_the_hubs_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(path, MAX_HEADER_BYTES + 9)  # sparse
    refusal(path)


def test_headers_of_every_length_are_read(scratch: Path) -> None:
    info = TensorInfo("U8", (1,), 1, 0)
    shortest = len(header_bytes([("", info)]))
    for extra in [*range(0, 1200, 8), 2**16, 2**16 + 640 - shortest + 8]:
        header = header_bytes([("a", info)], {"n": "n" * extra})
        assert shard_of(scratch, header + b"x").tensors == {"a": info}, f"header of {len(header) - 8} bytes"


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return stream.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 4976698672\n"


@pytest.mark.parametrize(
    "content",
    [
        LFS,
        b"<!DOCTYPE html>\n<html>",
        b"<html><body>404",
        _zip(),
        pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2),  # torch.save's first record before 1.6
        b"GGUF\x03\0\0\0" + bytes(40),
    ],
    ids=["git lfs", "doctype", "html", "zip", "pickle", "gguf"],
)
def test_a_file_in_another_format_is_recognized(tmp_path: Path, content: bytes) -> None:
    (problem,) = refusal(tmp_path / "x.safetensors", content, code="not-safetensors")
    assert problem.remedy


@pytest.mark.skipif("not hasattr(os, 'preadv')")
@pytest.mark.parametrize("reads", [0, 1], ids=["length", "header"])
def test_a_read_error_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int) -> None:
    whole, left = os.preadv, iter(range(reads))

    def failing(fd: int, buffers: Any, position: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(fd, buffers, position)

    monkeypatch.setattr(os, "preadv", failing)
    refusal(tmp_path / "x.safetensors", TWO, code="unreadable")


@pytest.mark.parametrize("dtype", DTYPE_BITS)
@pytest.mark.parametrize("shape", [(8,), (2, 4), (4, 0, 3), (8, 1, 1, 1, 1)])
def test_every_dtype_is_read(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    size = prod(shape) * DTYPE_BITS[dtype] // 8
    content = header_bytes([("a", TensorInfo(dtype, shape, size, 0))]) + bytes(size)
    shard = shard_of(tmp_path / "x.safetensors", content)
    assert shard.tensors == {"a": TensorInfo(dtype, shape, size, 0)}
    assert shard.tensors["a"].nbytes == size
    assert library_reads(content) == {"a": (dtype, shape, bytes(size))}


def test_only_real_floating_dtypes_of_16_bits_and_more_can_be_blended() -> None:
    assert {dtype for dtype, bits in DTYPE_BITS.items() if dtype.lstrip("B")[0] == "F" and bits >= 16} == FLOATING


def test_a_scalar_has_one_element(tmp_path: Path) -> None:
    content = raw_file(entry("F32", shape=[], offsets=[0, 4]), b"abcd")
    assert shard_of(tmp_path / "x.safetensors", content).tensors == {"a": TensorInfo("F32", (), 4, 0)}


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    assert shard_of(tmp_path / "x.safetensors", raw_file("{}")).tensors == {}


def test_a_shard_has_the_start_of_its_data_and_a_digest_of_its_header(tmp_path: Path) -> None:
    first = shard_of(tmp_path / "a.safetensors", TWO)
    assert TWO[first.data_start :] == tensor("U8", (3,), "a").data + tensor("BF16", (2, 2), "b").data
    assert first.file.file_bytes == len(TWO)
    assert str(first.file) == str(tmp_path / "a.safetensors")
    other_data = shard_of(tmp_path / "b.safetensors", TWO[:-1] + b"\0")
    other_header = shard_of(tmp_path / "c.safetensors", TWO.replace(b'"b"', b'"c"'))
    assert other_data.header_digest == first.header_digest != other_header.header_digest


def test_a_written_header_is_padded_and_carries_the_format(tmp_path: Path) -> None:
    assert header_bytes([("ä", TensorInfo("F4", (2, 1), 1, 0))]) == (
        (88).to_bytes(8, "little")
        + '{"__metadata__":{"format":"pt"},"ä":{"dtype":"F4","shape":[2,1],"data_offsets":[0,1]}}'.encode()
        + b" "
    )


def _is_writable(name: str) -> bool:
    return name.isprintable() and "../" not in name and name != "__metadata__"


names = st.text(st.characters(categories=["L", "N", "S"], include_characters="._/- "), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
kinds = st.tuples(st.sampled_from(list(DTYPE_BITS)), shapes).filter(
    lambda kind: prod(kind[1]) * DTYPE_BITS[kind[0]] % 8 == 0
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names.filter(_is_writable), kinds, max_size=5))
def test_whatever_header_is_written_reads_back_and_satisfies_the_safetensors_library(
    scratch: Path, wanted: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name, (dtype, shape) in wanted.items():
        begin, end = end, end + prod(shape) * DTYPE_BITS[dtype] // 8
        tensors[name] = TensorInfo(dtype, shape, end - begin, begin)
    header = header_bytes(tensors.items())
    assert len(header) % 8 == 0
    content = header + random.Random(end).randbytes(end)
    shard = shard_of(scratch, content)
    assert list(shard.tensors.items()) == list(tensors.items())
    assert library_reads(content) == {
        name: (info.dtype, info.shape, content[len(header) :][slice(info.begin, info.end)])
        for name, info in shard.tensors.items()
    }
    with safetensors.safe_open(scratch, framework="numpy") as handle:
        assert set(handle.keys()) == set(tensors)


def check_against_the_library(path: Path, content: bytes) -> None:
    """Refused properly, or accepted by the library and with the same names."""
    try:
        shard = shard_of(path, content)
    except CheckpointError:
        return
    assert library_reads(content).keys() == shard.tensors.keys()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, len(TWO) - 12), st.binary(min_size=1, max_size=3)), min_size=1, max_size=4))
def test_random_damage_to_a_header_is_refused_or_harmless(scratch: Path, damage: list[tuple[int, bytes]]) -> None:
    content = bytearray(TWO)
    for position, replacement in damage:
        content[position : position + len(replacement)] = replacement
    check_against_the_library(scratch, bytes(content))


WEIRD: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    2**63,
    2**64,
    10**400,
    0.0,
    2.0,
    1e999,
    "",
    "U8",
    "F4",
    "\ud800",
    "\0",
    [],
    {},
]


def test_random_headers_are_refused_or_valid(scratch: Path) -> None:
    rng = random.Random(0)

    def weird(depth: int = 0) -> Any:
        kind = rng.random() if depth < 3 else 1
        if kind < 0.2:
            return [weird(depth + 1) for _ in range(rng.randrange(4))]
        if kind < 0.3:
            return {str(rng.choice(WEIRD)): weird(depth + 1) for _ in range(rng.randrange(3))}
        return rng.choice(WEIRD)

    for _ in range(500):  # mostly valid, each with a few weird values
        header: dict[str, Any] = {}
        end = 0
        for name in rng.sample(["a", "b", "é", "\n", "__metadata__"], rng.randrange(1, 3)):
            begin, end = end, end + rng.randrange(4)
            header[name] = {"dtype": rng.choice(["U8", "I8"]), "shape": [end - begin], "data_offsets": [begin, end]}
            if rng.random() < 0.3:
                header[name][rng.choice(["dtype", "shape", "data_offsets", "x"])] = weird()
            if name == "__metadata__" or rng.random() < 0.05:
                header[name] = weird()
        check_against_the_library(scratch, raw_file(json.dumps(header), bytes(end)))
