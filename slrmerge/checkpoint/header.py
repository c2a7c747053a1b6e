"""The headers of safetensors files: read strictly, and written.

The format: a u64 length, that many bytes of UTF-8 JSON, then the data without holes (safetensors, README "Format").
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from math import prod
from threading import Event
from typing import Any, NamedTuple

import xxhash

from slrmerge.checkpoint.files import SourceFile
from slrmerge.errors import MAX_PROBLEMS, CheckpointError, Problem, did_you_mean, raise_all
from slrmerge.io.sizes import shorten
from slrmerge.io.strict_json import InvalidJsonError, parse_json

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of every dtype in the format."""

TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The floating dtypes: safetensors' name → torch's, which is also a recipe's."""

SAFETENSORS_DTYPES = {name: dtype for dtype, name in TORCH_DTYPES.items()}
"""A recipe's dtypes → safetensors' names."""

FLOATING = frozenset(TORCH_DTYPES)
"""The dtypes that can be blended and cast: real, floating, and meaningful without a scale beside them."""

MAX_HEADER_BYTES = 100_000_000
"""The most that the format allows, which takes seconds and a gigabyte to parse."""

_ENTRY_KEYS = ("dtype", "shape", "data_offsets")
_ENTRY_KEY_SET = frozenset(_ENTRY_KEYS)
_MAX_NAME_LENGTH = 1000  # several times the longest of any model
_MAX_DIMENSIONS = 64  # as many as torch takes
_MAX_ELEMENTS = 2**63  # a tensor library counts elements and strides in 64 signed bits

_PICKLE = "a pickle (PyTorch's old format)"
LFS_POINTER = b"version https://git-lfs"
"""The start of what Git has in the place of a large file."""

_LOOKALIKES = (
    (b"<!doctype", "an HTML page (a failed download?)", "download it again"),
    (b"<html", "an HTML page (a failed download?)", "download it again"),
    (b"PK\x03\x04", "a pickle archive (PyTorch's own format)", "convert it to safetensors first"),
    *((bytes((0x80, version)), _PICKLE, "convert it to safetensors first") for version in range(2, 6)),
    (b"GGUF", "a GGUF file", "convert it to safetensors first"),
)


class TensorInfo(NamedTuple):
    """A tensor as its header describes it; `begin` is in bytes from the start of the file's data."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.nbytes


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file with a valid header; `tensors` are in the order of their data.

    `data_start` is where the data begins, in bytes; `header_digest` covers everything before it. `metadata` is what the
    header says besides tensors.
    """

    file: SourceFile
    data_start: int
    header_digest: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_shard(file: SourceFile, cancelled: Event | None = None) -> Shard:
    """Read and check the header of a safetensors file, and none of its data.

    Raises CheckpointError with every problem found: a file in another format, a header whose sizes are wrong or leave
    holes, names that are not safe. Raises HubError where the file is on the Hub and cannot be read.
    """
    opened = file.open(cancelled)
    try:

        def read(start: int, stop: int) -> bytearray:
            data = bytearray(stop - start)
            if data:
                opened.stream(start, stop).readinto(memoryview(data))
            return data

        prefix = read(0, min(8, file.file_bytes))
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(file.file_bytes - 8, MAX_HEADER_BYTES):
            raise _not_a_header(file, read(0, min(72, file.file_bytes)), header_bytes)
        raw = read(8, 8 + header_bytes)
    finally:
        opened.close()
    digest = xxhash.xxh3_128_hexdigest(prefix + raw)
    text = _decode(file, raw)
    del raw  # as large as what it becomes, and text too: neither is held longer than needed
    entries = _parse_json(file, text)
    del text
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    tensors = _check_entries(file, metadata, entries, data_bytes=file.file_bytes - 8 - header_bytes)
    return Shard(file, 8 + header_bytes, digest, tensors, metadata)


