"""One safetensors file: every way its header can lie is refused by name, and what we write reads back."""

import errno
import io
import json
import os
import pickle
import random
import sys
import zipfile
from collections.abc import Callable
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint import DTYPE_BITS, FLOATING, Shard, TensorInfo, header_bytes, read_shard
from slrmerge.checkpoint.header import MAX_HEADER_BYTES
from slrmerge.errors import CheckpointError
from tests.checkpoint import locked
from tests.checkpoints import random_tensor as tensor
from tests.checkpoints import raw_file, safetensors_bytes

OK = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
TWO = safetensors_bytes({"a": tensor("U8", (3,), "a"), "b": tensor("BF16", (2, 2), "b")}, {"format": "pt"})


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, written anew by every example of a property."""
    return tmp_path_factory.mktemp("header") / "model.safetensors"


def shard_of(path: Path, content: bytes) -> Shard:
    path.write_bytes(content)
    return read_shard(path)


def refusal(path: Path, content: bytes | None = None) -> str:
    """What is said of the file at `path`, which stands as FILE."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_shard(path)
    assert all(problem.where == str(path) for problem in error.value.problems)
    return str(error.value).replace(str(path), "FILE")


def library_reads(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor's dtype, shape and data as the safetensors library sees them."""
    found = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    return {name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in found}


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2), name: str = "a", **more: Any) -> str:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}})


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (f'{{"a":{OK},"a":{OK}}}', "the key 'a' stands twice"),
        (f'{{"a":{OK},"\\u0061":{OK}}}', "the key 'a' stands twice"),
        (f'{{"__metadata__":{{}},"a":{OK},"__metadata__":{{}}}}', "the key '__metadata__' stands twice"),
        ('{"__metadata__":{"k":"v","k":"w"}}', "the key 'k' stands twice"),
        ('{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}', "the key 'dtype' stands twice"),
        ('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', "NaN is not JSON"),
        ('{"a":{"dtype":"U8","shape":[2],"data_offsets":[-Infinity,2]}}', "-Infinity is not JSON"),
        ('{"a": 1}{}', "Extra data: line 1 column 9 (char 8)"),
        ("", "it does not start with '{'"),
        ("[]", "it does not start with '{'"),
        (" {}", "it does not start with '{'"),
        ("\ufeff{}", "it does not start with '{'"),
        (b'{"\xff":{}}', "'utf-8' codec can't decode byte 0xff in position 2: invalid start byte"),
        (b'{"\xed\xa0\x80":{}}', "'utf-8' codec can't decode byte 0xed in position 2: invalid continuation byte"),
    ],
)
def test_a_header_that_is_not_sound_json_is_refused(tmp_path: Path, header: str | bytes, what: str) -> None:
    said = refusal(tmp_path / "x.safetensors", raw_file(header, b"ab"))
    assert said == f"FILE: has a header that is not sound JSON ({what}); fetch it again"


@pytest.mark.parametrize("opening", ["[", '{"k":'])
def test_a_deeply_nested_header_is_refused(tmp_path: Path, opening: str) -> None:
    said = refusal(tmp_path / "x.safetensors", raw_file('{"a":' + opening * 200_000))
    assert said.startswith("FILE: has a header that is not sound JSON (maximum recursion depth exceeded")
    assert said.endswith("); fetch it again")


