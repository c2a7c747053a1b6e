"""A LoRA adapter on its base, as a checkpoint: the base's tensors, some of them changed by the adapter.

A module's weight is W + scale·B·A, computed in float64 whenever it is read, and rounded once by the reader. Tensors
that the adapter does not change are the base's own bytes.

The computed bytes are the same on every machine, whatever its BLAS does with the order of a sum: the factors are
rounded to integers of so few bits that all sums of products are exact in float64. They have as many bits as float32 for
ranks up to 32 and four fewer at rank 8192, counted from the largest value in a row of B and in a column of A.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import xxhash

from slrmerge.checkpoint.adapter_config import AdapterFolder
from slrmerge.checkpoint.adapter_fit import Delta, Fitting, Update
from slrmerge.checkpoint.base import Checkpoint, TensorReader, read_steps
from slrmerge.checkpoint.files import ByteStream, OpenFile, SourceFile, unreadable
from slrmerge.checkpoint.header import DTYPE_BITS, TORCH_DTYPES, Shard, TensorInfo
from slrmerge.checkpoint.location import folder_name
from slrmerge.checkpoint.safetensors import SafetensorsCheckpoint, exists
from slrmerge.checkpoint.side_files import ADAPTER_WEIGHTS_NAME, is_tokenizer_file, local_side_files
from slrmerge.errors import CheckpointError, Problem, raise_all
from slrmerge.io.pieces import DIGEST_NAME
from slrmerge.io.progress import Progress

if TYPE_CHECKING:
    import torch

_CACHED_FACTORS = 8
"""Deltas whose factors are kept: those that several threads are reading."""

_EXACT_BITS = 53
"""Integers of this many bits are exact in float64."""


@dataclass(frozen=True, repr=False)
class AdapterCheckpoint(Checkpoint):
    """An adapter on its base. `updates` are the tensors that the adapter changes or adds, by the base's names.

    `infos` describe them. `folder` is the base's, which has the config.
    """

    folder: Path
    base: SafetensorsCheckpoint
    adapter: AdapterFolder
    updates: Mapping[str, Update]
    infos: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    side_files: Mapping[str, SourceFile]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> TensorInfo:
        return self.infos[name] if name in self.infos else self.base[name]

    def __str__(self) -> str:
        return str(self.adapter)

    @property
    def locations(self) -> tuple[Path, ...]:
        return self.base.folder, self.adapter.folder

    @property
    def tokenizer_folder(self) -> Path:
        return self.adapter.folder if exists(self.adapter.folder / "tokenizer_config.json") else self.base.folder

    @property
    def shards(self) -> Mapping[str, Shard]:  # type: ignore[override]
        """The base's files: those that a merge keeps."""
        return self.base.shards

    @cached_property
    def weight_map(self) -> Mapping[str, str]:
        added = {name: ADAPTER_WEIGHTS_NAME for name in self.infos if name not in self.base}
        return {**self.base.weight_map, **added}

    @property
    def weight_files(self) -> Mapping[str, SourceFile]:
        return {**self.base.weight_files, ADAPTER_WEIGHTS_NAME: self.adapter.shard.file}

    @property
    def left_out(self) -> tuple[str, ...]:  # type: ignore[override]
        """What a merge leaves behind of the base."""
        return self.base.left_out

    @property
    def verified(self) -> frozenset[str]:  # type: ignore[override]
        return self.base.verified

    @property
    def computed(self) -> Collection[str]:
        return self.updates.keys()

    @property
    def has_own_config(self) -> bool:
        return self.config != self.base.config

    def inherits(self, name: str, other: Checkpoint) -> bool:
        return name not in self.updates and self.is_on(other)

    def is_on(self, other: Checkpoint) -> bool:
        """Whether `other` is the adapter's base."""
        return self.base is other or self.base.identity == other.identity  # the second takes long

    def open(self) -> "AdapterReader":
        return AdapterReader(self)

    def download(self, progress: Progress, files: Collection[str] | None = None, *, recheck: bool = False) -> Self:
        return self.on(self.base.download(progress, files, recheck=recheck))

    def on(self, base: SafetensorsCheckpoint) -> Self:
        """The same adapter on the same base, which is elsewhere now."""
        return replace(self, base=base)

    def fingerprint(self) -> dict[str, Any]:
        base = self.base.fingerprint()
        config = json.dumps([base["config"], self.adapter.content], ensure_ascii=False)
        shard = self.adapter.shard
        own = {"bytes": shard.file.file_bytes, "header": f"{DIGEST_NAME}:{shard.header_digest}"}
        return {
            "config": f"{DIGEST_NAME}:{xxhash.xxh3_128_hexdigest(config.encode('utf-8', 'surrogatepass'))}",
            "files": {**base["files"], ADAPTER_WEIGHTS_NAME: own},
        }

    def provenance(self, files: Collection[str]) -> dict[str, Any]:
        """Where the adapter came from; `unchecked` are the base's files not compared with the Hub's digests."""
        below = self.base.provenance([file for file in files if file != ADAPTER_WEIGHTS_NAME])
        unchecked = {key: value for key, value in below.items() if key == "unchecked"}
        return {**self.adapter.provenance, **unchecked}

    def sha256(self, file: str) -> str | None:
        return self.base.sha256(file)

    def require_digests(self) -> None:
        self.base.require_digests()

    @property
    def reference(self) -> str:
        return f"{self.base.reference}+{self.adapter.reference or self.adapter.folder.resolve()}"

    @property
    def model_name(self) -> str:
        return self.adapter.name.partition("@")[0] or folder_name(self.adapter.folder)

    @property
    def identity(self) -> tuple[object, ...]:
        return *super().identity, repr(sorted(self.updates.items()))


