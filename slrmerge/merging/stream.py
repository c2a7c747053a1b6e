"""The bytes of planned files, any range of them: what a merge writes and a verification compares with."""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, islice
from threading import Lock, local
from typing import NamedTuple

import xxhash

from slrmerge.checkpoint.base import Checkpoint, TensorReader, read_steps
from slrmerge.checkpoint.files import ByteStream, LocalFile, unreadable
from slrmerge.checkpoint.header import DTYPE_BITS
from slrmerge.checkpoint.pair import PairReader, Side
from slrmerge.errors import CheckpointError, Problem
from slrmerge.io.pieces import CHUNK_BYTES, Chunk
from slrmerge.merging.blend import CHUNK_ELEMENTS, Blender
from slrmerge.merging.plan.model import SCALED, MergePlan, PlannedFile, PlannedShard, PlannedTensor
from slrmerge.recipe.blend import BLEND_RULES


class Part(NamedTuple):
    """Bytes `begin` to `end` of a planned tensor; those of a copy may run on into what follows it in its source."""

    tensor: PlannedTensor
    begin: int
    end: int


class HybridReader:
    """Reads planned tensors: copies, casts and blends of a pair's tensors; safe to share between threads."""

    def __init__(self, pair: PairReader) -> None:
        self.pair = pair
        self._own = local()
        self._sums: dict[str, Mapping[str, float]] = {}
        self._measuring: dict[str, Lock] = {}
        self._lock = Lock()
        self.nan_names: set[str] = set()
        """The blended tensors with a NaN, among those computed so far."""

    @property
    def blender(self) -> Blender:
        """This thread's buffers."""
        if not hasattr(self._own, "blender"):
            self._own.blender = Blender()
        blender: Blender = self._own.blender
        return blender

    def read_into(self, tensor: PlannedTensor, begin: int, buffer: memoryview) -> None:
        """Fill `buffer` with a tensor's bytes from byte `begin` on."""
        if tensor.kind == "copy":
            ((side, name),) = tensor.sources
            self.pair[side].read_into(name, begin, buffer)
            return
        done = 0
        for chunk in self.chunks([Part(tensor, begin, begin + len(buffer))]):
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)

    def chunks(self, parts: Sequence[Part]) -> Iterator[memoryview]:
        """The bytes of `parts`, one after the other; each chunk is valid until the next one.

        Adjacent bytes of a source's file are read as one stream: on the Hub, in one request.
        """
        parts = [each for part in parts for each in _by_rows(part)]
        streams: dict[Side, Iterator[ByteStream]] = {
            side: _streams(self.pair[side], list(_reads(self.pair[side].checkpoint, side, parts)))
            for side in ("pretrained", "posttrained")
        }
        for part in parts:
            if part.tensor.kind == "copy":
                ((side, _),) = part.tensor.sources
                yield from _fill(self.blender.inputs[0][:CHUNK_BYTES], next(streams[side]), part.end - part.begin)
            else:
                yield from self._computed(part, streams)

    def _computed(self, part: Part, streams: Mapping[Side, Iterator[ByteStream]]) -> Iterator[memoryview]:
        """The bytes of a part of what is not a copy, from the elements of every source."""
        tensor, blender, output = part.tensor, self.blender, part.tensor.info.dtype
        inputs = [
            self._elements(part, side, name, buffer, streams[side])
            for (side, name), buffer in zip(tensor.sources, blender.inputs, strict=False)
        ]
        sums = self._sums_of(tensor) if tensor.kind in BLEND_RULES else {}
        skipped, left = part.begin % _width(output), part.end - part.begin  # a part may begin and end inside an element
        for chunk in zip(*inputs, strict=True):
            dtypes, count = [dtype for dtype, _ in chunk], chunk[0][1]
            if tensor.kind in BLEND_RULES:
                data = blender.blend(
                    tensor.name, count, (dtypes[0], dtypes[1]), output,
                    rule=BLEND_RULES[tensor.kind], alpha=tensor.alpha, sums=sums,
                )  # fmt: skip
            else:
                factor = 1 - tensor.alpha if tensor.kind == SCALED else None
                data = blender.cast(tensor.name, count, dtypes[0], output, factor=factor)
            if tensor.name in blender.nan_names:
                self.nan_names.add(tensor.name)
            data = data[skipped : skipped + left]
            skipped, left = 0, left - len(data)
            yield data

    def _elements(
        self, part: Part, side: Side, name: str, buffer: memoryview, streams: Iterator[ByteStream]
    ) -> Iterator[tuple[str, int]]:
        """Read the elements of a part from one side into the start of `buffer`, a step at a time: dtype and number."""
        reader, steps = self.pair[side], _elements(part)
        if name in reader.checkpoint.computed:
            return reader.read_elements(name, steps, buffer)
        return read_steps(next(streams), reader.checkpoint[name].dtype, steps, buffer)

    def _sums_of(self, tensor: PlannedTensor) -> Mapping[str, float]:
        """The sums over the whole tensor that its rule needs, computed by the first thread that asks."""
        keys = BLEND_RULES[tensor.kind].sums
        if not keys:
            return {}
        with self._lock:
            lock = self._measuring.setdefault(tensor.name, Lock())
        with lock:
            if tensor.name not in self._sums:
                blender, total = self.blender, dict.fromkeys(keys, 0.0)
                steps = range(0, tensor.shared_elements, CHUNK_ELEMENTS)
                (_, pre), (_, post) = tensor.sources
                for count, dtypes in self.pair.read_elements(pre, post, steps, blender.inputs):
                    for key, value in blender.sums(count, dtypes, keys).items():
                        total[key] += value
                self._sums[tensor.name] = total
            return self._sums[tensor.name]


