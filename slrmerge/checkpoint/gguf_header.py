"""The headers of GGUF files: key-values, then the tensors' types, shapes and offsets, read strictly and without data.

The format: docs/gguf.md in ggml's repository. Arrays of key-values, such as vocabularies, are skipped over.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from struct import Struct
from typing import NamedTuple

import xxhash

from slrmerge.checkpoint.files import OpenFile, SourceFile
from slrmerge.checkpoint.header import LFS_POINTER, Shard, TensorInfo, in_data_order, lfs_pointer, name_problem
from slrmerge.errors import MAX_PROBLEMS, CheckpointError, Problem, raise_all
from slrmerge.io.sizes import shorten

BLOCK_SIZES = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8),
    "I8": (1, 1), "I16": (1, 2), "I32": (1, 4), "I64": (1, 8),
    "Q1_0": (128, 18), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36),
}  # fmt: skip
"""Elements and bytes per block of every tensor type that files have."""

QUANTIZED = frozenset(kind for kind, (elements, _) in BLOCK_SIZES.items() if elements > 1)

MAX_HEADER_BYTES = 200_000_000
"""Several times the header of any model: a vocabulary of 260,000 tokens with its merges has 15 MB."""

_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_REMOVED_TYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})

_U32, _U64 = Struct("<I"), Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {number: Struct(f"<{code}") for number, code in enumerate("BbHhIif?") if number != _BOOL} | {
    _BOOL: Struct("<B"), 10: _U64, 11: Struct("<q"), 12: Struct("<d")
}  # fmt: skip

_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 2**63
_MAX_ENTRIES = 300_000
_MAX_STRING_BYTES = 1 << 24
_LONGEST_LISTED = 1024
"""Numbers in an array that is read as a tuple: more than the layers of any model, fewer than a vocabulary."""
_READ_BYTES = 1 << 20


class LongArray(NamedTuple):
    """An array of strings, or of many numbers, by its length and its digest."""

    length: int
    digest: str


Value = str | int | float | bool | tuple[int | float | bool, ...] | LongArray


@dataclass(frozen=True, slots=True)
class GgufShard(Shard):
    """A GGUF file with a valid header, and its key-values."""

    key_values: Mapping[str, Value] = field(default_factory=dict)


def read_gguf(file: SourceFile) -> GgufShard:
    """Read and check the header of a GGUF file, and none of its data; shapes are row-major, as in safetensors.

    Raises CheckpointError: with every problem of the tensors, or with the first of what precedes them.
    """
    opened = file.open()
    try:
        return _read(file, _Bytes(file, opened))
    finally:
        opened.close()


def _read(file: SourceFile, source: "_Bytes") -> GgufShard:
    _require_version(file, source)
    tensor_count, value_count = source.number(_U64), source.number(_U64)
    if tensor_count * 25 + value_count * 13 > file.file_bytes:  # the least that an entry takes
        raise source.truncated()
    if max(tensor_count, value_count) > _MAX_ENTRIES:
        raise _invalid(file, f"lists {tensor_count:,} tensors and {value_count:,} values, more than any model has")
    values: dict[str, Value] = {}
    for _ in range(value_count):
        key = source.name("a key")
        if key in values:
            raise _invalid(file, f"has the key {shorten(key)} twice")
        values[key] = source.value(key)
    alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        what = f"has the alignment {shorten(alignment)}, which is not a power of two from 8 on"
        raise _invalid(file, what)
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for _ in range(tensor_count):
        name = source.name("a tensor's name")
        what = name_problem(name) or ("it is listed twice" if name in tensors else "")
        info = source.tensor(alignment)
        if what or isinstance(info, str):
            problems.append(Problem("invalid-header", str(file), f"tensor {shorten(name)}: {what or info}"))
            if len(problems) > MAX_PROBLEMS:
                break
        else:
            tensors[sys.intern(name)] = info
    raise_all(problems, CheckpointError)
    data_start = -(-source.position // alignment) * alignment
    if not tensors:  # a file of key-values alone need not be padded
        data_start = min(data_start, file.file_bytes)
    digest = xxhash.xxh3_128_hexdigest(source.upto(data_start))
    tensors = in_data_order(file, tensors, file.file_bytes - data_start, alignment)
    return GgufShard(file, data_start, digest, tensors, key_values=values)


def _require_version(file: SourceFile, source: "_Bytes") -> None:
    if file.file_bytes < 4 or source.upto(4) != b"GGUF":
        if file.file_bytes >= 24 and source.upto(24).startswith(LFS_POINTER):
            raise lfs_pointer(file, "not-gguf")
        raise CheckpointError(Problem("not-gguf", str(file), "is not a GGUF file"))
    source.position = 4
    version = source.number(_U32)
    if version in (2, 3):
        return
    if version and version & 0xFFFF == 0:
        what, remedy = "is big-endian; only little-endian files are supported", "convert it (gguf_convert_endian.py)"
    else:
        what, remedy = f"has version {version}; versions 2 and 3 are supported", "convert the original model again"
    raise CheckpointError(Problem("gguf-version", str(file), what, remedy))


class _Bytes:
    """The beginning of a file, read as far as needed; `position` is where the next value begins."""

    def __init__(self, file: SourceFile, opened: OpenFile) -> None:
        self.position = 0
        self._file, self._opened = file, opened
        self._buffer = bytearray()
        self._limit = min(file.file_bytes, MAX_HEADER_BYTES)

    def upto(self, stop: int) -> bytes:
        """All bytes before `stop`."""
        self._require(stop)
        return bytes(memoryview(self._buffer)[:stop])

    def number(self, kind: Struct) -> int:
        found: int = kind.unpack_from(*self._next(kind.size))[0]
        return found

    def string(self) -> bytes:
        length = self.number(_U64)
        if length > _MAX_STRING_BYTES:
            raise self.truncated() if length > self._limit else _invalid(self._file, f"has {length:,} bytes of text")
        buffer, start = self._next(length)
        return bytes(buffer[start : start + length])

    def name(self, what: str) -> str:
        raw = self.string()
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _invalid(self._file, f"has {what} that is not UTF-8 ({error})") from None

    def value(self, key: str) -> Value:
        """The value of a key-value."""
        kind = self.number(_U32)
        if kind == _STRING:
            return self.string().decode("utf-8", "replace")
        if kind in _SCALARS:
            return self._scalar(kind)
        if kind != _ARRAY:
            raise self._unknown_kind(key, kind)
        kind, count = self.number(_U32), self.number(_U64)
        if kind == _STRING:
            return self._skip_strings(count)
        if kind not in _SCALARS:
            raise self._unknown_kind(key, kind)
        if count <= _LONGEST_LISTED:
            return tuple(self._scalar(kind) for _ in range(count))
        buffer, start = self._next(count * _SCALARS[kind].size)
        return LongArray(count, xxhash.xxh3_128_hexdigest(memoryview(buffer)[start : self.position]))

    def tensor(self, alignment: int) -> TensorInfo | str:
        """The description of a tensor, or what is wrong with it."""
        dimensions = self.number(_U32)
        if dimensions > _MAX_DIMENSIONS:
            raise _invalid(self._file, f"has a tensor with {dimensions:,} dimensions; at most 4 are possible")
        shape = tuple(reversed([self.number(_U64) for _ in range(dimensions)]))
        number, begin = self.number(_U32), self.number(_U64)
        if number not in _TYPES:
            return f"type {number} was removed from GGUF" if number in _REMOVED_TYPES else f"unknown type {number}"
        kind = _TYPES[number]
        elements, (block, block_bytes) = prod(shape), BLOCK_SIZES[kind]
        if max(elements, *shape, 0) >= _MAX_ELEMENTS:
            return f"shape {list(shape)} has more elements than 64 bits can count"
        if (shape[-1] if shape else 1) % block:
            return f"{kind} needs rows of a multiple of {block} elements, its shape is {list(shape)}"
        if begin % alignment:
            return f"it begins at byte {begin:,}, which is not a multiple of the alignment, {alignment}"
        return TensorInfo(kind, shape, elements // block * block_bytes, begin)

    def truncated(self) -> CheckpointError:
        """The error where the header goes on past the end of the file, or past any header's."""
        if self._file.file_bytes > MAX_HEADER_BYTES:
            return _invalid(self._file, f"has a header of more than {MAX_HEADER_BYTES:,} bytes")
        what = f"is truncated at {self._file.file_bytes:,} bytes, inside its header"
        return CheckpointError(Problem("truncated", str(self._file), what, "download it again"))

    def _scalar(self, kind: int) -> int | float | bool:
        value: int | float = _SCALARS[kind].unpack_from(*self._next(_SCALARS[kind].size))[0]
        return bool(value) if kind == _BOOL else value

    def _skip_strings(self, count: int) -> LongArray:
        start = position = self.position
        buffer, unpack_from = self._buffer, _U64.unpack_from  # a loop over a vocabulary
        for _ in range(count):
            if position + 8 > len(buffer):
                self._require(position + 8)
            position += 8 + unpack_from(buffer, position)[0]
        self._require(position)
        self.position = position
        return LongArray(count, xxhash.xxh3_128_hexdigest(memoryview(buffer)[start:position]))

    def _next(self, count: int) -> tuple[bytearray, int]:
        """The buffer, and where the next `count` bytes begin in it."""
        start = self.position
        self._require(start + count)
        self.position = start + count
        return self._buffer, start

    def _require(self, stop: int) -> None:
        """Read at least as far as `stop`."""
        done = len(self._buffer)
        if stop <= done:
            return
        if stop > self._limit:
            raise self.truncated()
        stop = min(max(stop, done + _READ_BYTES), self._limit)
        more = bytearray(stop - done)
        self._opened.stream(done, stop).readinto(memoryview(more))
        self._buffer += more

    def _unknown_kind(self, key: str, kind: int) -> CheckpointError:
        what = "an array of arrays" if kind == _ARRAY else f"a value of unknown type {kind}"
        return _invalid(self._file, f"has {what} at {shorten(key)}")


def _invalid(file: SourceFile, what: str) -> CheckpointError:
    return CheckpointError(Problem("invalid-header", str(file), what, "download it again"))
