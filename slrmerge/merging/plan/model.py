"""The plan of a merge: every output tensor and file, and where it comes from."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import xxhash

from slrmerge._version import __version__
from slrmerge.checkpoint.files import SourceFile
from slrmerge.checkpoint.header import TensorInfo, header_bytes
from slrmerge.checkpoint.pair import ModelPair, Side
from slrmerge.io.sizes import format_bytes
from slrmerge.merging.finding import Finding
from slrmerge.recipe.blend import BLEND_RULES
from slrmerge.recipe.load import AnyRecipe

ADAPTER = "adapter"
"""The kind of a tensor that an adapter changes."""

SCALED = "scaled"
"""The kind of an adapter's factor that is multiplied by 1 - alpha."""


class PlannedTensor(NamedTuple):
    """One output tensor, with its dtype, shape and size; its shard knows where it begins.

    `kind` is "copy" (one side's bytes), "cast" (one side's values in another dtype), "adapter" (what an adapter
    makes of its base), "scaled" (a factor of an adapter, times 1 - alpha), or the blend rule's name.
    `pretrained` and `posttrained` name the tensors that are read: one of them, or both for a blend.
    """

    name: str
    info: TensorInfo  # shared with the source where it can be, so that a plan is small
    alpha: float
    kind: str
    pretrained: str | None
    posttrained: str | None

    @property
    def passes(self) -> int:
        """How often the tensors are read."""
        return BLEND_RULES[self.kind].passes if self.kind in BLEND_RULES else 1


class TensorRead(NamedTuple):
    """A tensor that a merge reads from one side."""

    side: Side
    name: str
    passes: int


@dataclass(frozen=True)
class PlannedShard:
    """One safetensors file of the output: a header, then `tensors` without gaps, in this order."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @cached_property
    def header(self) -> bytes:
        return header_bytes((tensor.name, tensor.info) for tensor in self.tensors)

    @cached_property
    def data_bytes(self) -> int:
        return sum(tensor.info.nbytes for tensor in self.tensors)

    def spans(self) -> Iterator[tuple[PlannedTensor, int, int]]:
        """Each tensor with its first byte and the one after its last, from the start of the data."""
        end = 0
        for tensor in self.tensors:
            begin, end = end, end + tensor.info.nbytes
            yield tensor, begin, end

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file beside the weights: copied from `source`, or written from `content`."""

    name: str
    source: SourceFile | None = None
    content: bytes = b""

    @property
    def file_bytes(self) -> int:
        return self.source.file_bytes if self.source else len(self.content)

    @property
    def download_bytes(self) -> int:
        return self.source.download_bytes if self.source else 0


@dataclass(frozen=True, repr=False)
class MergePlan:
    """A merge as a value: it can be printed, compared, pickled and executed elsewhere; it holds nothing open.

    `notes` report casts, differing configs, files left out. With `allow_code` Python files are copied. `finding` is the
    result of the search that wrote the recipe. `whole` is the plan of the whole model where the output is an adapter.
    """

    recipe: AnyRecipe
    pair: ModelPair
    shards: tuple[PlannedShard, ...]
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    allow_code: bool = False
    finding: Finding | None = None
    whole: "MergePlan | None" = None

    def __repr__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        return (
            f"<MergePlan {self.pair.pretrained} → {self.pair.posttrained}: {kinds}, {format_bytes(self.output_bytes)}>"
        )

    def tensors(self) -> Iterator[PlannedTensor]:
        for shard in self.shards:
            yield from shard.tensors

    @property
    def kinds(self) -> Mapping[str, int]:
        """The number of tensors of each kind."""
        return Counter(tensor.kind for tensor in self.tensors())

    def reads(self) -> Iterator[TensorRead]:
        """Every tensor that is read, and how often."""
        for tensor in self.tensors():
            if tensor.pretrained is not None:
                yield TensorRead("pretrained", tensor.pretrained, tensor.passes)
            if tensor.posttrained is not None:
                yield TensorRead("posttrained", tensor.posttrained, tensor.passes)

    @property
    def output_bytes(self) -> int:
        return sum(shard.file_bytes for shard in self.shards) + sum(file.file_bytes for file in self.files)

    @property
    def read_bytes(self) -> int:
        """The tensor bytes read from both sides, every pass counted."""
        return sum(self.pair[read.side][read.name].nbytes * read.passes for read in self.reads())

    def read_files(self) -> dict[Side, set[str]]:
        """The weight files that are read, by side."""
        files: dict[Side, set[str]] = {"pretrained": set(), "posttrained": set()}
        maps = {side: checkpoint.weight_map for side, checkpoint in self.pair.items()}
        for read in self.reads():
            files[read.side].add(maps[read.side][read.name])
        return files

    @property
    def download_bytes(self) -> int:
        """The bytes downloaded from the Hub: tensors, every pass counted, and files that are not on this disk."""
        remote = self._remote_files()
        tensors = sum(
            self.pair[read.side][read.name].nbytes * read.passes
            for read in (self.reads() if any(remote.values()) else ())
            if self.pair[read.side].weight_map[read.name] in remote[read.side]
        )
        return tensors + sum(file.download_bytes for file in self.files)

    @property
    def full_download_bytes(self) -> int:
        """The bytes of a download of both checkpoints."""
        weights = sum(size for sizes in self._remote_files().values() for size in sizes.values())
        return weights + sum(file.download_bytes for file in self.files)

    def _remote_files(self) -> dict[Side, dict[str, int]]:
        """The weight files that are not on this disk, with their download sizes, by side."""
        return {
            side: {name: size for name, file in checkpoint.weight_files.items() if (size := file.download_bytes)}
            for side, checkpoint in self.pair.items()
        }

    @property
    def needs_arithmetic(self) -> bool:
        """Whether any tensor is blended or cast; otherwise the merge copies bytes and never imports torch."""
        return any(tensor.kind != "copy" for tensor in self.tensors())

    def origins(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every output tensor and where it comes from, as plain values for the manifest and for `--json`."""
        for shard in self.shards:
            for tensor in shard.tensors:
                yield (
                    tensor.name,
                    {
                        "file": shard.name,
                        "dtype": tensor.info.dtype,
                        "shape": list(tensor.info.shape),
                        "alpha": tensor.alpha,
                        "kind": tensor.kind,
                        "pretrained": tensor.pretrained,
                        "posttrained": tensor.posttrained,
                    },
                )

    def to_dict(self) -> dict[str, Any]:
        """The whole plan as plain values, for `--json`."""
        return {
            "recipe": self.recipe.to_dict(),
            "pretrained": str(self.pair.pretrained),
            "posttrained": str(self.pair.posttrained),
            "read_bytes": self.read_bytes,
            "download_bytes": self.download_bytes,
            "full_download_bytes": self.full_download_bytes,
            "output_bytes": self.output_bytes,
            "shards": {shard.name: shard.file_bytes for shard in self.shards},
            "files": {file.name: file.file_bytes for file in self.files},
            "notes": list(self.notes),
            "tensors": dict(self.origins()),
        }

    def fingerprint(self) -> str:
        """A digest of everything that decides the output's bytes, the identity of the source files included."""
        identities = [checkpoint.identity for _, checkpoint in self.pair.items()]
        digest = xxhash.xxh3_128(repr((__version__, identities)).encode())
        for shard in self.shards:
            digest.update(shard.name.encode())
            digest.update(shard.header)  # names, dtypes, shapes and offsets
            for tensor in shard.tensors:
                origin = tensor.alpha, tensor.kind, tensor.pretrained, tensor.posttrained
                digest.update(repr(origin).encode())
        return digest.hexdigest()
