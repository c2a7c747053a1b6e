"""What a checkpoint is: tensors by name, wherever they are, and a reader for their bytes."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from slrmerge.checkpoint.files import ByteStream, SourceFile
from slrmerge.checkpoint.header import DTYPE_BITS, Shard, TensorInfo
from slrmerge.checkpoint.layers import LayerStack, find_stack, numbered_stacks
from slrmerge.io.pieces import CHUNK_BYTES
from slrmerge.io.progress import Progress
from slrmerge.io.sizes import format_bytes


class Checkpoint(Mapping[str, TensorInfo], ABC):
    """A model's tensors by name, as headers describe them, its config and its other files; no weights.

    A mapping from tensor names to `TensorInfo`, in the order of the data. It is a value: it holds nothing open, and
    can be compared and pickled. Implemented by `SafetensorsFolder`, `HubRepository`, `AdapterCheckpoint` and
    `GgufCheckpoint`.
    """

    folder: Path
    """Where config, tokenizer and other small files are on this disk."""

    config: Mapping[str, Any]
    """The content of config.json."""

    shards: Mapping[str, Shard]
    """The weight files and their headers, by name."""

    side_files: Mapping[str, SourceFile]
    """What belongs to the model besides its weights, by name: config, tokenizer, chat templates, licence, code."""

    left_out: tuple[str, ...] = ()
    """The names of its other files and folders, which a merge leaves behind; a folder's ends in `/`."""
    format: ClassVar[Literal["safetensors", "gguf"]] = "safetensors"
    """The format of the weight files, which both sides of a pair share."""

    verified: frozenset[str] = frozenset()
    """The weight files that were downloaded and match the Hub's digests."""

    notes: tuple[str, ...] = ()
    """What a reader of a plan should know about the checkpoint."""

    @property
    def has_own_config(self) -> bool:
        """Whether `config` is not what config.json in `side_files` says."""
        return False

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is on this disk."""
        return self.folder

    @property
    def computed(self) -> Collection[str]:
        """The tensors that no file has: `read_elements` computes their values and gives them in F64."""
        return ()

    def inherits(self, name: str, other: "Checkpoint") -> bool:  # noqa: ARG002 (for checkpoints made from others)
        """Whether tensor `name` is known to be that of `other`, byte for byte."""
        return False

    def __getitem__(self, name: str) -> TensorInfo:
        return self.shards[self.weight_map[name]].tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weight_map)

    def __len__(self) -> int:
        return len(self.weight_map)

    def __contains__(self, name: object) -> bool:
        return name in self.weight_map

    @cached_property
    def weight_map(self) -> Mapping[str, str]:
        """The file of each tensor, in the order of the data."""
        return {name: file for file, shard in self.shards.items() for name in shard.tensors}

    @property
    def weight_files(self) -> Mapping[str, SourceFile]:
        """The files that hold the weights, by name."""
        return {name: shard.file for name, shard in self.shards.items()}

    @property
    def metadata(self) -> tuple[Mapping[str, str], ...]:
        """What the headers of the weight files say besides tensors (`__metadata__`), a mapping for each file."""
        return tuple(shard.metadata for shard in self.shards.values())

    def place(self, name: str) -> tuple[str, int]:
        """The file of a tensor, and where in its data the tensor begins."""
        return self.weight_map[name], self[name].begin

    @abstractmethod
    def open(self) -> "TensorReader":
        """Open for reading; use it in a `with`."""

    def download(
        self,
        progress: Progress,  # noqa: ARG002 (for checkpoints that are not on this disk)
        files: Collection[str] | None = None,  # noqa: ARG002
        *,
        recheck: bool = False,  # noqa: ARG002
    ) -> Self:
        """The same checkpoint with its weight files, all or those named in `files`, on this disk.

        Downloads are compared with the Hub's digests, with `recheck` cached files too. Raises HubError, NoSpaceError.
        """
        return self

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Plain values by which a manifest recognizes the checkpoint: digests of its config and headers."""

    def provenance(self, files: Collection[str]) -> dict[str, Any]:  # noqa: ARG002 (for checkpoints on the Hub)
        """Plain values for a manifest about where the checkpoint came from, given the `files` that were read."""
        return {}

    def sha256(self, file: str) -> str | None:  # noqa: ARG002 (for checkpoints on the Hub)
        """The SHA-256 of a weight file in hexadecimal, where the Hub gave it."""
        return None

    def require_digests(self) -> None:
        """Raise HubError where downloads could not be compared with the Hub's digests."""

    @property
    @abstractmethod
    def reference(self) -> str:
        """How a recipe names exactly this checkpoint: an absolute folder, or a repository at a commit."""

    @property
    @abstractmethod
    def model_name(self) -> str:
        """The repository's name where it comes from the Hub or its cache, else the folder's own name."""

    @property
    def locations(self) -> tuple[Path, ...]:
        """The folders and files that an output must not replace."""
        return (self.folder,)

    @property
    def identity(self) -> tuple[object, ...]:
        """What changes whenever the weights do."""
        return tuple(file.identity for file in self.weight_files.values())

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(info.nbytes for info in self.values())

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(prod(info.shape) for info in self.values())

    @property
    def is_remote(self) -> bool:
        """Whether reading all tensors would download something."""
        return any(file.download_bytes for file in self.weight_files.values())

    @cached_property
    def stack(self) -> LayerStack | None:
        """The decoder layers, or None where they cannot be identified."""
        return find_stack(self.numbered_stacks, self.config)

    @cached_property
    def numbered_stacks(self) -> dict[str, int]:
        """Every outermost numbered prefix, with the number of consecutive layers from 0."""
        return numbered_stacks(self)

    @abstractmethod
    def __str__(self) -> str:
        """How messages name the checkpoint."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}: {len(self):,} tensors, {format_bytes(self.total_bytes)}>"


class TensorReader(ABC):
    """Reads tensors of one checkpoint; safe to share between threads. Use it in a `with`."""

    checkpoint: Checkpoint

    @abstractmethod
    def stream(self, name: str, start: int, stop: int) -> ByteStream:
        """Bytes `start` to `stop` of tensor `name`; past its end those of the tensors that follow it in its file.

        Not for tensors that are `computed`. Raises SourceChangedError where a file is not what it was when listed.
        """

    @abstractmethod
    def stream_file(self, file: str, start: int, stop: int) -> ByteStream:
        """Bytes `start` to `stop` of a weight file, header included. Raises as `stream`."""

    @abstractmethod
    def clone_file(self, file: str, target: int, start: int, stop: int) -> bool:
        """Make an open file share bytes `start` to `stop` of a weight file, or return False. Raises as `stream`."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise SourceChangedError where a file that was read has changed since it was listed."""

    @abstractmethod
    def cancel(self) -> None:
        """Make reads that wait for the network raise HubError."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of tensor `name` from byte `start` on; raises as `stream` and `readinto` do."""
        self.stream(name, start, start + len(buffer)).readinto(buffer)

    def read_elements(self, name: str, steps: range, buffer: memoryview) -> Iterator[tuple[str, int]]:
        """Read elements of tensor `name` into the start of `buffer`, from one of `steps` to the next at a time.

        Yields their dtype, which must have whole bytes, and their number.
        """
        dtype = self.checkpoint[name].dtype
        width = DTYPE_BITS[dtype] // 8
        stream = self.stream(name, steps.start * width, steps.stop * width)
        return read_steps(stream, dtype, steps, buffer)


def read_steps(stream: ByteStream, dtype: str, steps: range, buffer: memoryview) -> Iterator[tuple[str, int]]:
    """Read the elements of each step from a stream into the start of `buffer`; yields their dtype and number."""
    width = DTYPE_BITS[dtype] // 8
    for begin in steps:
        count = min(steps.step, steps.stop - begin)
        stream.readinto(buffer[: count * width])
        yield dtype, count


def differing_chunks(reader: TensorReader, name: str, other: TensorReader, twin: str) -> Iterator[bool]:
    """Whether a tensor differs from one of the same size, a chunk of bytes at a time."""
    own, others = bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES)
    nbytes = reader.checkpoint[name].nbytes
    for start in range(0, nbytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, nbytes - start)
        reader.read_into(name, start, memoryview(own)[:size])
        other.read_into(twin, start, memoryview(others)[:size])
        yield own[:size] != others[:size]
