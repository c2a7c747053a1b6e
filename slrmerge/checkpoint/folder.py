"""A folder in Hugging Face layout, read as one checkpoint or refused with everything that is wrong with it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from slrmerge.checkpoint.header import Shard, TensorInfo, read_shard, unique_keys
from slrmerge.checkpoint.layers import LayerStack, find_stack, layer_count, numbered_stacks
from slrmerge.errors import CheckpointError, Problem

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_CONVERT = (
    "convert it: python -c \"import transformers as t; t.AutoModelForCausalLM.from_pretrained('{folder}')"
    ".save_pretrained('{folder}-safetensors')\""
)


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors as its headers and index describe them, and its config; no weights.

    `weight_map` gives the file name of each tensor, in the order of the files and of the data inside them.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Shard]
    weight_map: Mapping[str, str]

    def __getitem__(self, name: str) -> TensorInfo:
        return self.shards[self.weight_map[name]].tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.weight_map

    def items(self) -> Iterator[tuple[str, TensorInfo]]:
        for name, file in self.weight_map.items():
            yield name, self.shards[file].tensors[name]

    @cached_property
    def stack(self) -> LayerStack | None:
        """The decoder layers, or None where they cannot be told."""
        return find_stack(self.weight_map, self.config)

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for _, info in self.items())

    @property
    def model_name(self) -> str:
        """A Hub repo id where the folder is a snapshot in the Hub's cache, else the folder's own name."""
        for part in self.folder.absolute().parts:
            if part.startswith("models--"):
                return part.removeprefix("models--").replace("--", "/")
        return self.folder.resolve().name


def open_pair(pretrained: Path, posttrained: Path) -> tuple[Checkpoint, Checkpoint]:
    """Open both sides; raises CheckpointError with the problems of both."""
    opened: list[Checkpoint] = []
    problems: list[Problem] = []
    for folder in (pretrained, posttrained):
        try:
            opened.append(open_checkpoint(folder))
        except CheckpointError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(*problems)
    return opened[0], opened[1]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the config, the index and every header of the checkpoint in `folder`.

    Raises CheckpointError with every problem found: a folder that is missing, an adapter, pickles or GGUF only; an
    index that names paths, that disagrees with its shards, or that hides an older single file; fewer layers than the
    config says; and whatever `read_shard` refuses.
    """
    if not folder.is_dir():
        what = "is a file, not a checkpoint folder" if folder.exists() else "no such folder"
        raise CheckpointError(Problem(str(folder), what, "name a folder with config.json and safetensors files"))
    _refuse_other_kinds(folder)
    config = _read_json(folder / "config.json")
    index = _read_index(folder)
    names = [SINGLE_NAME] if index is None else sorted(set(index.values()))
    shards: dict[str, Shard] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            if not (folder / name).exists():
                raise CheckpointError(
                    Problem(str(folder / name), "is in the index but not in the folder", "finish the download")
                )
            shards[name] = read_shard(folder / name)
        except CheckpointError as error:
            problems.extend(error.problems)
    if not problems:
        problems.extend(_index_problems(folder, index, shards))
    if problems:
        raise CheckpointError(*problems)
    checkpoint = Checkpoint(folder, config, shards, _weight_map(shards))
    if not checkpoint.weight_map:
        raise CheckpointError(Problem(str(folder), "holds no tensors", "fetch it again"))
    _require_layers(checkpoint)
    return checkpoint


def _refuse_other_kinds(folder: Path) -> None:
    """Say what the folder is where it holds no safetensors model of its own."""
    if (folder / INDEX_NAME).exists() or (folder / SINGLE_NAME).exists():
        if (folder / INDEX_NAME).exists() and (folder / SINGLE_NAME).exists():
            index = _read_json(folder / INDEX_NAME).get("weight_map")
            if not (isinstance(index, dict) and SINGLE_NAME in index.values()):
                raise CheckpointError(
                    Problem(
                        str(folder),
                        f"holds two models: {SINGLE_NAME} and the shards of {INDEX_NAME}",
                        "loaders disagree on which counts: move the stale one away",
                    )
                )
        return
    if (folder / "adapter_config.json").exists():
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            Problem(str(folder), f"is an adapter for {base}", f"merge it into {base} first (PEFT merge_and_unload)")
        )
    suffixes = {path.suffix for path in folder.iterdir()}
    if suffixes & {".bin", ".pt", ".pth"}:
        what, remedy = "has pickles only, no safetensors", _CONVERT.format(folder=folder)
    elif ".gguf" in suffixes:
        what, remedy = "has GGUF files only, no safetensors", "name the original checkpoint"
    elif ".safetensors" in suffixes:
        what = f"has safetensors files, but neither {SINGLE_NAME} nor {INDEX_NAME}"
        remedy = "name the folder that save_pretrained wrote, or restore its index"
    else:
        what, remedy = "has no safetensors files", "name a folder with config.json and safetensors files"
    raise CheckpointError(Problem(str(folder), what, remedy))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise CheckpointError(Problem(str(path), "is missing", "a checkpoint needs it to be loaded")) from None
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"cannot be read ({error.strerror})")) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Problem(str(path), f"is not sound JSON ({error})", "fetch it again")) from None
    if not isinstance(value, dict):
        raise CheckpointError(Problem(str(path), "is not a JSON object", "fetch it again"))
    return value


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name to file name, or None for an unsharded checkpoint."""
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(Problem(str(path), "has no weight_map", "fetch it again"))
    problems = [
        Problem(str(path), f"$.weight_map names {file!r}", "only plain *.safetensors names beside the index are read")
        for file in sorted({str(file) for file in weight_map.values()})
        if not _is_plain_name(file)
    ]
    if problems:
        raise CheckpointError(*problems)
    return weight_map


def _is_plain_name(file: str) -> bool:
    return (
        file.endswith(".safetensors")
        and file.isprintable()
        and PurePosixPath(file).name == PureWindowsPath(file).name == file
    )


def _index_problems(folder: Path, index: Mapping[str, str] | None, shards: Mapping[str, Shard]) -> Iterator[Problem]:
    if index is None:
        return
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
    return {
        name: file
        for file, shard in shards.items()
        for name, _ in sorted(shard.tensors.items(), key=lambda item: item[1].data_offsets)
    }


def _require_layers(checkpoint: Checkpoint) -> None:
    """Refuse a config with more layers than the weights have: a loader would make up the rest at random."""
    wanted = layer_count(checkpoint.config)
    longest = max(numbered_stacks(checkpoint.weight_map).values(), default=0)
    if wanted is not None and wanted > longest:
        raise CheckpointError(
            Problem(
                str(checkpoint.folder),
                f"the config says {wanted} layers, the weights have {longest}",
                "fetch the missing shards, or the config that belongs to these weights",
            )
        )
