"""Checkpoints in safetensors files with Hugging Face's layout: read as one model, or refused with every problem."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Event, Lock
from typing import Any

from slrmerge.checkpoint.base import Checkpoint, TensorReader
from slrmerge.checkpoint.files import ByteStream, LocalFile, OpenFile, SourceFile, open_regular, open_within, unreadable
from slrmerge.checkpoint.header import Shard, read_shard
from slrmerge.checkpoint.layers import missing_layers
from slrmerge.checkpoint.location import folder_name
from slrmerge.checkpoint.no_model import no_folder, no_model
from slrmerge.checkpoint.side_files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_PICKLE_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    list_left_out,
    local_side_files,
)
from slrmerge.errors import MAX_PROBLEMS, CheckpointError, Problem, collect, raise_all
from slrmerge.io.pieces import DIGEST_NAME, digest_bytes
from slrmerge.io.sizes import shorten
from slrmerge.io.strict_json import InvalidJsonError, canonical_json, parse_json

_MAX_OPEN = 8
"""Files of a checkpoint that a reader holds open, besides those that are being read: systems limit their number."""

_MAX_JSON_BYTES = 50_000_000
"""More than the index of any model: DeepSeek-V3's has 9 MB."""


@dataclass(frozen=True, repr=False)
class SafetensorsCheckpoint(Checkpoint):
    """A checkpoint in safetensors files, here or elsewhere; `shards` are by file name."""

    folder: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Shard]
    side_files: Mapping[str, SourceFile]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.folder)

    def open(self) -> "SafetensorsReader":
        return SafetensorsReader(self)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "config": digest_bytes(canonical_json(self.config)),
            "files": {
                name: {"bytes": shard.file.file_bytes, "header": f"{DIGEST_NAME}:{shard.header_digest}"}
                for name, shard in self.shards.items()
            },
        }

    @property
    def reference(self) -> str:
        return str(self.folder.resolve())

    @property
    def model_name(self) -> str:
        return folder_name(self.folder)


class SafetensorsFolder(SafetensorsCheckpoint):
    """A checkpoint in a folder on this disk."""


class SafetensorsReader(TensorReader):
    """Reads tensors from safetensors files, of which it holds the most recently used ones open."""

    def __init__(self, checkpoint: SafetensorsCheckpoint) -> None:
        self.checkpoint: SafetensorsCheckpoint = checkpoint
        self._open: dict[str, OpenFile] = {}  # least recently used first
        self._read: set[str] = set()
        self._cancelled = Event()
        self._lock = Lock()
        self._closed = False

    def stream(self, name: str, start: int, stop: int) -> ByteStream:
        file = self.checkpoint.weight_map[name]
        shard = self.checkpoint.shards[file]
        begin = shard.data_start + shard.tensors[name].begin
        return self._opened(file).stream(begin + start, begin + stop)

    def stream_file(self, file: str, start: int, stop: int) -> ByteStream:
        return self._opened(file).stream(start, stop)

    def clone_file(self, file: str, target: int, start: int, stop: int) -> bool:
        return self._opened(file).clone_to(target, start, stop)

    def check_unchanged(self) -> None:
        with self._lock:
            opened, closed = list(self._open.values()), self._read - self._open.keys()
        for file in opened:
            file.check_unchanged()
        for name in closed:
            self.checkpoint.shards[name].file.open(self._cancelled).close()  # opening it compares it

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self.cancel()
        with self._lock:
            self._closed = True
            while self._open:
                self._open.popitem()[1].close()

    def _opened(self, name: str) -> OpenFile:
        with self._lock:
            if self._closed:
                raise ValueError(f"the reader of {self.checkpoint} is closed")
            opened = self._open.pop(name, None) or self.checkpoint.shards[name].file.open(self._cancelled)
            self._open[name] = opened
            self._read.add(name)
            if len(self._open) > _MAX_OPEN:
                del self._open[next(iter(self._open))]  # closed as soon as no stream refers to it
            return opened