def test_nesting_just_within_the_parsers_reach_is_refused_as_well(scratch: Path) -> None:
    limit = sys.getrecursionlimit()
    for depth in range(limit - 150, limit, 3):  # where the parser still copes, naming the fault must cope too
        assert refusal(scratch, raw_file('{"a":{"dtype":' + "[" * depth + "]" * depth + ',"shape":[]}}'))


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ('{"a": 1}', "the entry is not an object"),
        ('{"a": null}', "the entry is not an object"),
        (entry(shapes=[2]), "unknown key 'shapes', did you mean shape?"),
        (entry(offset=0), "unknown key 'offset', did you mean data_offsets?"),
        (entry(q=0), "unknown key 'q', known: dtype, shape, data_offsets"),
        ('{"a":{"shape":[2],"data_offsets":[0,2]}}', "dtype is missing"),
        ('{"a":{"dtype":"U8","data_offsets":[0,2]}}', "shape is missing"),
        ('{"a":{"dtype":"U8","shape":[2]}}', "data_offsets is missing"),
        (entry("u8"), "unknown dtype 'u8'"),
        (entry("F8"), "unknown dtype 'F8'"),
        (entry(None), "unknown dtype None"),
        (entry(["U8"]), "unknown dtype ['U8']"),
        (entry(shape=2), "shape 2 is not a list of sizes"),
        (entry(shape=[-2]), "shape [-2] is not a list of sizes"),
        (entry(shape=[True, 2]), "shape [True, 2] is not a list of sizes"),
        (entry(shape=[2.0]), "shape [2.0] is not a list of sizes"),
        (entry(shape=["2"]), "shape ['2'] is not a list of sizes"),
        (entry(shape={"0": 2}), "shape {'0': 2} is not a list of sizes"),
        (entry(offsets=None), "data_offsets None are not [begin, end]"),
        (entry(offsets=[2]), "data_offsets [2] are not [begin, end]"),
        (entry(offsets=[0, 1, 2]), "data_offsets [0, 1, 2] are not [begin, end]"),
        (entry(offsets=[-2, 0]), "data_offsets [-2, 0] are not [begin, end]"),
        (entry(offsets=[2, 0]), "data_offsets [2, 0] are not [begin, end]"),
        (entry(offsets=[False, 2]), "data_offsets [False, 2] are not [begin, end]"),
        (entry(offsets=[0, 2.0]), "data_offsets [0, 2.0] are not [begin, end]"),
        (
            entry(shape=[0, 2**63, 2**63], offsets=[0, 0]),
            "shape [0, 9223372036854775808, 9223372036854775808] is past what 64 bits count",
        ),
        (
            entry(shape=[2**32, 2**32], offsets=[0, 0]),
            "shape [4294967296, 4294967296] is past what 64 bits count",
        ),
        (entry(shape=[3]), "U8 [3] takes 3 bytes, data_offsets give 2"),
        (entry("BF16"), "BF16 [2] takes 4 bytes, data_offsets give 2"),
        (entry("F64", shape=[], offsets=[0, 0]), "F64 [] takes 8 bytes, data_offsets give 0"),
        (entry(shape=[0]), "U8 [0] takes 0 bytes, data_offsets give 2"),
        (entry("F4", shape=[3]), "F4 [3] takes 1.5 bytes, data_offsets give 2"),
        (entry("F6_E2M3", shape=[3]), "F6_E2M3 [3] takes 2.25 bytes, data_offsets give 2"),
        (
            entry("BF16", shape=[128256, 4096], offsets=[0, 1_050_673_150]),
            "BF16 [128256, 4096] takes 1,050,673,152 bytes, data_offsets give 1,050,673,150",
        ),
    ],
)
def test_an_entry_that_lies_is_refused(tmp_path: Path, header: str, what: str) -> None:
    assert refusal(tmp_path / "x.safetensors", raw_file(header, b"ab")) == f"FILE: tensor 'a': {what}"


@pytest.mark.timeout(5)
def test_a_shape_of_thousands_of_dimensions_is_refused_at_once_and_briefly(tmp_path: Path) -> None:
    said = refusal(tmp_path / "x.safetensors", raw_file(entry(shape=[2**62] * 40_000, offsets=[0, 0])))
    assert len(said) < 10_000


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("", "tensor '': the name is empty"),
        ("a\0b", "tensor 'a\\x00b': the name has characters that do not print"),
        ("a\nb", "tensor 'a\\nb': the name has characters that do not print"),
        ("a\x1b[31m", "tensor 'a\\x1b[31m': the name has characters that do not print"),
        ("a\u202eb", "tensor 'a\\u202eb': the name has characters that do not print"),
        ("\ud800", "tensor '\\ud800': the name has characters that do not print"),
        ("../a", "tensor '../a': the name climbs out of a folder"),
        ("a/../../b", "tensor 'a/../../b': the name climbs out of a folder"),
        ("..\\a", "tensor '..\\\\a': the name climbs out of a folder"),
    ],
)
def test_a_name_that_a_reader_could_trip_over_is_refused(tmp_path: Path, name: str, what: str) -> None:
    assert refusal(tmp_path / "x.safetensors", raw_file(entry(name=name), b"ab")) == f"FILE: {what}"


@pytest.mark.parametrize("metadata", ["[]", '"pt"', "1", "false", '{"format": 1}', '{"a": null}', '{"a": {}}'])
def test_metadata_that_does_not_map_strings_to_strings_is_refused(tmp_path: Path, metadata: str) -> None:
    content = raw_file(f'{{"__metadata__":{metadata},"a":{OK}}}', b"ab")
    assert refusal(tmp_path / "x.safetensors", content) == "FILE: __metadata__ is not a map of strings to strings"


@pytest.mark.parametrize("metadata", ["null", "{}", '{"format": "pt"}', '{"": "\\u0000"}'])
def test_metadata_may_be_null_or_strings(tmp_path: Path, metadata: str) -> None:
    shard = shard_of(tmp_path / "x.safetensors", raw_file(f'{{"__metadata__":{metadata},"a":{OK}}}', b"ab"))
    assert shard.tensors == {"a": TensorInfo("U8", (2,), (0, 2))}


