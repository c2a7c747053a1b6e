"""One safetensors file: its header, read strictly, and the header of a file to be written.

The format: a u64 length, that many bytes of UTF-8 JSON, then the data without holes (safetensors, README "Format").
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, NamedTuple

import xxhash

from slrmerge.checkpoint.remote import RemoteFile
from slrmerge.errors import CheckpointError, Problem, did_you_mean, raise_all

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of every dtype that the format knows."""

FLOATING = frozenset({"F16", "BF16", "F32", "F64"})
"""The dtypes that can be blended and cast: real, floating, and meaningful without a scale beside them."""

MAX_HEADER_BYTES = 25_000_000
"""What the Hub reads at most. The format allows four times that, which takes seconds and a gigabyte to parse."""

_ENTRY_KEYS = ("dtype", "shape", "data_offsets")
_ENTRY_KEY_SET = frozenset(_ENTRY_KEYS)
_MAX_DIMENSIONS = 64  # as many as torch takes
_MAX_ELEMENTS = 2**63  # a tensor library counts elements and strides in 64 signed bits

_PICKLE = "a pickle (PyTorch's old format)"
_LOOKALIKES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "fetch them with: git lfs pull"),
    (b"<!doctype", "an HTML page (a failed download?)", "download it again"),
    (b"<html", "an HTML page (a failed download?)", "download it again"),
    (b"PK\x03\x04", "a pickle archive (PyTorch's own format)", "convert it to safetensors first"),
    *((bytes((0x80, version)), _PICKLE, "convert it to safetensors first") for version in range(2, 6)),
    (b"GGUF", "a GGUF file", "convert it to safetensors first"),
)


class TensorInfo(NamedTuple):
    """A tensor as its header describes it; `data_offsets` count bytes from the start of the file's data."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


class Identity(NamedTuple):
    """What a file was when its header was read; any difference later means that it was changed or replaced.

    A file that is elsewhere has no inode and no time; its digest says what it is.
    """

    inode: int
    file_bytes: int
    mtime_ns: int
    digest: str = ""

    @classmethod
    def of(cls, status: os.stat_result) -> "Identity":
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file whose header has been read and found sound: at `path`, or elsewhere as `remote`.

    `data_start` is where the data begins, in bytes; `header_digest` covers everything before it. `tensors` are in the
    order of their data.
    """

    path: Path
    identity: Identity
    data_start: int
    header_digest: str
    tensors: Mapping[str, TensorInfo]
    remote: RemoteFile | None = None


def read_shard(path: Path) -> Shard:
    """Read and check the header of the safetensors file at `path`, and none of its data.

    Raises CheckpointError with every problem found: a file that is something else, a header that lies about sizes or
    leaves holes, names that a reader could trip over.
    """
    try:
        with open_regular(path) as file:

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            return _read_header(path, Identity.of(os.fstat(file.fileno())), read)
    except OSError as error:
        raise _bad(path, f"cannot be read ({error.strerror})") from error


def read_remote_shard(path: Path, remote: RemoteFile, given_up: Event | None = None) -> Shard:
    """The same for a file that is elsewhere; `path` is where it would be here. Raises HubError too."""
    identity = Identity(0, remote.file_bytes, 0, remote.digest)

    def read(start: int, stop: int) -> bytes:
        return b"".join(remote.stream(start, stop, given_up=given_up))

    shard = _read_header(str(remote), identity, read)
    return replace(shard, path=path, remote=remote)


def _read_header(path: Path | str, identity: Identity, read: Callable[[int, int], bytes]) -> Shard:
    """A shard from its first bytes, of which `read` gives those from one position to another, as far as there are."""
    prefix = read(0, min(8, identity.file_bytes))
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_bytes > min(identity.file_bytes - 8, MAX_HEADER_BYTES):
        raise _not_a_header(path, read(0, min(72, identity.file_bytes)), header_bytes, identity.file_bytes)
    raw = read(8, 8 + header_bytes)
    tensors = _check_entries(path, _parse_json(path, raw), data_bytes=identity.file_bytes - 8 - header_bytes)
    return Shard(Path(path), identity, 8 + header_bytes, xxhash.xxh3_128_hexdigest(prefix + raw), tensors)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; raises CheckpointError for anything else (a FIFO would wait forever), and OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise _bad(path, "is not a regular file")
    return open(path, "rb")