def put_on_base(adapter: AdapterFolder, base: Checkpoint, *notes: str) -> AdapterCheckpoint:
    """The adapter on its base. Raises CheckpointError with everything that does not fit."""
    if not isinstance(base, SafetensorsCheckpoint) or base.format == "gguf":
        what = f"is an adapter on {base}, which is not a whole model in safetensors files"
        raise CheckpointError(Problem("unsupported-adapter", str(adapter), what, "name the base in safetensors files"))
    fitting = Fitting(adapter, base)
    fitting.run()
    raise_all(fitting.problems(), CheckpointError)
    try:
        own = {name: file for name, file in local_side_files(adapter.folder).items() if is_tokenizer_file(name)}
    except OSError as error:
        raise unreadable(adapter.folder, error) from error
    replaced = "tokenizer_config.json" in own
    side_files = {name: file for name, file in base.side_files.items() if not (replaced and is_tokenizer_file(name))}
    return AdapterCheckpoint(
        base.folder,
        base,
        adapter,
        fitting.updates,
        fitting.infos,
        fitting.config(),
        side_files | own,
        (*notes, *fitting.notes),
    )


class AdapterReader(TensorReader):
    """Reads the base's tensors, and those that the adapter changes as F64 values."""

    def __init__(self, checkpoint: AdapterCheckpoint) -> None:
        self.checkpoint: AdapterCheckpoint = checkpoint
        self._base = checkpoint.base.open()
        self._weights: OpenFile = checkpoint.adapter.shard.file.open()
        self._factors = lru_cache(_CACHED_FACTORS)(self._load_factors)

    def stream(self, name: str, start: int, stop: int) -> ByteStream:
        if name in self.checkpoint.updates:
            raise ValueError(f"{name} is computed")
        return self._base.stream(name, start, stop)

    def stream_file(self, file: str, start: int, stop: int) -> ByteStream:
        return self._base.stream_file(file, start, stop)

    def clone_file(self, file: str, target: int, start: int, stop: int) -> bool:
        return self._base.clone_file(file, target, start, stop)

    def check_unchanged(self) -> None:
        self._base.check_unchanged()
        self._weights.check_unchanged()

    def cancel(self) -> None:
        self._base.cancel()

    def close(self) -> None:
        self._base.close()
        self._weights.close()

    def read_elements(self, name: str, steps: range, buffer: memoryview) -> Iterator[tuple[str, int]]:
        if name not in self.checkpoint.updates:
            yield from self._base.read_elements(name, steps, buffer)
            return
        import torch

        update = self.checkpoint.updates[name]
        raw = memoryview(bytearray(steps.step * 8))
        if update.value is not None:
            chunks = self._read_own(update.value, steps, raw)
        else:
            chunks = self._base.read_elements(update.base or name, steps, raw)
        columns = self.checkpoint[name].shape[-1]
        for begin, (dtype, count) in zip(steps, chunks, strict=True):
            values = torch.frombuffer(buffer, dtype=torch.float64, count=count)
            values.copy_(_tensor(raw, dtype, count))
            if update.value is not None:  # as peft loads it: in the base's dtype
                kept = getattr(torch, TORCH_DTYPES[self.checkpoint[name].dtype])
                values.copy_(values.to(kept))
            if update.delta is not None:
                values.add_(self._factors(update.delta).product(begin, begin + count, columns).mul_(update.delta.scale))
            yield "F64", count

    def _read_own(self, stored: str, steps: range, buffer: memoryview) -> Iterator[tuple[str, int]]:
        """Elements of a tensor in the adapter's file, as `read_elements` gives them."""
        shard = self.checkpoint.adapter.shard
        dtype, first = shard.tensors[stored].dtype, shard.data_start + shard.tensors[stored].begin
        width = DTYPE_BITS[dtype] // 8
        stream = self._weights.stream(first + steps.start * width, first + steps.stop * width)
        return read_steps(stream, dtype, steps, buffer)

    def _load_factors(self, delta: Delta) -> "_Product":
        """The factors of a delta as integers, and their exponents."""
        left = self._load(delta.left)
        right = self._load(delta.right) if delta.right else left.new_ones(1, 1)
        if delta.transposed:
            left, right = left.t(), right.t()
        if delta.right is None:
            left, right = left.new_ones(1, 1), left.reshape(1, -1)
        rank = right.shape[0]
        bits = (_EXACT_BITS - (rank - 1).bit_length()) // 2
        return _Product(*_as_integers(left, 1, bits), *_as_integers(right, 0, bits))

    def _load(self, stored: str) -> "torch.Tensor":
        """A tensor of the adapter's file in float64. Raises CheckpointError where it has values that are not finite."""
        info = self.checkpoint.adapter.shard.tensors[stored]
        raw = memoryview(bytearray(info.nbytes))
        count = prod(info.shape)
        for _ in self._read_own(stored, range(0, count, max(count, 1)), raw):
            pass
        values = _tensor(raw, info.dtype, count).double().reshape(info.shape)
        if not values.isfinite().all():
            where, what = f"{self.checkpoint}: {stored}", "has values that are not finite (NaN or infinity)"
            raise CheckpointError(Problem("adapter-not-finite", where, what, "take an adapter of a run that converged"))
        return values