def test_all_faulty_entries_are_told_at_once(tmp_path: Path) -> None:
    header = '{"__metadata__":7,"a":{},"b":' + OK + ',"":' + OK + "}"
    assert refusal(tmp_path / "x.safetensors", raw_file(header, b"ab")) == (
        "FILE: __metadata__ is not a map of strings to strings\n"
        "FILE: tensor 'a': dtype is missing\n"
        "FILE: tensor '': the name is empty"
    )


@pytest.mark.parametrize(
    ("spans", "data", "what"),
    [
        ([(1, 2)], 2, "tensor 'a' begins at byte 1 of the data, 0 expected (hole or overlap)"),
        ([(0, 2), (3, 5)], 5, "tensor 'b' begins at byte 3 of the data, 2 expected (hole or overlap)"),
        ([(3, 5), (0, 2)], 5, "tensor 'a' begins at byte 3 of the data, 2 expected (hole or overlap)"),
        ([(0, 2), (1, 3)], 3, "tensor 'b' begins at byte 1 of the data, 2 expected (hole or overlap)"),
        ([(0, 2), (0, 2)], 2, "tensor 'b' begins at byte 0 of the data, 2 expected (hole or overlap)"),
        ([(0, 4), (2, 2)], 4, "tensor 'b' begins at byte 2 of the data, 4 expected (hole or overlap)"),
        ([(2**40, 2**40)], 2, "tensor 'a' begins at byte 1,099,511,627,776 of the data, 0 expected (hole or overlap)"),
        ([(0, 2), (2, 5)], 6, "has 1 bytes after its last tensor"),
        ([], 1, "has 1 bytes after its last tensor"),
        ([(0, 0)], 4000, "has 4,000 bytes after its last tensor"),
        ([(0, 2), (2, 5)], 4, "is cut short: 1 of 5 data bytes are missing"),
        ([(0, 2000)], 0, "is cut short: 2,000 of 2,000 data bytes are missing"),
    ],
)  # fmt: skip
def test_data_with_holes_overlaps_or_a_wrong_end_is_refused(
    tmp_path: Path, spans: list[tuple[int, int]], data: int, what: str
) -> None:
    entries = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in zip("ab", spans, strict=False)
    }
    content = raw_file(json.dumps(entries), bytes(data))
    assert refusal(tmp_path / "x.safetensors", content) == f"FILE: {what}; fetch it again"


def test_a_file_cut_short_anywhere_is_refused(scratch: Path) -> None:
    assert list(shard_of(scratch, TWO).tensors) == ["a", "b"]
    data_start = len(TWO) - 11
    for length in range(len(TWO)):
        fault = (
            f"is cut short at {length:,} bytes, inside its header"
            if length < data_start
            else f"is cut short: {len(TWO) - length} of 11 data bytes are missing"
        )
        assert refusal(scratch, TWO[:length]) == f"FILE: {fault}; fetch it again"


@pytest.mark.parametrize("header_length", [1, 9, 2**32, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(tmp_path: Path, header_length: int) -> None:
    said = refusal(tmp_path / "x.safetensors", header_length.to_bytes(8, "little") + b"{}      "[: header_length - 1])
    assert said == f"FILE: is cut short at {min(16, header_length + 7)} bytes, inside its header; fetch it again"


def test_a_header_past_the_hubs_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(path, MAX_HEADER_BYTES + 9)  # sparse
    assert refusal(path) == "FILE: has a header of 25,000,001 bytes; 25,000,000 is the most accepted"


def test_headers_of_every_length_are_read(scratch: Path) -> None:
    info = TensorInfo("U8", (1,), (0, 1))
    shortest = len(header_bytes([("", info)]))
    for extra in [*range(0, 1200, 8), 2**16, 2**16 + 640 - shortest + 8]:
        name = "n" * (extra + 4)
        header = header_bytes([(name, info)])
        assert shard_of(scratch, header + b"x").tensors == {name: info}, f"header of {len(header) - 8} bytes"


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return stream.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 4976698672\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (LFS, "is a Git LFS pointer, not the weights; fetch them with: git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "is an HTML page (a failed download?); download it again"),
        (b"<html><body>404", "is an HTML page (a failed download?); download it again"),
        (_zip(), "is a pickle archive (PyTorch's own format); convert it to safetensors first"),
        (
            pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2),  # torch.save's first record before 1.6
            "is a pickle (PyTorch's old format); convert it to safetensors first",
        ),
        (b"GGUF\x03\0\0\0" + bytes(40), "is a GGUF file; convert it to safetensors first"),
        (b"", "is cut short at 0 bytes, inside its header; fetch it again"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    assert refusal(tmp_path / "x.safetensors", content) == f"FILE: {what}"


def _symlink_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: None, "cannot be read (No such file or directory)"),
        (os.mkdir, "is not a regular file"),
        pytest.param(
            os.mkfifo, "is not a regular file", marks=[pytest.mark.timeout(10), pytest.mark.skipif("os.name == 'nt'")]
        ),
        (_symlink_to_itself, "cannot be read (Too many levels of symbolic links)"),
    ],
    ids=["missing", "folder", "fifo", "loop"],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, make: Callable[[Path], None], what: str) -> None:
    make(tmp_path / "model.safetensors")
    assert refusal(tmp_path / "model.safetensors") == f"FILE: {what}"


