"""A merge, known completely before one byte moves: what stands where in the output, and where it comes from."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import xxhash

import slrmerge
from slrmerge.checkpoint import Checkpoint, Identity, TensorInfo, header_bytes
from slrmerge.recipe import Recipe

Kind = Literal["copy", "cast", "blend"]


class PlannedTensor(NamedTuple):
    """One output tensor; `info` places it in its shard.

    `alpha` is the weight of the pre-trained side. `pretrained` and `posttrained` name the tensors that are read: one of
    them for a copy (the bytes as they are) or a cast (the same values in another dtype), both for a blend.
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
    source: Path | None = None
    identity: Identity | None = None
    content: bytes | None = None


@dataclass(frozen=True)
class MergePlan:
    """A merge as a value: two checkpoints' headers and a recipe, worked out to every output tensor and file.

    `notes` say what a careful person would want to know: casts, differing configs, files left behind. With `allow_code`
    Python files go along.
    """

    recipe: Recipe
    pretrained: Checkpoint
    posttrained: Checkpoint
    shards: tuple[PlannedShard, ...]
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    allow_code: bool = False

    def tensors(self) -> Iterator[PlannedTensor]:
        for shard in self.shards:
            yield from shard.tensors

    @property
    def output_bytes(self) -> int:
        return sum(shard.file_bytes for shard in self.shards) + sum(file.file_bytes for file in self.files)

    @property
    def read_bytes(self) -> int:
        """The tensor bytes that are read from both sides."""
        pre = (tensor.pretrained for tensor in self.tensors() if tensor.pretrained is not None)
        post = (tensor.posttrained for tensor in self.tensors() if tensor.posttrained is not None)
        return sum(self.pretrained[name].nbytes for name in pre) + sum(self.posttrained[name].nbytes for name in post)

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
            "pretrained": str(self.pretrained.folder),
            "posttrained": str(self.posttrained.folder),
            "read_bytes": self.read_bytes,
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