_PARTS_TOGETHER = 1000
"""Parts whose reads are planned together: neighbours share a request, and the plans of small tensors stay small."""


class ShardStream:
    """The bytes of a planned shard, any range of them; safe to share between threads."""

    def __init__(self, plan: MergePlan, shard: PlannedShard, reader: HybridReader) -> None:
        self.shard = shard
        self._pair = plan.pair
        self._reader = reader

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        """Bytes `start` to `stop` of the file. They do not depend on how the file is divided into ranges."""
        for is_file, group in groupby(self.parts(start, stop), lambda part: part[0] is None):
            if is_file:
                for _, begin, end in group:
                    yield from self._file_chunks(begin, end)
                continue
            tensors = (Part(tensor, begin, end) for tensor, begin, end in group if tensor)
            while parts := list(islice(tensors, _PARTS_TOGETHER)):
                yield from map(Chunk, self._reader.chunks(parts))

    def parts(self, start: int, stop: int) -> Iterator[tuple[PlannedTensor | None, int, int]]:
        """What bytes `start` to `stop` of the file are: bytes of a tensor, from the first to the one after the last.

        None stands for the header and for what is kept, with bytes of the file itself.
        """
        firsts, ends = self._runs
        for place in range(bisect_right(ends, start), len(ends)):
            first, run_begin, run_end = firsts[place], ends[place - 1] if place else 0, ends[place]
            if run_begin >= stop:
                return
            begin, end = max(start, run_begin), min(stop, run_end)
            yield (None, begin, end) if first is None else (first, begin - run_begin, end - run_begin)

    def _file_chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        """Bytes of the planned header, or of the post-trained file that is kept: of its header or of its data.

        Raises CheckpointError where the header of a kept shard is not the one that was planned.
        """
        if self.shard.kept is None:
            yield Chunk(memoryview(self.shard.header)[start:stop])
            return
        header = xxhash.xxh3_128()
        if stop == self.shard.data_start:
            for data in self._kept_bytes(0, start):  # of a header that is longer than a piece
                header.update(data)
        for data in self._kept_bytes(start, stop):
            if stop <= self.shard.data_start:
                header.update(data)
            yield Chunk(data, kept=True)
        if stop == self.shard.data_start and header.hexdigest() != self.shard.kept.header_digest:
            where, what = f"{self._pair.posttrained}/{self.shard.name}", "has another header than when it was planned"
            raise CheckpointError(Problem("header-changed", where, what, "run again"))

    def _kept_bytes(self, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes of the post-trained file."""
        stream = self._reader.pair.posttrained.stream_file(self.shard.name, start, stop)
        return _fill(self._reader.blender.inputs[0][:CHUNK_BYTES], stream, stop - start)

    @cached_property
    def _runs(self) -> tuple[list[PlannedTensor | None], Sequence[int]]:
        """The first tensor and the end of each run, in bytes of the file.

        A run is one tensor, copies that are also adjacent in their source, or None: the header, or kept bytes.
        """
        firsts: list[PlannedTensor | None] = [None]
        ends = array("Q", [self.shard.data_start])
        last: PlannedTensor | None = None

        def add(tensor: PlannedTensor | None, end: int) -> None:
            nonlocal last
            if len(firsts) > 1 and self._continues(last, tensor):  # the header is a run of its own
                ends[-1] = end
            else:
                firsts.append(tensor)
                ends.append(end)
            last = tensor

        for tensor, begin, end in self.shard.spans():
            if begin + self.shard.data_start > ends[-1]:
                add(None, begin + self.shard.data_start)
            add(None if self.shard.kept and tensor.is_unchanged else tensor, end + self.shard.data_start)
        if self.shard.file_bytes > ends[-1]:
            add(None, self.shard.file_bytes)
        return firsts, ends

    def _continues(self, last: PlannedTensor | None, tensor: PlannedTensor | None) -> bool:
        """Whether `tensor` belongs to the run that `last` ends."""
        if last is None or tensor is None:
            return last is tensor
        if not last.kind == tensor.kind == "copy":
            return False
        ((side, first),), ((other, second),) = last.sources, tensor.sources
        file, begin = self._pair[side].place(first)
        return side == other and self._pair[side].place(second) == (file, begin + last.info.nbytes)


def _by_rows(part: Part) -> Iterator[Part]:
    """A part of a tensor with `rows` as one of the shared rows and one of the post-trained rows after them."""
    tensor = part.tensor
    if tensor.rows is None:
        yield part
        return
    edge = tensor.shared_elements * _width(tensor.info.dtype)
    if part.begin < edge:
        shared = tensor._replace(posttrained=None) if tensor.kind == "cast" else tensor
        yield Part(shared, part.begin, min(part.end, edge))
    if part.end > edge:
        yield Part(tensor._replace(kind="cast", pretrained=None), max(part.begin, edge), part.end)


def _reads(checkpoint: Checkpoint, side: Side, parts: Iterable[Part]) -> Iterator[tuple[str, int, int]]:
    """The bytes that `parts` read from one side: the tensor, the first byte, and the one after the last."""
    for part in parts:
        for source, name in part.tensor.sources:
            if source != side or name in checkpoint.computed:
                continue
            if part.tensor.kind == "copy":
                yield name, part.begin, part.end
            else:
                steps, width = _elements(part), _width(checkpoint[name].dtype)
                yield name, steps.start * width, steps.stop * width


def _streams(reader: TensorReader, reads: Sequence[tuple[str, int, int]]) -> Iterator[ByteStream]:
    """A stream for each read; adjacent reads in a file share one."""
    runs: list[list[tuple[str, int, int]]] = []
    expected: tuple[str, int] | None = None
    for name, begin, end in reads:
        file, place = reader.checkpoint.place(name)
        if (file, place + begin) == expected:
            runs[-1].append((name, begin, end))
        else:
            runs.append([(name, begin, end)])
        expected = file, place + end
    for run in runs:
        name, start, _ = run[0]
        stream = reader.stream(name, start, start + sum(end - begin for _, begin, end in run))
        for _ in run:
            yield stream


def _fill(buffer: memoryview, stream: ByteStream, nbytes: int) -> Iterator[memoryview]:
    """The next `nbytes` of a stream, as much of them at a time as fits in `buffer`."""
    for done in range(0, nbytes, len(buffer)):
        chunk = buffer[: nbytes - done]
        stream.readinto(chunk)
        yield chunk


def _elements(part: Part) -> range:
    """The elements that a part of a cast or a blend is in, in steps."""
    width = _width(part.tensor.info.dtype)
    return range(part.begin // width, -(-part.end // width), CHUNK_ELEMENTS)


def _width(dtype: str) -> int:
    """The bytes of an element of a dtype that can be computed with."""
    return DTYPE_BITS[dtype] // 8


def file_chunks(file: PlannedFile) -> Iterator[bytes]:
    """The bytes of a side file; one on the Hub is downloaded into the Hub's cache.

    Raises SourceChangedError where it is not what it was when it was planned, CheckpointError and HubError.
    """
    if file.source is None:
        yield file.content
        return
    path = file.source.fetch()
    try:
        source = file.source if isinstance(file.source, LocalFile) else LocalFile.at(path)
    except OSError as error:
        raise unreadable(path, error) from error
    opened = source.open()
    try:
        stream = opened.stream(0, source.file_bytes)
        for start in range(0, source.file_bytes, CHUNK_BYTES):
            chunk = bytearray(min(CHUNK_BYTES, source.file_bytes - start))
            stream.readinto(memoryview(chunk))
            yield bytes(chunk)
        opened.check_unchanged()
    finally:
        opened.close()
