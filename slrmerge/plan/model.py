"""A merge, known completely before one byte moves: what stands where in the output, and where it comes from."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import xxhash

import slrmerge
from slrmerge.checkpoint import Checkpoint, Identity, RemoteFile, TensorInfo, header_bytes
from slrmerge.plan.findings import Finding
from slrmerge.recipe import Recipe

Kind = Literal["copy", "cast", "blend", "slerp"]


class PlannedTensor(NamedTuple):
    """One output tensor; `info` places it in its shard.

    `alpha` is the weight of the pre-trained side. `pretrained` and `posttrained` name the tensors that are read: one of
    them for a copy (the bytes as they are) or a cast (the same values in another dtype), both for a blend or a slerp.
    """

    name: str
    info: TensorInfo
    alpha: float
    kind: Kind
    pretrained: str | None
    posttrained: str | None


@dataclass(frozen=True)
class PlannedShard:
    """One safetensors file of the output: a header, then `tensors` without gaps, in this order."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @cached_property
    def header(self) -> bytes:
        return header_bytes((tensor.name, tensor.info) for tensor in self.tensors)

    @property
    def data_bytes(self) -> int:
        return self.tensors[-1].info.data_offsets[1] if self.tensors else 0

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file beside the weights: copied from `source`, which was `identity` when planned, or written from `content`."""

    name: str
    file_bytes: int
    source: Path | RemoteFile | None = None
    identity: Identity | None = None
    content: bytes | None = None


@dataclass(frozen=True)
class MergePlan:
    """A merge as a value: two checkpoints' headers and a recipe, worked out to every output tensor and file.

    `notes` say what a careful person would want to know: casts, differing configs, files left behind. With `allow_code`
    Python files go along. `finding` is what the search that wrote the recipe found.
    """

    recipe: Recipe
    pretrained: Checkpoint
    posttrained: Checkpoint
    shards: tuple[PlannedShard, ...]
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    allow_code: bool = False
    finding: Finding | None = None

    def tensors(self) -> Iterator[PlannedTensor]:
        for shard in self.shards:
            yield from shard.tensors

    @property
    def output_bytes(self) -> int:
        return sum(shard.file_bytes for shard in self.shards) + sum(file.file_bytes for file in self.files)

    @property
    def read_bytes(self) -> int:
        """The tensor bytes that are read from both sides."""
        return sum(side[name].nbytes for side, name in self._reads())

    @property
    def sides(self) -> tuple[Checkpoint, Checkpoint]:
        return self.pretrained, self.posttrained

    def read_files(self) -> tuple[set[str], set[str]]:
        """The files that tensors are read from, of the pre-trained side and of the post-trained."""
        files: tuple[set[str], set[str]] = (set(), set())
        for side, name in self._reads():
            files[side is self.posttrained].add(side.weight_map[name])
        return files

    @property
    def download_bytes(self) -> int:
        """What the Hub has to send: the tensors and files that are read and are not on this disk."""
        reads = self._reads() if any(side.is_remote for side in self.sides) else ()
        tensors = (side[name].nbytes for side, name in reads if side.shards[side.weight_map[name]].remote)
        return sum(tensors) + sum(file.file_bytes for file in self.files if _is_remote(file))

    @property
    def whole_download_bytes(self) -> int:
        """What it would have to send if both checkpoints were fetched whole."""
        shards = (shard for side in self.sides for shard in side.shards.values() if shard.remote)
        files = (file.file_bytes for file in self.files if _is_remote(file))
        return sum(shard.identity.file_bytes for shard in shards) + sum(files)

    def _reads(self) -> Iterator[tuple[Checkpoint, str]]:
        for tensor in self.tensors():
            if tensor.pretrained is not None:
                yield self.pretrained, tensor.pretrained
            if tensor.posttrained is not None:
                yield self.posttrained, tensor.posttrained

    @property
    def needs_arithmetic(self) -> bool:
        """Whether any tensor is blended or cast; otherwise the merge is byte copies and never imports torch."""
        return any(tensor.kind != "copy" for tensor in self.tensors())

    def origins(self) -> dict[str, dict[str, Any]]:
        """Per output tensor, where it comes from; plain values for the manifest and for `--json`."""
        return {
            tensor.name: {
                "file": shard.name,
                "dtype": tensor.info.dtype,
                "shape": list(tensor.info.shape),
                "alpha": tensor.alpha,
                "kind": tensor.kind,
                "pretrained": tensor.pretrained,
                "posttrained": tensor.posttrained,
            }
            for shard in self.shards
            for tensor in shard.tensors
        }

    def to_dict(self) -> Mapping[str, Any]:
        """The whole plan as plain values, for `--json`."""
        return {
            "recipe": self.recipe.to_dict(),
            "pretrained": str(self.pretrained),
            "posttrained": str(self.posttrained),
            "read_bytes": self.read_bytes,
            "download_bytes": self.download_bytes,
            "whole_download_bytes": self.whole_download_bytes,
            "output_bytes": self.output_bytes,
            "shards": {shard.name: shard.file_bytes for shard in self.shards},
            "files": {file.name: file.file_bytes for file in self.files},
            "notes": list(self.notes),
            "tensors": self.origins(),
        }

    def fingerprint(self) -> str:
        """A digest of everything that decides the output's bytes, the identity of the source files included."""
        parts = [
            slrmerge.__version__,
            json.dumps(self.origins()),
            *(repr(shard.identity) for side in (self.pretrained, self.posttrained) for shard in side.shards.values()),
        ]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())


def _is_remote(file: PlannedFile) -> bool:
    return file.source is not None and not isinstance(file.source, Path) and file.source.here() is None