class _Product(NamedTuple):
    """left·right: integers (m × r, r × n) in float64, with exponents of the rows of left and the columns of right."""

    left: "torch.Tensor"
    left_exponents: "torch.Tensor"
    right: "torch.Tensor"
    right_exponents: "torch.Tensor"

    def product(self, begin: int, end: int, columns: int) -> "torch.Tensor":
        """Elements `begin` to `end` of the product, row by row."""
        first, last = begin // columns, -(-end // columns)
        rows = self.left[first:last] @ self.right
        rows.mul_(self.left_exponents[first:last]).mul_(self.right_exponents)
        return rows.reshape(-1)[begin - first * columns : end - first * columns]


def _as_integers(values: "torch.Tensor", dimension: int, bits: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """`values` as integers of at most `bits` bits, times a power of two for each slice along `dimension`."""
    import torch

    _, exponents = torch.frexp(values.abs().amax(dimension, keepdim=True))
    exponents = exponents.clamp(-900, 900).long() - bits
    up, down = (((sign * exponents + 1023) << 52).view(torch.float64) for sign in (-1, 1))  # powers of two
    return values.mul(up).round_().contiguous(), down


def _tensor(raw: memoryview, dtype: str, count: int) -> "torch.Tensor":
    import torch

    return torch.frombuffer(raw, dtype=getattr(torch, TORCH_DTYPES[dtype]), count=count)