def header_bytes(tensors: Iterable[tuple[str, TensorInfo]]) -> bytes:
    """The header for a file that holds `tensors` in this order: length, JSON, padding to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    for name, info in tensors:
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that refuses a key given twice, where `json` would silently keep the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return result


def _bad(path: Path | str, what: str, remedy: str = "") -> CheckpointError:
    return CheckpointError(Problem(str(path), what, remedy))


def _not_a_header(path: Path | str, start: bytes, header_bytes: int, file_bytes: int) -> CheckpointError:
    """What a file is whose first eight bytes are no length of a header."""
    for magic, what, remedy in _LOOKALIKES:
        if start.lstrip().lower().startswith(magic.lower()):
            return _bad(path, f"is {what}", remedy)
    if len(start) < 8 or 8 + header_bytes > file_bytes:
        return _bad(path, f"is cut short at {file_bytes:,} bytes, inside its header", "fetch it again")
    return _bad(path, f"has a header of {header_bytes:,} bytes; {MAX_HEADER_BYTES:,} is the most accepted")


def _parse_json(path: Path | str, raw: bytes) -> dict[str, Any]:
    def refuse_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        text = raw.decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("it does not start with '{'")
        header: dict[str, Any] = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"has a header that is not sound JSON ({error})", "fetch it again") from None
    return header


def _check_entries(path: Path | str, header: dict[str, Any], *, data_bytes: int) -> dict[str, TensorInfo]:
    problems: list[Problem] = []
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        problems.append(Problem(str(path), "__metadata__ is not a map of strings to strings"))
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        fault = _name_fault(name) or _entry_fault(entry)
        if fault:
            problems.append(Problem(str(path), f"tensor {name!r}: {fault}"))
        else:
            begin, end = entry["data_offsets"]
            tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), (begin, end))
    raise_all(problems, CheckpointError)
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].data_offsets))
    faults = _layout_faults(tensors, data_bytes)
    raise_all((Problem(str(path), fault, "fetch it again") for fault in faults), CheckpointError)
    return tensors


def _name_fault(name: str) -> str:
    if not name:
        return "the name is empty"
    if not name.isprintable():  # control characters, and halves of surrogate pairs
        return "the name has characters that do not print"
    if "../" in name or "..\\" in name:
        return "the name climbs out of a folder"
    return ""


def _entry_fault(entry: Any) -> str:
    """What is wrong with one header entry taken by itself, or an empty string."""
    if not isinstance(entry, dict):
        return "the entry is not an object"
    if entry.keys() != _ENTRY_KEY_SET:
        unknown = [key for key in entry if key not in _ENTRY_KEYS]
        if unknown:
            return f"unknown key {unknown[0]!r}, {did_you_mean(unknown[0], _ENTRY_KEYS)}"
        return f"{next(key for key in _ENTRY_KEYS if key not in entry)} is missing"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"unknown dtype {dtype!r}"
    if not _is_sizes(shape):
        return f"shape {shape!r} is not a list of sizes"
    if not (_is_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        return f"data_offsets {offsets!r} are not [begin, end]"
    if len(shape) > _MAX_DIMENSIONS:
        return f"a shape of {len(shape):,} dimensions"
    elements = prod(shape)
    if (elements or prod(size for size in shape if size)) >= _MAX_ELEMENTS:
        return f"shape {shape!r} is past what 64 bits count"
    bits = elements * DTYPE_BITS[dtype]
    given = offsets[1] - offsets[0]
    if given * 8 != bits:
        needed = bits // 8 if bits % 8 == 0 else bits / 8
        return f"{dtype} {shape} takes {needed:,} bytes, data_offsets give {given:,}"
    return ""


def _is_sizes(value: Any) -> bool:
    if type(value) is not list:
        return False
    for size in value:  # noqa: SIM110 (a loop, since this runs for every tensor; exact types: JSON's true is an int)
        if type(size) is not int or size < 0:
            return False
    return True


def _layout_faults(tensors: Mapping[str, TensorInfo], data_bytes: int) -> Iterable[str]:
    """What is wrong with the places of `tensors`, given in the order of their data."""
    expected = 0
    for name, info in tensors.items():
        begin, end = info.data_offsets
        if begin != expected:
            yield f"tensor {name!r} begins at byte {begin:,} of the data, {expected:,} expected (hole or overlap)"
            return
        expected = end
    if data_bytes < expected:
        yield f"is cut short: {expected - data_bytes:,} of {expected:,} data bytes are missing"
    elif data_bytes > expected:
        yield f"has {data_bytes - expected:,} bytes after its last tensor"