def header_bytes(tensors: Iterable[tuple[str, TensorInfo]], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header for a file that holds `tensors` without gaps, in this order: length, JSON, padding to 8 bytes."""
    header = BytesIO()
    about = json.dumps({**(metadata or {}), "format": "pt"}, separators=(",", ":"))  # transformers needs the format
    header.write(bytes(8) + b'{"__metadata__":' + about.encode())
    end = 0
    for name, info in tensors:
        begin, end = end, end + info.nbytes
        shape = ",".join(map(str, info.shape))
        entry = f'{{"dtype":"{info.dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}'
        header.write(f",{json.dumps(name, ensure_ascii=False)}:{entry}".encode())
    header.write(b"}")
    header.write(b" " * (-header.tell() % 8))
    length = header.tell() - 8
    header.seek(0)
    header.write(length.to_bytes(8, "little"))
    return header.getvalue()


def _invalid(file: SourceFile, what: str, remedy: str = "", *, code: str = "invalid-header") -> CheckpointError:
    return CheckpointError(Problem(code, str(file), what, remedy))


def lfs_pointer(file: SourceFile, code: str) -> CheckpointError:
    """The error for a file that is only Git LFS's pointer to the weights."""
    uploaded = "its owner uploaded only the pointer: name another revision or repository"
    remedy = uploaded if file.download_bytes else "download them with: git lfs pull"
    return _invalid(file, "is a Git LFS pointer, not the weights", remedy, code=code)


def _not_a_header(file: SourceFile, start: bytearray, header_bytes: int) -> CheckpointError:
    """The error for a file whose first eight bytes are not the length of a header."""
    found = start.lstrip().lower()
    if found.startswith(LFS_POINTER):
        return lfs_pointer(file, "not-safetensors")
    for magic, what, remedy in _LOOKALIKES:
        if found.startswith(magic.lower()):
            return _invalid(file, f"is {what}", remedy, code="not-safetensors")
    if len(start) < 8 or 8 + header_bytes > file.file_bytes:
        what = f"is truncated at {file.file_bytes:,} bytes, inside its header"
        return _invalid(file, what, "download it again", code="truncated")
    return _invalid(file, f"has a header of {header_bytes:,} bytes; at most {MAX_HEADER_BYTES:,} are supported")


def _decode(file: SourceFile, raw: bytearray) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_json(file, error) from None


def _not_json(file: SourceFile, error: ValueError) -> CheckpointError:
    return _invalid(file, f"has a header that is not valid JSON ({error})", "download it again")


def _parse_json(file: SourceFile, text: str) -> dict[str, Any]:
    """The header's JSON, with every valid entry as a TensorInfo already: a quarter of the memory of dicts."""
    shared: dict[tuple[str, tuple[int, ...], int], tuple[str, tuple[int, ...], int]] = {}

    def convert(entry: dict[str, Any]) -> dict[str, Any] | TensorInfo:
        if entry.keys() != _ENTRY_KEY_SET or _value_problem(**entry):
            return entry
        begin, end = entry["data_offsets"]
        kind = entry["dtype"], tuple(entry["shape"]), end - begin
        return TensorInfo(*shared.setdefault(kind, kind), begin)

    try:
        if not text.startswith("{"):
            raise InvalidJsonError("it does not start with '{'")
        header = parse_json(text, convert=convert)
        if not isinstance(header, dict):
            raise InvalidJsonError("it is the entry of one tensor")
    except InvalidJsonError as error:
        raise _not_json(file, error) from None
    return header


def _check_entries(
    file: SourceFile, metadata: Any, header: dict[str, Any], *, data_bytes: int
) -> dict[str, TensorInfo]:
    problems: list[Problem] = []
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        problems.append(Problem("invalid-header", str(file), "__metadata__ does not map strings to strings"))
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        what = name_problem(name) or ("" if isinstance(entry, TensorInfo) else _entry_problem(entry))
        if what:
            problems.append(Problem("invalid-header", str(file), f"tensor {shorten(name)}: {what}"))
            if len(problems) > MAX_PROBLEMS:
                break
        else:
            tensors[sys.intern(name)] = entry  # index, headers and both sides of a pair have the same names
    raise_all(problems, CheckpointError)
    return in_data_order(file, tensors, data_bytes)


def in_data_order(
    file: SourceFile, tensors: Mapping[str, TensorInfo], data_bytes: int, alignment: int = 1
) -> dict[str, TensorInfo]:
    """Tensors in the order of their data. Raises CheckpointError where they do not fill `data_bytes` one by one."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    end = 0
    for name, info in ordered.items():
        expected = -(-end // alignment) * alignment
        if info.begin != expected:
            what = f"tensor {shorten(name)} begins at byte {info.begin:,} of the data, expected {expected:,}"
            raise _invalid(file, f"{what} (hole or overlap)", "download it again")
        end = info.end
    if data_bytes < end:
        what = f"is truncated: {end - data_bytes:,} of {end:,} data bytes are missing"
        raise _invalid(file, what, "download it again", code="truncated")
    if data_bytes >= end + alignment:
        raise _invalid(file, f"has {data_bytes - end:,} bytes after its last tensor", "download it again")
    return ordered


def name_problem(name: str) -> str:
    """What is wrong with a tensor's name, or an empty string."""
    if not name:
        return "the name is empty"
    if len(name) > _MAX_NAME_LENGTH:
        return f"the name has {len(name):,} characters; at most {_MAX_NAME_LENGTH:,} are supported"
    if not name.isprintable():  # control characters, and halves of surrogate pairs
        return "the name has unprintable characters"
    if "../" in name or "..\\" in name:
        return "the name contains ../"
    return ""


def _entry_problem(entry: Any) -> str:
    """What is wrong with one header entry, or an empty string."""
    if not isinstance(entry, dict):
        return "the entry is not an object"
    if entry.keys() != _ENTRY_KEY_SET:
        unknown = [key for key in entry if key not in _ENTRY_KEYS]
        if unknown:
            return f"unknown key {shorten(unknown[0])}, {did_you_mean(unknown[0], _ENTRY_KEYS)}"
        return f"{next(key for key in _ENTRY_KEYS if key not in entry)} is missing"
    return _value_problem(**entry)


def _value_problem(dtype: Any, shape: Any, data_offsets: Any) -> str:
    """What is wrong with the values of a header entry, or an empty string."""
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"unknown dtype {shorten(dtype)}"
    if not _is_sizes(shape):
        return f"shape {shorten(shape)} is not a list of sizes"
    if not (_is_sizes(data_offsets) and len(data_offsets) == 2 and data_offsets[0] <= data_offsets[1]):
        return f"data_offsets {shorten(data_offsets)} are not [begin, end]"
    if len(shape) > _MAX_DIMENSIONS:
        return f"shape has {len(shape):,} dimensions"
    elements = prod(shape)
    if (elements or prod(size for size in shape if size)) >= _MAX_ELEMENTS:
        return f"shape {shorten(shape)} has more elements than 64 bits can count"
    bits = elements * DTYPE_BITS[dtype]
    given = data_offsets[1] - data_offsets[0]
    if given * 8 != bits:
        needed = bits // 8 if bits % 8 == 0 else bits / 8
        return f"{dtype} {shape} needs {needed:,} bytes, data_offsets span {given:,}"
    return ""


def _is_sizes(value: Any) -> bool:
    if type(value) is not list:
        return False
    for size in value:  # noqa: SIM110 (a loop, since this runs for every tensor; exact types: JSON's true is an int)
        if type(size) is not int or size < 0:
            return False
    return True
