"""Headers of GGUF files: what the gguf package reads is read alike, and whatever is wrong is refused."""

import struct
from pathlib import Path

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from slrmerge.checkpoint import gguf_header
from slrmerge.checkpoint.files import LocalFile
from slrmerge.checkpoint.gguf_header import BLOCK_SIZES, GgufShard, LongArray, read_gguf
from slrmerge.errors import MAX_PROBLEMS, CheckpointError, Problem
from tests.gguf_files import ARCHITECTURE, raw_gguf, raw_tensor, raw_value, text, write_gguf

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


def read(path: Path) -> GgufShard:
    return read_gguf(LocalFile.at(path))


def refusal(tmp_path: Path, content: bytes, *codes: str) -> list[Problem]:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "x.gguf")
    assert [problem.code for problem in caught.value.problems] == list(codes)
    return list(caught.value.problems)


def test_all_types_have_the_sizes_of_the_gguf_package() -> None:
    sizes = {kind.name: GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType if kind.name != "Q8_1"}
    assert sizes == BLOCK_SIZES
    assert {number: GGMLQuantizationType(number).name for number in gguf_header._TYPES} == gguf_header._TYPES


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "MXFP4"])
def test_tensors_are_those_that_the_gguf_package_reads(tmp_path: Path, kind: str) -> None:
    shard = read(write_gguf(tmp_path / "m.gguf", 1, kind))
    reader = GGUFReader(tmp_path / "m.gguf")
    expected = {
        tensor.name: (tensor.tensor_type.name, tuple(reversed(tensor.shape)), tensor.n_bytes, tensor.data_offset)
        for tensor in reader.tensors
    }
    assert {
        name: (info.dtype, info.shape, info.nbytes, shard.data_start + info.begin)
        for name, info in shard.tensors.items()
    } == expected
    assert {info.dtype for info in shard.tensors.values()} == {"F32", kind}


def test_key_values_are_those_that_the_gguf_package_reads(tmp_path: Path) -> None:
    values = {
        "a.bool": True,
        "a.int": 7,
        "a.float": 0.5,
        "a.text": "é\n",
        "a.floats": [0.5, 1.5],
        "a.flags": [True, False],
    }
    shard = read(write_gguf(tmp_path / "m.gguf", 1, values={**values, "a.tokens": ["a", "", "é"]}))
    tokens = shard.key_values["a.tokens"]
    assert isinstance(tokens, LongArray)
    assert tokens.length == 3
    expected = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    assert {key: shard.key_values[key] for key in values} == expected
    assert shard.key_values["general.architecture"] == "llama"


def test_long_arrays_are_compared_by_digest(tmp_path: Path) -> None:
    arrays = [["a"] * 2000, ["a"] * 1999 + ["b"], [1] * 2000, [1] * 1999 + [2]]
    found = [
        read(write_gguf(tmp_path / f"{number}.gguf", 1, values={"a": array})).key_values["a"]
        for number, array in enumerate(arrays)
    ]
    assert len(set(found)) == 4
    assert all(isinstance(array, LongArray) and array.length == 2000 for array in found)


def test_a_header_longer_than_one_read_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf", 1, values={"a": [f"token{number}" for number in range(500)]})
    expected = read(path)
    monkeypatch.setattr(gguf_header, "_READ_BYTES", 7)
    assert read(path) == expected


def test_the_digest_covers_everything_before_the_data(tmp_path: Path) -> None:
    first, second = (read(write_gguf(tmp_path / f"{n}.gguf", n, values={"a": "x"})) for n in (1, 2))
    assert first.header_digest == second.header_digest
    other = read(write_gguf(tmp_path / "3.gguf", 1, values={"a": "y"}))
    assert other.header_digest != first.header_digest


def test_another_alignment_is_followed(tmp_path: Path) -> None:
    values = [ARCHITECTURE, raw_value("general.alignment", 4, struct.pack("<I", 64))]
    tensors = [raw_tensor("a", [8]), raw_tensor("b", [8], begin=64)]
    (tmp_path / "m.gguf").write_bytes(raw_gguf(values, tensors, bytes(128), alignment=64))
    shard = read(tmp_path / "m.gguf")
    assert shard.data_start % 64 == 0
    assert [info.begin for info in shard.tensors.values()] == [0, 64]


def test_version_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(raw_gguf(tensors=[raw_tensor("a", [2, 3])], data=bytes(24), version=2))
    assert read(tmp_path / "m.gguf").tensors["a"].shape == (3, 2)


def test_a_file_without_padding_at_its_end_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(raw_gguf(tensors=[raw_tensor("a", [3])], data=bytes(12)))
    assert read(tmp_path / "m.gguf").tensors["a"].nbytes == 12


@pytest.mark.parametrize("content", [b"", b"GGU", b"version https://git-lfs.github.com/spec/v1", b"<!doctype html>"])
def test_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    refusal(tmp_path, content, "not-gguf")


def test_a_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    (problem,) = refusal(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid x", "not-gguf")
    assert "git lfs pull" in problem.remedy


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24, 2 << 24])
def test_other_versions_and_big_endian_files_are_refused(tmp_path: Path, version: int) -> None:
    (problem,) = refusal(tmp_path, raw_gguf(version=version), "gguf-version")
    assert ("big-endian" in problem.what) == (version >= 1 << 16)


def test_a_file_cut_anywhere_in_its_header_is_refused(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "m.gguf", 1, values={"a": ["x", "y"], "b": [1, 2], "c": "text"}).read_bytes()
    data_start = read(tmp_path / "m.gguf").data_start
    for length in range(8, data_start, 3):
        refusal(tmp_path, content[:length], "truncated")