def open_folder(folder: Path) -> SafetensorsFolder:
    """Read the config, the index and every header of the checkpoint in `folder`.

    Raises CheckpointError with every problem found: no such folder, only pickles or GGUF files; an index
    that names paths, disagrees with its shards, or hides an older single file; an adapter beside the weights; fewer
    layers than the config says; and everything that `read_shard` refuses.
    """
    try:
        if not exists(folder) or not folder.is_dir():
            raise CheckpointError(no_folder(folder))
        names = {path.name for path in folder.iterdir()}
        layout = read_layout(folder, names, where=str(folder))
        problems = list(layout.problems)
        shards: dict[str, Shard] = {}
        for file in layout.files:
            if shard := collect(problems, partial(read_local_shard, folder / file), None):
                shards[file] = shard
        check_shards(layout, shards, problems, where=str(folder))
        side_files = local_side_files(folder)
        entries = [f"{name}/" if (folder / name).is_dir() else name for name in names]
        left_out = list_left_out(entries, {*shards, *side_files})
        checkpoint = SafetensorsFolder(folder, layout.config, shards, side_files, left_out)
    except OSError as error:
        raise unreadable(folder, error) from error
    require_layers(checkpoint)
    return checkpoint


@dataclass(frozen=True)
class Layout:
    """What config and index say: the files that hold the weights, and the file of each tensor where there is an index.

    `problems` are what is wrong with config and index themselves.
    """

    folder: Path
    config: Mapping[str, Any]
    files: tuple[str, ...]
    index: Mapping[str, str] | None
    problems: tuple[Problem, ...]


def read_layout(folder: Path, names: set[str], *, where: str) -> Layout:
    """Read config and index in `folder`; `names` are all files of the checkpoint, there or elsewhere.

    Raises CheckpointError where it is not a safetensors checkpoint at all.
    """
    if not names & {SINGLE_NAME, INDEX_NAME}:
        raise CheckpointError(no_model(names, where))
    problems: list[Problem] = []
    config: Mapping[str, Any] = {}
    if CONFIG_NAME in names:
        config = collect(problems, lambda: read_json(folder / CONFIG_NAME), {})
    else:
        what, remedy = "is missing", "a checkpoint cannot be loaded without it"
        problems.append(Problem("no-config", f"{where}/{CONFIG_NAME}", what, remedy))
    index = collect(problems, lambda: _read_index(folder), {}) if INDEX_NAME in names else None
    if index and SINGLE_NAME in names and SINGLE_NAME not in index.values():
        what = f"contains two models: {SINGLE_NAME} and the shards in {INDEX_NAME}"
        remedy = "loaders disagree on which one to load: move the stale one away"
        problems.append(Problem("two-models", where, what, remedy))
    read = SINGLE_NAME if index is None else INDEX_NAME
    if (named := config.get("transformers_weights")) not in (None, read):
        what = f"says that the weights are in {shorten(named)} (transformers_weights), {read} is beside it"
        remedy = f"call the model {SINGLE_NAME}, or its index {INDEX_NAME}, move the other away, and delete that key"
        problems.append(Problem("two-models", f"{where}/{CONFIG_NAME}", what, remedy))
    if ADAPTER_CONFIG_NAME in names and (adapters := names & {ADAPTER_WEIGHTS_NAME, ADAPTER_PICKLE_NAME}):
        what = f"contains two models: its own weights, and an adapter in {min(adapters)}"
        remedy = f"transformers would add the adapter: move it away, with its {ADAPTER_CONFIG_NAME}, or the weights"
        problems.append(Problem("two-models", where, what, remedy))
    files = (SINGLE_NAME,) if index is None else tuple(sorted(set(index.values())))
    return Layout(folder, config, files, index, tuple(problems))


