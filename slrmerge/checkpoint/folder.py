"""A folder in Hugging Face layout, read as one checkpoint or refused with everything that is wrong with it.

Of a repository on the Hub the folder holds what has been fetched; its `Snapshot` knows the rest.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Event
from typing import Any, TypeVar

from slrmerge.checkpoint.header import Shard, TensorInfo, open_regular, read_remote_shard, read_shard, unique_keys
from slrmerge.checkpoint.layers import LayerStack, find_stack, layer_count, longest_stack, numbered_stacks
from slrmerge.checkpoint.remote import RemoteFile, Snapshot, waiting_threads
from slrmerge.errors import CheckpointError, Problem, raise_all

T = TypeVar("T")
D = TypeVar("D")

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"

CHAT_TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")

_HEADERS_AT_A_TIME = 8

_NAME_A_FOLDER = "name a folder with config.json and safetensors files"
_CONVERT = (
    "convert it: python -c \"import transformers as t; t.AutoModelForCausalLM.from_pretrained('{source}')"
    ".save_pretrained('{copy}')\""
)


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors as its headers and index describe them, and its config; no weights.

    `weight_map` gives the file name of each tensor, in the order of the files and of the data inside them. One from the
    Hub has a `snapshot`, and `folder` is that snapshot's in the Hub's cache; `checked` names the files there that were
    found to be what the Hub's digests say.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Shard]
    weight_map: Mapping[str, str]
    snapshot: Snapshot | None = None
    checked: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return str(self.snapshot or self.folder)

    def __getitem__(self, name: str) -> TensorInfo:
        return self.shards[self.weight_map[name]].tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.weight_map

    def items(self) -> Iterator[tuple[str, TensorInfo]]:
        for shard in self.shards.values():
            yield from shard.tensors.items()

    @cached_property
    def stack(self) -> LayerStack | None:
        """The decoder layers, or None where they cannot be told."""
        return find_stack(self.numbered_stacks, self.config)

    @cached_property
    def numbered_stacks(self) -> dict[str, int]:
        """Every outermost numbered prefix, each with how many layers follow one another from 0."""
        return numbered_stacks(self.weight_map)

    @property
    def is_remote(self) -> bool:
        """Whether any of its weights would have to be fetched."""
        return any(shard.remote for shard in self.shards.values())

    @property
    def total_bytes(self) -> int:
        return sum(shard.identity.file_bytes - shard.data_start for shard in self.shards.values())

    @property
    def parameters(self) -> int:
        """How many elements its tensors have."""
        return sum(prod(info.shape) for _, info in self.items())

    @property
    def model_name(self) -> str:
        """Its repository's name where it is from the Hub or its cache, else the folder's own name."""
        if self.snapshot:
            return self.snapshot.repository.name
        folder = self.folder.resolve()
        repo = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repo.startswith("models--"):
            return repo.removeprefix("models--").replace("--", "/")
        return folder.name


def open_folder(folder: Path, *, snapshot: Snapshot | None = None) -> Checkpoint:
    """Read the config, the index and every header of the checkpoint in `folder`, the headers of shards that are still
    on the Hub from there.

    Raises CheckpointError with every problem found: a folder that is missing, an adapter, pickles or GGUF only; an
    index that names paths, that disagrees with its shards, or that hides an older single file; fewer layers than the
    config says; and whatever `read_shard` refuses.
    """
    try:
        return _open(folder, snapshot)
    except OSError as error:
        raise CheckpointError(Problem(str(error.filename or folder), f"cannot be read ({error.strerror})")) from error


def _open(folder: Path, snapshot: Snapshot | None) -> Checkpoint:
    names = {path.name for path in folder.iterdir()} if _exists(folder) and folder.is_dir() else None
    if names is None:
        what = "is a file, not a checkpoint folder" if folder.exists() else "no such folder"
        raise CheckpointError(Problem(str(folder), what, _NAME_A_FOLDER))
    elsewhere = snapshot.files if snapshot else {}
    names |= {name for name in elsewhere if "/" not in name}
    where = str(snapshot or folder)
    if not names & {SINGLE_NAME, INDEX_NAME}:
        raise CheckpointError(_no_model(folder, snapshot, names))
    problems: list[Problem] = []
    config: Mapping[str, Any] = {}
    if CONFIG_NAME in names:
        config = _collect(problems, lambda: _read_json(folder / CONFIG_NAME), {})
    else:
        problems.append(Problem(f"{where}/{CONFIG_NAME}", "is missing", "a checkpoint needs it to be loaded"))
    index = _collect(problems, lambda: _read_index(folder), {}) if INDEX_NAME in names else None
    if index and SINGLE_NAME in names and SINGLE_NAME not in index.values():
        what = f"holds two models: {SINGLE_NAME} and the shards of {INDEX_NAME}"
        remedy = "loaders disagree on which counts: move the stale one away"
        problems.append(Problem(where, what, remedy))
    files = [SINGLE_NAME] if index is None else sorted(set(index.values()))
    shards = _read_shards(folder, files, elsewhere, problems)
    if index and len(shards) == len(files):
        problems.extend(_index_problems(folder, index, shards))
    raise_all(problems, CheckpointError)
    checkpoint = Checkpoint(folder, config, shards, _weight_map(shards), snapshot)
    if not checkpoint.weight_map:
        raise CheckpointError(Problem(where, "holds no tensors", "fetch it again"))
    _require_layers(checkpoint)
    return checkpoint


def _read_shards(
    folder: Path, files: list[str], elsewhere: Mapping[str, RemoteFile], problems: list[Problem]
) -> dict[str, Shard]:
    """Every shard that can be read, those that are elsewhere several at a time."""

    def read(file: str, given_up: Event | None = None) -> tuple[Shard | None, list[Problem]]:
        own: list[Problem] = []
        path, remote = folder / file, elsewhere.get(file)
        if remote is not None and not _exists(path):
            copy = remote.here()
            if copy is None:
                return _collect(own, lambda: read_remote_shard(path, remote, given_up), None), own
            path = copy
        return _collect(own, lambda: _read_shard(path), None), own

    if elsewhere:
        with waiting_threads(_HEADERS_AT_A_TIME) as (pool, given_up):
            outcomes = list(pool.map(partial(read, given_up=given_up), files))
    else:
        outcomes = [read(file) for file in files]
    problems.extend(problem for _, own in outcomes for problem in own)
    return {file: shard for file, (shard, _) in zip(files, outcomes, strict=True) if shard is not None}


def _exists(path: Path) -> bool:
    """Whether a path is there; unlike `Path.is_dir`, lets the reason be known where that cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, ValueError):  # a name that no file can have
        return False
    return True


