"""Models in GGUF files: whole, or split into parts. Quantized tensors are read as the blocks that they are."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from slrmerge.checkpoint.files import LocalFile, SourceFile, open_regular, unreadable
from slrmerge.checkpoint.gguf_header import GgufShard, LongArray, Value, read_gguf
from slrmerge.checkpoint.location import Repository
from slrmerge.checkpoint.safetensors import SafetensorsCheckpoint, exists, require_layers
from slrmerge.checkpoint.side_files import INDEX_NAME, SINGLE_NAME, local_side_files
from slrmerge.errors import CheckpointError, Problem, collect, raise_all

SUFFIX = ".gguf"

_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.DOTALL)

_NOT_MODELS = {
    "adapter": ("is a LoRA adapter", "merge the adapter in PEFT's format, as safetensors, and convert the result"),
    "mmproj": ("is the projector of a vision or audio model", "name the GGUF file of the language model"),
    "imatrix": ("is an importance matrix", "name the GGUF file of the model"),
    "controlvector": ("is a control vector", "name the GGUF file of the model"),
}
"""Files that are not models, by `general.type` or `general.architecture`."""

_VOCABULARY = frozenset(
    {"tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"}
)


@dataclass(frozen=True, repr=False)
class GgufCheckpoint(SafetensorsCheckpoint):
    """A model in a GGUF file or in the parts of a split one; `path` is the file or the folder that was named."""

    format = "gguf"

    shards: Mapping[str, GgufShard]
    path: Path = field(kw_only=True)

    @property
    def key_values(self) -> Mapping[str, Value]:
        """The key-values, which a split model has in its first part."""
        return next(iter(self.shards.values())).key_values

    @property
    def architecture(self) -> str:
        return str(self.key_values["general.architecture"])

    def fingerprint(self) -> dict[str, Any]:
        """Files by their number instead of their name: people rename GGUF files."""
        found = super().fingerprint()
        return {**found, "files": {str(number): file for number, file in enumerate(found["files"].values(), start=1)}}

    @property
    def reference(self) -> str:
        return str(self.path.resolve() if self.path.is_dir() else self.path.parent.resolve() / self.path.name)

    @property
    def model_name(self) -> str:
        repository = super().model_name
        name = next(iter(self.shards))
        part = _PART.fullmatch(name)
        return repository if "/" in repository else part["stem"] if part else name.removesuffix(SUFFIX)

    @property
    def locations(self) -> tuple[Path, ...]:
        """A folder that was named; otherwise the files, which may be in a folder with much else."""
        return (self.folder,) if self.folder == self.path else tuple(self.folder / name for name in self.shards)

    def __str__(self) -> str:
        return str(self.folder / next(iter(self.shards)))


def open_gguf(path: Path) -> GgufCheckpoint | None:
    """Open the GGUF model that `path` names, or that is in a folder without a safetensors model; else None.

    Reads the header of every part. Raises CheckpointError with every problem found: no such file, several models in a
    folder, parts that are missing or belong to another model, what is not a model, and all that `read_gguf` refuses.
    """
    try:
        names = _model_files(path)
        if not names:
            return None
        folder = path if path.is_dir() else path.parent
        problems: list[Problem] = []
        shards: dict[str, GgufShard] = {}
        for name in names:
            if shard := collect(problems, partial(_read_local, folder / name), None):
                shards[name] = shard
        raise_all(problems, CheckpointError)
        raise_all(_split_problems(folder, shards), CheckpointError)
        raise_all(_model_problems(folder, shards), CheckpointError)
        side_files: Mapping[str, SourceFile] = local_side_files(folder) if folder == path else {}
    except OSError as error:
        raise unreadable(path, error) from error
    config = _config(next(iter(shards.values())).key_values)
    checkpoint = GgufCheckpoint(folder, config, shards, side_files, path=path)
    require_layers(checkpoint)
    return checkpoint


def _model_files(path: Path) -> list[str]:
    """The names of the files of the model that `path` names or contains, in order; none where it is another format."""
    if not path.is_dir():
        if path.suffix != SUFFIX:
            return []
        if not exists(path):
            raise CheckpointError(_no_such_file(path))
        return _parts_of(path.name)
    names = {entry.name for entry in path.iterdir()}
    if names & {SINGLE_NAME, INDEX_NAME}:
        return []
    models = {tuple(_parts_of(name)) for name in names if name.endswith(SUFFIX) and not name.startswith(".")}
    if len(models) > 1:
        found = sorted(model[0] for model in models)
        shown = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
        what = f"has {len(models)} GGUF models: {shown}"
        raise CheckpointError(Problem("several-models", str(path), what, "name the file of one"))
    return list(models.pop()) if models else []


def _no_such_file(path: Path) -> Problem:
    organisation, _, rest = path.as_posix().partition("/")
    name, _, file = rest.partition("/")
    remedy = "check the path"
    if file and Repository.parse(f"{organisation}/{name}"):
        remedy += f"; a file on the Hub must be downloaded first: hf download {organisation}/{name} {file}"
    return Problem("no-checkpoint", str(path), "no such file", remedy)


def _parts_of(name: str) -> list[str]:
    """The names of all parts of the model that the file `name` belongs to."""
    part = _PART.fullmatch(name)
    if not part or not 1 <= int(part["part"]) <= int(part["parts"]):
        return [name]
    return [f"{part['stem']}-{number:05d}-of-{part['parts']}.gguf" for number in range(1, int(part["parts"]) + 1)]


def _read_local(path: Path) -> GgufShard:
    if not exists(path):
        what = "is a broken link" if path.is_symlink() else "is a part of the model, and is missing"
        raise CheckpointError(Problem("part-missing", str(path), what, "complete the download"))
    open_regular(path).close()
    return read_gguf(LocalFile.at(path))


def _split_problems(folder: Path, shards: Mapping[str, GgufShard]) -> Iterator[Problem]:
    """Parts that do not belong together."""
    holders: dict[str, str] = {}
    for number, (name, shard) in enumerate(shards.items()):
        place = str(folder / name)
        own = shard.key_values.get("split.no", 0), shard.key_values.get("split.count", 0) or 1
        if own != (number, len(shards)):
            what = f"is part {number + 1} of {len(shards)} by its name, but split.no and split.count are {own}"
            yield Problem("split-mismatch", place, what, "restore the names of the parts: NAME-00001-of-00002.gguf")
        for tensor in shard.tensors:
            if tensor in holders:
                what = f"contains {tensor}, which is also in {holders[tensor]}"
                yield Problem("split-mismatch", place, what, "download both again")
            holders.setdefault(tensor, name)
    first = next(iter(shards.values()))
    total = first.key_values.get("split.tensors.count", len(holders))
    if total != len(holders):
        what = f"the model should have {total} tensors, its parts have {len(holders):,}"
        yield Problem("split-mismatch", str(first.file), what, "download all parts again")


def _model_problems(folder: Path, shards: Mapping[str, GgufShard]) -> Iterator[Problem]:
    """Why these files are not a model."""
    name, first = next(iter(shards.items()))
    place, values = str(folder / name), first.key_values
    architecture = values.get("general.architecture")
    for kind, (what, remedy) in _NOT_MODELS.items():
        if kind in (values.get("general.type"), architecture) or (kind == "mmproj" and architecture == "clip"):
            yield Problem("not-a-model", place, f"{what}, not a model", remedy)
            return
    if not isinstance(architecture, str) or not architecture.isprintable():
        yield Problem("invalid-header", place, "does not name its architecture", "convert the original model again")
    elif not any(shard.tensors for shard in shards.values()):
        yield Problem("no-tensors", place, "contains a vocabulary and no tensors", "name the GGUF file of the model")


def _config(values: Mapping[str, Value]) -> dict[str, object]:
    """What a config.json would say about architecture and layers; extra prediction layers do not count."""
    architecture = str(values["general.architecture"])
    count, extra = (values.get(f"{architecture}.{key}") for key in ("block_count", "nextn_predict_layers"))
    config: dict[str, object] = {"architectures": [architecture]}
    if type(count) is int:
        config["num_hidden_layers"] = count - (extra if type(extra) is int else 0)
    return config


def differing_values(pretrained: GgufCheckpoint, posttrained: GgufCheckpoint) -> Iterator[str]:
    """The key-values that change what a model computes and differ, with both values.

    Those of the architecture, and the vocabulary: names, licences, templates and how it was quantized do not count.
    """
    pre, post = pretrained.key_values, posttrained.key_values
    for key in sorted(pre.keys() | post.keys()):
        counts = key.startswith(f"{posttrained.architecture}.") or key in _VOCABULARY
        if counts and pre.get(key) != post.get(key):
            values = pre.get(key), post.get(key)
            is_long = any(isinstance(value, LongArray) for value in values)
            yield key if is_long else f"{key} ({_in_words(values[0])} and {_in_words(values[1])})"


def _in_words(value: Value | None) -> str:
    return "not set" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value)