def check_shards(layout: Layout, shards: Mapping[str, Shard], problems: list[Problem], *, where: str) -> None:
    """Raise CheckpointError with `problems` and everything that is wrong with the shards taken together."""
    if layout.index and len(shards) == len(layout.files):
        problems.extend(islice(_index_problems(layout, layout.index, shards), MAX_PROBLEMS))
    raise_all(problems, CheckpointError)
    if not any(shard.tensors for shard in shards.values()):
        raise CheckpointError(Problem("no-tensors", where, "contains no tensors", "download it again"))


def require_layers(checkpoint: Checkpoint) -> None:
    """Refuse a config with more layers than the weights have: a loader would initialize the rest at random."""
    if missing := missing_layers(checkpoint.numbered_stacks, checkpoint.config):
        what = f"the config says {missing[0]} layers, the weights have {missing[1]}"
        remedy = "download the missing shards, or the config that belongs to these weights"
        raise CheckpointError(Problem("layers-missing", str(checkpoint), what, remedy))


def read_local_shard(path: Path) -> Shard:
    """See `read_shard`. Raises CheckpointError where the file is missing or not a regular file."""
    try:
        if not exists(path):
            what = "is a broken link" if path.is_symlink() else "is in the index but not in the folder"
            raise CheckpointError(Problem("shard-missing", str(path), what, "complete the download"))
        open_regular(path).close()
        return read_shard(LocalFile.at(path))
    except OSError as error:
        raise unreadable(path, error) from error


def exists(path: Path) -> bool:
    """Whether a path exists; unlike `Path.exists`, raises OSError where that cannot be determined."""
    try:
        path.stat()
    except (FileNotFoundError, ValueError):  # a ValueError: a name that no file can have
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises CheckpointError, and OSError."""
    with open_within(path.parent, path.name) as file:
        raw = file.read(_MAX_JSON_BYTES + 1)
    if len(raw) > _MAX_JSON_BYTES:
        what = f"has more than {_MAX_JSON_BYTES:,} bytes"
        raise CheckpointError(Problem("invalid-json", str(path), what, "download it again"))
    try:
        value = parse_json(raw, allow_nan=True, allow_duplicates=path.name == CONFIG_NAME)
    except InvalidJsonError as error:
        what = f"invalid JSON ({error})"
        raise CheckpointError(Problem("invalid-json", str(path), what, "download it again")) from None
    if not isinstance(value, dict):
        raise CheckpointError(Problem("invalid-json", str(path), "is not a JSON object", "download it again"))
    return value


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name."""
    path = folder / INDEX_NAME
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(Problem("invalid-index", str(path), "has no weight_map", "download it again"))
    remedy = "only plain *.safetensors names in the same folder are supported"
    raise_all(
        (
            Problem("invalid-index", str(path), f"$.weight_map names {shorten(file)}", remedy)
            for file in sorted({str(file) for file in weight_map.values()})
            if not _is_plain_name(file)
        ),
        CheckpointError,
    )
    return {sys.intern(name): sys.intern(file) for name, file in weight_map.items()}


def _is_plain_name(file: str) -> bool:
    return (
        file.endswith(".safetensors")
        and file.isprintable()
        and PurePosixPath(file).name == PureWindowsPath(file).name == file
    )


def _index_problems(layout: Layout, index: Mapping[str, str], shards: Mapping[str, Shard]) -> Iterator[Problem]:
    where = str(layout.folder / INDEX_NAME)
    for name, file in index.items():
        if name not in shards[file].tensors:
            what = f"lists {shorten(name)} in {file}, which does not contain it"
            yield Problem("index-mismatch", where, what, "download index and shards again")
    holders: dict[str, str] = {}
    for file, shard in shards.items():
        place = str(layout.folder / file)
        for name in shard.tensors:
            if name in holders:
                what = f"contains {shorten(name)}, which is also in {holders[name]}"
                yield Problem("index-mismatch", place, what, "download both again")
            elif name not in index:
                what = f"contains {shorten(name)}, which is not in the index"
                yield Problem("index-mismatch", place, what, "download both again")
            holders.setdefault(name, file)
