"""The bytes of planned files, any range of them: what a merge writes and a verification compares with."""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from threading import Lock

from slrmerge.checkpoint.base import TensorReader
from slrmerge.checkpoint.files import LocalFile, unreadable
from slrmerge.checkpoint.header import DTYPE_BITS
from slrmerge.checkpoint.pair import PairReader
from slrmerge.io.pieces import CHUNK_BYTES
from slrmerge.merging.blend import CHUNK_ELEMENTS, Blender
from slrmerge.merging.plan.model import SCALED, MergePlan, PlannedFile, PlannedShard, PlannedTensor
from slrmerge.recipe.blend import BLEND_RULES


class HybridReader:
    """Reads planned tensors: copies, casts and blends of a pair's tensors; safe to share between threads."""

    def __init__(self, pair: PairReader) -> None:
        self.pair = pair
        self._sums: dict[str, Mapping[str, float]] = {}
        self._measuring: dict[str, Lock] = {}
        self._lock = Lock()

    def source_of(self, tensor: PlannedTensor) -> tuple[TensorReader, str]:
        """The reader and the name of the one tensor that a copy or a cast reads."""
        if tensor.pretrained is not None:
            return self.pair.pretrained, tensor.pretrained
        assert tensor.posttrained is not None
        return self.pair.posttrained, tensor.posttrained

    def copied(self, tensor: PlannedTensor, begin: int, end: int, buffer: memoryview) -> Iterator[memoryview]:
        """Bytes `begin` to `end` of a copy, which may run on into the tensors that follow it in its source.

        Each chunk is valid until the next one.
        """
        reader, name = self.source_of(tensor)
        stream = reader.stream(name, begin, end)
        while begin < end:
            chunk = buffer[: end - begin]
            stream.readinto(chunk)
            begin += len(chunk)
            yield chunk

    def computed(self, tensor: PlannedTensor, begin: int, end: int, blender: Blender) -> Iterator[memoryview]:
        """Bytes `begin` to `end`, both between elements, of what is not a copy; each chunk is valid until the next."""
        width = DTYPE_BITS[tensor.info.dtype] // 8
        steps = range(begin // width, end // width, CHUNK_ELEMENTS)
        if tensor.kind not in BLEND_RULES:
            reader, name = self.source_of(tensor)
            for dtype, count in reader.read_elements(name, steps, blender.inputs[0]):
                factor = 1 - tensor.alpha if tensor.kind == SCALED else None
                yield blender.cast(tensor.name, count, dtype, tensor.info.dtype, factor=factor)
            return
        rule, sums = BLEND_RULES[tensor.kind], self._sums_of(tensor, blender)
        for count, dtypes in self._chunks(tensor, steps, blender):
            yield blender.blend(tensor.name, count, dtypes, tensor.info.dtype, rule=rule, alpha=tensor.alpha, sums=sums)

    def read_into(self, tensor: PlannedTensor, begin: int, buffer: memoryview, blender: Blender) -> None:
        """Fill `buffer` with a tensor's bytes from byte `begin`, which lies between two elements."""
        if tensor.kind == "copy":
            reader, name = self.source_of(tensor)
            reader.read_into(name, begin, buffer)
            return
        done = 0
        for chunk in self.computed(tensor, begin, begin + len(buffer), blender):
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)

    def _chunks(self, tensor: PlannedTensor, steps: range, blender: Blender) -> Iterator[tuple[int, tuple[str, str]]]:
        """Read both sides of a blend into the blender's inputs, chunk by chunk; yields the count and the dtypes."""
        assert tensor.pretrained is not None
        assert tensor.posttrained is not None
        pre = self.pair.pretrained.read_elements(tensor.pretrained, steps, blender.inputs[0])
        post = self.pair.posttrained.read_elements(tensor.posttrained, steps, blender.inputs[1])
        for (pre_dtype, count), (post_dtype, _) in zip(pre, post, strict=True):
            yield count, (pre_dtype, post_dtype)

    def _sums_of(self, tensor: PlannedTensor, blender: Blender) -> Mapping[str, float]:
        """The sums over the whole tensor that its rule needs, computed by the first thread that asks."""
        keys = BLEND_RULES[tensor.kind].sums
        if not keys:
            return {}
        with self._lock:
            lock = self._measuring.setdefault(tensor.name, Lock())
        with lock:
            if tensor.name not in self._sums:
                total = dict.fromkeys(keys, 0.0)
                steps = range(0, prod(tensor.info.shape), CHUNK_ELEMENTS)
                for count, dtypes in self._chunks(tensor, steps, blender):
                    for key, value in blender.sums(count, dtypes, keys).items():
                        total[key] += value
                self._sums[tensor.name] = total
            return self._sums[tensor.name]


class ShardStream:
    """The bytes of a planned shard, any range of them; threads may share one, each with its own Blender."""

    def __init__(self, plan: MergePlan, shard: PlannedShard, reader: HybridReader) -> None:
        self.shard = shard
        self._plan = plan
        self._reader = reader

    def chunks(self, start: int, stop: int, blender: Blender) -> Iterator[memoryview]:
        """Bytes `start` to `stop` of the file; each chunk is valid until the next one.

        The bytes do not depend on how the file is divided into ranges.
        """
        header = self.shard.header
        if start < len(header):
            yield memoryview(header)[start:stop]
        begin, end = max(start - len(header), 0), stop - len(header)
        firsts, ends = self._runs
        for place in range(bisect_right(ends, begin), len(ends)):
            first, run_begin, run_end = firsts[place], ends[place - 1] if place else 0, ends[place]
            if run_begin >= end:
                return
            part = max(begin, run_begin) - run_begin, min(end, run_end) - run_begin
            if first.kind == "copy":
                yield from self._reader.copied(first, *part, blender.inputs[0][:CHUNK_BYTES])
            else:
                yield from self._reader.computed(first, *part, blender)

    @cached_property
    def _runs(self) -> tuple[list[PlannedTensor], Sequence[int]]:
        """The first tensor and the end of each run: copies that are also adjacent in their source, or one tensor."""
        firsts: list[PlannedTensor] = []
        ends = array("Q")
        last: PlannedTensor | None = None
        for tensor, _, end in self.shard.spans():
            if last and self._are_adjacent(last, tensor):
                ends[-1] = end
            else:
                firsts.append(tensor)
                ends.append(end)
            last = tensor
        return firsts, ends

    def _are_adjacent(self, first: PlannedTensor, second: PlannedTensor) -> bool:
        if not first.kind == second.kind == "copy" or (first.pretrained is None) != (second.pretrained is None):
            return False
        side = self._plan.pair.posttrained if first.pretrained is None else self._plan.pair.pretrained
        one, two = (tensor.pretrained or tensor.posttrained or "" for tensor in (first, second))
        return side.weight_map[one] == side.weight_map[two] and side[one].end == side[two].begin


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