@pytest.mark.parametrize("reads", [0, 1], ids=["length", "header"])
def test_a_disk_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int) -> None:
    class FailingDisk(FileIO):
        """Gives what it is asked for `reads` times, and no more."""

        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal reads
            reads -= 1
            if reads < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(-1 if size is None else size) or b""

    monkeypatch.setattr("slrmerge.checkpoint.header.open_regular", FailingDisk)
    assert refusal(tmp_path / "x.safetensors", TWO) == "FILE: cannot be read (Input/output error)"


@pytest.mark.skipif("os.name == 'nt'")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(TWO)
    with locked(path):
        assert refusal(path) == "FILE: cannot be read (Permission denied)"


@pytest.mark.parametrize("dtype", DTYPE_BITS)
@pytest.mark.parametrize("shape", [(8,), (2, 4), (4, 0, 3), (8, 1, 1, 1, 1)])
def test_every_dtype_is_read(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    size = prod(shape) * DTYPE_BITS[dtype] // 8
    content = header_bytes([("a", TensorInfo(dtype, shape, (0, size)))]) + bytes(size)
    shard = shard_of(tmp_path / "x.safetensors", content)
    assert shard.tensors == {"a": TensorInfo(dtype, shape, (0, size))}
    assert shard.tensors["a"].nbytes == size
    assert library_reads(content) == {"a": (dtype, shape, bytes(size))}


def test_only_real_floating_dtypes_of_16_bits_and_more_can_be_blended() -> None:
    assert {dtype for dtype, bits in DTYPE_BITS.items() if dtype.lstrip("B")[0] == "F" and bits >= 16} == FLOATING


def test_a_scalar_has_one_element(tmp_path: Path) -> None:
    content = raw_file(entry("F32", shape=[], offsets=[0, 4]), b"abcd")
    assert shard_of(tmp_path / "x.safetensors", content).tensors == {"a": TensorInfo("F32", (), (0, 4))}


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    assert shard_of(tmp_path / "x.safetensors", raw_file("{}")).tensors == {}


def test_a_shard_knows_where_its_data_begins_and_what_its_header_was(tmp_path: Path) -> None:
    first = shard_of(tmp_path / "a.safetensors", TWO)
    assert TWO[first.data_start :] == tensor("U8", (3,), "a").data + tensor("BF16", (2, 2), "b").data
    assert first.identity.file_bytes == len(TWO)
    assert first.path == tmp_path / "a.safetensors"
    other_data = shard_of(tmp_path / "b.safetensors", TWO[:-1] + b"\0")
    other_header = shard_of(tmp_path / "c.safetensors", TWO.replace(b'"b"', b'"c"'))
    assert other_data.header_digest == first.header_digest != other_header.header_digest


def test_a_written_header_is_padded_and_carries_the_format(tmp_path: Path) -> None:
    assert header_bytes([("ä", TensorInfo("F4", (2, 1), (0, 1)))]) == (
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
        tensors[name] = TensorInfo(dtype, shape, (begin, end))
    header = header_bytes(tensors.items())
    assert len(header) % 8 == 0
    content = header + random.Random(end).randbytes(end)
    shard = shard_of(scratch, content)
    assert list(shard.tensors.items()) == list(tensors.items())
    assert library_reads(content) == {
        name: (info.dtype, info.shape, content[len(header) :][slice(*info.data_offsets)])
        for name, info in shard.tensors.items()
    }
    with safetensors.safe_open(scratch, framework="numpy") as handle:
        assert set(handle.keys()) == set(tensors)


def check_against_the_library(path: Path, content: bytes) -> None:
    """Refused properly, or taken by the library too and with the same names."""
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


def test_random_headers_are_refused_or_sound(scratch: Path) -> None:
    rng = random.Random(0)

    def weird(depth: int = 0) -> Any:
        kind = rng.random() if depth < 3 else 1
        if kind < 0.2:
            return [weird(depth + 1) for _ in range(rng.randrange(4))]
        if kind < 0.3:
            return {str(rng.choice(WEIRD)): weird(depth + 1) for _ in range(rng.randrange(3))}
        return rng.choice(WEIRD)

    for _ in range(500):  # mostly sound, each with a few weird values
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