def test_a_file_cut_in_its_data_is_refused(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "m.gguf", 1, "F32").read_bytes()
    (problem,) = refusal(tmp_path, content[:-40], "truncated")
    assert "40 of" in problem.what


@pytest.mark.parametrize("counts", [(2**63, 1), (1, 2**63), (2**64 - 1, 2**64 - 1), (10**9, 0)])
def test_counts_that_cannot_be_are_refused_at_once(tmp_path: Path, counts: tuple[int, int]) -> None:
    refusal(tmp_path, raw_gguf(counts=counts), "truncated")


@pytest.mark.parametrize(
    "value",
    [
        raw_value("a", 8, U64.pack(2**63)),
        raw_value("a", 9, struct.pack("<IQ", 8, 2**63)),
        raw_value("a", 9, struct.pack("<IQ", 8, 3) + text("a") + U64.pack(2**64 - 1)),
        raw_value("a", 9, struct.pack("<IQ", 4, 2**62)),
        U64.pack(2**62) + b"a",
    ],
    ids=["text", "array of texts", "text in an array", "array of numbers", "key"],
)
def test_lengths_past_the_end_are_refused(tmp_path: Path, value: bytes) -> None:
    refusal(tmp_path, raw_gguf([ARCHITECTURE, value]), "truncated")


def test_a_header_longer_than_any_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf", 1, values={"a": ["token"] * 500})
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1000)
    refusal(tmp_path, path.read_bytes(), "invalid-header")


@pytest.mark.parametrize(
    "values",
    [
        [ARCHITECTURE, ARCHITECTURE],
        [raw_value("a", 13, b"")],
        [raw_value("a", 9, struct.pack("<IQ", 9, 1))],
        [raw_value("a", 9, struct.pack("<IQ", 13, 1))],
        [text(b"\xff") + struct.pack("<IB", 0, 0)],
        *[[raw_value("general.alignment", 4, struct.pack("<I", number))] for number in (0, 1, 4, 24, 31)],
        [raw_value("general.alignment", 8, text("32"))],
        [raw_value("general.alignment", 9, struct.pack("<IQI", 4, 1, 32))],
        [raw_value("general.alignment", 7, b"\1")],
    ],
    ids=[
        "twice", "type", "nested", "type in array", "key", "0", "1", "4", "24", "31", "text", "list", "bool",
    ],
)  # fmt: skip
def test_key_values_that_cannot_be_are_refused(tmp_path: Path, values: list[bytes]) -> None:
    refusal(tmp_path, raw_gguf(values), "invalid-header")


@pytest.mark.parametrize(
    "tensors",
    [
        [raw_tensor("a", [8], 5)],
        [raw_tensor("a", [8], 31)],
        [raw_tensor("a", [8], 77)],
        [raw_tensor("a", [8, 1, 1, 1, 1])],
        [raw_tensor("a", [2**62, 2**62])],
        [raw_tensor("a", [2**64 - 1])],
        [raw_tensor("a", [2**63, 0])],
        [raw_tensor("a", [40], 8)],
        [raw_tensor("a", [128], 12)],
        [raw_tensor("a", [8], begin=8)],
        [raw_tensor("a", [8], begin=32)],
        [raw_tensor("a", [8]), raw_tensor("b", [8])],
        [raw_tensor("a", [8]), raw_tensor("a", [8], begin=32)],
        [raw_tensor("a", [8]), raw_tensor("b", [8], begin=96)],
        [raw_tensor("", [8])],
        [raw_tensor("a\n", [8])],
        [raw_tensor(b"\xff", [8])],
        [raw_tensor("a", [2])],
    ],
    ids=[
        "removed type", "removed repacked type", "unknown type", "dimensions", "elements", "size", "size beside zero",
        "blocks", "k-quant blocks", "alignment", "hole at the start", "overlap", "twice", "hole", "no name",
        "unprintable", "not UTF-8", "bytes after",
    ],
)  # fmt: skip
def test_tensors_that_cannot_be_are_refused(tmp_path: Path, tensors: list[bytes]) -> None:
    refusal(tmp_path, raw_gguf(tensors=tensors, data=bytes(128)), "invalid-header")


def test_everything_wrong_with_the_tensors_is_reported_at_once(tmp_path: Path) -> None:
    tensors = [raw_tensor("a", [8], 77), raw_tensor("b", [40], 8), raw_tensor("c\n", [8])]
    refusal(tmp_path, raw_gguf(tensors=tensors, data=bytes(128)), *["invalid-header"] * 3)


def test_of_many_wrong_tensors_the_first_are_reported(tmp_path: Path) -> None:
    tensors = [raw_tensor(str(number), [8], 77) for number in range(2 * MAX_PROBLEMS)]
    codes = ["invalid-header"] * MAX_PROBLEMS + ["more-problems"]
    refusal(tmp_path, raw_gguf(tensors=tensors, data=bytes(128)), *codes)


@pytest.mark.parametrize("values", [True, False])
def test_more_entries_than_a_model_has_are_refused(
    tmp_path: Path, values: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_header, "_MAX_ENTRIES", 3)
    many = [str(number) for number in range(4)]
    if values:
        content = raw_gguf([raw_value(name, 4, U32.pack(1)) for name in many])
    else:
        content = raw_gguf(
            tensors=[raw_tensor(name, [8], begin=32 * k) for k, name in enumerate(many)], data=bytes(128)
        )
    refusal(tmp_path, content, "invalid-header")
