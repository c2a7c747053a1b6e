"""The plan of a merge: every output tensor and file, and where it comes from."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import xxhash

from slrmerge._version import __version__
from slrmerge.checkpoint.files import SourceFile
from slrmerge.checkpoint.header import Shard, TensorInfo, header_bytes
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
    `pretrained` and `posttrained` name the tensors that are read: one of them, or both for a blend. With `rows`, only
    the first so many rows are, at any alpha, blended or cast from the pre-trained side: the others are post-trained.
    """

    name: str
    info: TensorInfo  # shared with the source where it can be, so that a plan is small
    alpha: float
    kind: str
    pretrained: str | None
    posttrained: str | None
    rows: int | None = None

    @property
    def shared_elements(self) -> int:
        """The number of elements that depend on both sides, in a blend all of them unless there are `rows`."""
        return prod(self.info.shape if self.rows is None else (self.rows, *self.info.shape[1:]))

    @property
    def sources(self) -> tuple[tuple[Side, str], ...]:
        """The tensors that are read, the pre-trained first."""
        pre: tuple[tuple[Side, str], ...] = () if self.pretrained is None else (("pretrained", self.pretrained),)
        return pre if self.posttrained is None else (*pre, ("posttrained", self.posttrained))

    @property
    def is_unchanged(self) -> bool:
        """Whether it is the post-trained tensor of the same name, byte for byte."""
        return self.kind == "copy" and self.pretrained is None and self.posttrained == self.name

    @property
    def passes(self) -> int:
        """How often the tensors are read."""
        return BLEND_RULES[self.kind].passes if self.kind in BLEND_RULES else 1


class TensorRead(NamedTuple):
    """A tensor that a merge reads from one side."""

    side: Side
    name: str
    passes: int


class KeptFrame(NamedTuple):
    """What a kept shard has of the post-trained file of the same name, besides tensors: its header and its size.

    The header is everything before the data, which begins at byte `data_start`.
    """

    data_start: int
    file_bytes: int
    header_digest: str

    @classmethod
    def of(cls, shard: Shard) -> "KeptFrame":
        return cls(shard.data_start, shard.file.file_bytes, shard.header_digest)


@dataclass(frozen=True)
class PlannedShard:
    """One file of the output: a header, then `tensors`, in this order.

    A `kept` shard is the post-trained file of the same name with some tensors overwritten: its header, its offsets,
    and whatever lies between tensors are that file's. Any other shard has a header of its own, with `metadata`, and no
    gaps.
    """

    name: str
    tensors: tuple[PlannedTensor, ...]
    kept: KeptFrame | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def header(self) -> bytes:
        """The header of a shard that is not kept."""
        assert self.kept is None
        return header_bytes(((tensor.name, tensor.info) for tensor in self.tensors), self.metadata)

    @property
    def data_start(self) -> int:
        return self.kept.data_start if self.kept else len(self.header)

    @cached_property
    def data_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.info.nbytes for tensor in self.tensors)

    @property
    def frame_bytes(self) -> int:
        """The bytes that belong to no tensor: the header and any gaps."""
        return self.file_bytes - self.data_bytes

    @property
    def is_unchanged(self) -> bool:
        """Whether it is the post-trained file, byte for byte."""
        return self.kept is not None and all(tensor.is_unchanged for tensor in self.tensors)

    def spans(self) -> Iterator[tuple[PlannedTensor, int, int]]:
        """Each tensor with its first byte and the one after its last, from the start of the data."""
        end = 0
        for tensor in self.tensors:
            begin = tensor.info.begin if self.kept else end
            end = begin + tensor.info.nbytes
            yield tensor, begin, end

    @property
    def file_bytes(self) -> int:
        return self.kept.file_bytes if self.kept else len(self.header) + self.data_bytes


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

    `resharded` is why the shards are not the post-trained side's, empty where they are. `notes` report casts, differing
    configs, files left out. With `allow_code` Python files are copied. `finding` is the result of the search that wrote
    the recipe. `whole` is the plan of the whole model where the output is an adapter.
    """

    recipe: AnyRecipe
    pair: ModelPair
    shards: tuple[PlannedShard, ...]
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    resharded: str = ""
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
            for side, name in tensor.sources:
                yield TensorRead(side, name, tensor.passes)

    @property
    def output_bytes(self) -> int:
        return sum(shard.file_bytes for shard in self.shards) + self.side_bytes

    @property
    def side_bytes(self) -> int:
        """The bytes of the files beside the weights."""
        return sum(file.file_bytes for file in self.files)

    @property
    def changed_bytes(self) -> int:
        """The bytes of tensors that are not the post-trained side's own: what is written where the rest is cloned."""
        return sum(
            tensor.info.nbytes
            for shard in self.shards
            for tensor in shard.tensors
            if not (shard.kept and tensor.is_unchanged)
        )

    @property
    def read_bytes(self) -> int:
        """The bytes of weight files read from both sides, every pass counted."""
        frames = sum(shard.frame_bytes for shard in self.shards if shard.kept)
        return frames + sum(self.pair[read.side][read.name].nbytes * read.passes for read in self.reads())

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
        kept = (shard for shard in self.shards if shard.kept and shard.name in remote["posttrained"])
        frames = sum(shard.frame_bytes for shard in kept)
        return tensors + frames + sum(file.download_bytes for file in self.files)

    @property
    def full_download_bytes(self) -> int:
        """The bytes of a download of both checkpoints."""
        weights = {file for _, checkpoint in self.pair.items() for file in checkpoint.weight_files.values()}
        return sum(file.download_bytes for file in weights) + sum(file.download_bytes for file in self.files)

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
                        **({} if tensor.rows is None else {"rows": tensor.rows}),
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
            "resharded": self.resharded,
            "unchanged_shards": [shard.name for shard in self.shards if shard.is_unchanged],
            "shards": {shard.name: shard.file_bytes for shard in self.shards},
            "files": {file.name: file.file_bytes for file in self.files},
            "left_out": list(self.pair.posttrained.left_out),
            "notes": list(self.notes),
            "tensors": dict(self.origins()),
        }

    def fingerprint(self) -> str:
        """A digest of everything that decides the output's bytes, the identity of the source files included."""
        identities = [checkpoint.identity for _, checkpoint in self.pair.items()]
        digest = xxhash.xxh3_128(repr((__version__, identities)).encode())
        for shard in self.shards:
            digest.update(os.fsencode(shard.name))
            digest.update(repr(shard.kept).encode() if shard.kept else shard.header)  # names, dtypes, shapes, offsets
            for tensor in shard.tensors:
                origin = tensor.alpha, tensor.kind, tensor.pretrained, tensor.posttrained, tensor.rows
                digest.update(repr(origin).encode())
        return digest.hexdigest()