def _collect(problems: list[Problem], read: Callable[[], T], otherwise: D) -> T | D:
    """What `read` gives; where it refuses, `otherwise`, with its problems added to `problems`."""
    try:
        return read()
    except CheckpointError as error:
        problems.extend(error.problems)
        return otherwise


def _read_shard(path: Path) -> Shard:
    if not _exists(path):
        what = "is a link to nothing" if path.is_symlink() else "is in the index but not in the folder"
        raise CheckpointError(Problem(str(path), what, "finish the download"))
    return read_shard(path)


def _no_model(folder: Path, snapshot: Snapshot | None, names: set[str]) -> Problem:
    """What a folder is that holds no safetensors model under the usual names."""
    where = str(snapshot or folder)
    suffixes = {Path(name).suffix for name in names}
    if "adapter_config.json" in names:
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "a base it does not name"
        return Problem(where, f"is an adapter for {base}", "merge it into that base first (PEFT merge_and_unload)")
    if ".safetensors" in suffixes:
        what = f"has safetensors files, but neither {SINGLE_NAME} nor {INDEX_NAME}"
        return Problem(where, what, "name the folder that save_pretrained wrote, or restore its index")
    if suffixes & {".bin", ".pt", ".pth"}:
        source = snapshot.repository.name if snapshot else folder
        copy = f"{source}-safetensors".rpartition("/")[2] if snapshot else f"{source}-safetensors"
        return Problem(where, "has pickles only, no safetensors", _CONVERT.format(source=source, copy=copy))
    if ".gguf" in suffixes:
        return Problem(where, "has GGUF files only, no safetensors", "name the original checkpoint")
    return Problem(where, "has no safetensors files", _NAME_A_FOLDER)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            value = json.loads(file.read().decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Problem(str(path), f"is not sound JSON ({error})", "fetch it again")) from None
    if not isinstance(value, dict):
        raise CheckpointError(Problem(str(path), "is not a JSON object", "fetch it again"))
    return value


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name."""
    path = folder / INDEX_NAME
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(Problem(str(path), "has no weight_map", "fetch it again"))
    problems = [
        Problem(str(path), f"$.weight_map names {file!r}", "only plain *.safetensors names beside the index are read")
        for file in sorted({str(file) for file in weight_map.values()})
        if not _is_plain_name(file)
    ]
    raise_all(problems, CheckpointError)
    return weight_map


def _is_plain_name(file: str) -> bool:
    return (
        file.endswith(".safetensors")
        and file.isprintable()
        and PurePosixPath(file).name == PureWindowsPath(file).name == file
    )


def _index_problems(folder: Path, index: Mapping[str, str], shards: Mapping[str, Shard]) -> Iterator[Problem]:
    where = str(folder / INDEX_NAME)
    for name, file in index.items():
        if name not in shards[file].tensors:
            yield Problem(where, f"puts {name} in {file}, which does not hold it", "fetch index and shards again")
    holders: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in holders:
                yield Problem(str(folder / file), f"holds {name}, which {holders[name]} holds too", "fetch both again")
            elif name not in index:
                yield Problem(str(folder / file), f"holds {name}, which the index does not name", "fetch both again")
            holders.setdefault(name, file)


def _weight_map(shards: Mapping[str, Shard]) -> dict[str, str]:
    return {name: file for file, shard in shards.items() for name in shard.tensors}


def _require_layers(checkpoint: Checkpoint) -> None:
    """Refuse a config with more layers than the weights have: a loader would make up the rest at random."""
    wanted = layer_count(checkpoint.config)
    longest = longest_stack(checkpoint.numbered_stacks)
    if wanted is not None and wanted > longest:
        raise CheckpointError(
            Problem(
                str(checkpoint),
                f"the config says {wanted} layers, the weights have {longest}",
                "fetch the missing shards, or the config that belongs to these weights",
            )
        )
