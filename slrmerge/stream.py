"""The bytes of a planned file, any stretch of them: what a merge writes and a verification compares with."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock

from slrmerge.blend import CHUNK_ELEMENTS, Blender, Sums, Weights, linear, slerp
from slrmerge.checkpoint import DTYPE_BITS, CheckpointReader, Extent, Identity
from slrmerge.errors import CheckpointError, Problem, SourceChangedError
from slrmerge.plan import MergePlan, PlannedFile, PlannedShard, PlannedTensor
from slrmerge.writer import CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Sources:
    """The two sides of a merge, open for reading."""

    pretrained: CheckpointReader
    posttrained: CheckpointReader
    _sums: dict[str, Sums] = field(default_factory=dict, init=False)
    _measuring: dict[str, Lock] = field(default_factory=dict, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)

    def check_unchanged(self) -> None:
        """Raise SourceChangedError where a file that was read has changed since it was planned."""
        self.pretrained.check_unchanged()
        self.posttrained.check_unchanged()

    def give_up(self) -> None:
        """Let nobody wait any longer for what is on the Hub."""
        self.pretrained.give_up()
        self.posttrained.give_up()

    def read_for(self, tensor: PlannedTensor) -> list[tuple[CheckpointReader, str]]:
        """What is read for a tensor, the pre-trained side first."""
        sides = ((self.pretrained, tensor.pretrained), (self.posttrained, tensor.posttrained))
        return [(reader, name) for reader, name in sides if name is not None]

    def computed(self, tensor: PlannedTensor, begin: int, end: int, blender: Blender) -> Iterator[memoryview]:
        """Bytes `begin` to `end` of what is no copy; both lie between elements. Valid until the next is asked for."""
        width = DTYPE_BITS[tensor.info.dtype] // 8
        weights = self._weights(tensor, blender)
        for count, dtypes in self._chunks(tensor, range(begin // width, end // width, CHUNK_ELEMENTS), blender):
            yield blender.run(tensor.name, count, dtypes, tensor.info.dtype, weights)

    def _chunks(self, tensor: PlannedTensor, steps: range, blender: Blender) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Fill the blender's inputs with a tensor's elements, chunk by chunk: how many they are, of which dtypes."""
        sides = [
            reader.read_elements(name, steps, buffer)
            for (reader, name), buffer in zip(self.read_for(tensor), blender.inputs, strict=False)
        ]
        for read in zip(*sides, strict=True):
            dtypes, counts = zip(*read, strict=True)
            yield counts[0], dtypes

    def _weights(self, tensor: PlannedTensor, blender: Blender) -> Weights:
        if tensor.kind != "slerp":
            return linear(tensor.alpha)
        with self._lock:
            lock = self._measuring.setdefault(tensor.name, Lock())
        with lock:  # whoever else is at this tensor waits for the sums
            if tensor.name not in self._sums:
                steps = range(0, prod(tensor.info.shape), CHUNK_ELEMENTS)
                parts = (blender.sums(n, (dtypes[0], dtypes[1])) for n, dtypes in self._chunks(tensor, steps, blender))
                self._sums[tensor.name] = sum(parts, Sums())
            return slerp(tensor.alpha, self._sums[tensor.name])

    def fill(self, buffer: memoryview, tensor: PlannedTensor, begin: int, blender: Blender) -> None:
        """Fill `buffer` with a tensor's bytes from byte `begin` of it, which lies between two elements."""
        if tensor.kind == "copy":
            ((reader, name),) = self.read_for(tensor)
            reader.read_into(name, begin, buffer)
            return
        done = 0
        for chunk in self.computed(tensor, begin, begin + len(buffer), blender):
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)


class ShardStream:
    """The bytes of a planned shard, in any stretch; threads may share one, each with a Blender of its own."""

    def __init__(self, plan: MergePlan, shard: PlannedShard, sources: Sources) -> None:
        self.shard = shard
        self._plan = plan
        self._sources = sources

    def chunks(self, start: int, stop: int, blender: Blender) -> Iterator[memoryview]:
        """Bytes `start` to `stop` of the file, each chunk valid until the next is asked for.

        The bytes do not depend on the stretches that they are asked for in.
        """
        header = self.shard.header
        if start < len(header):
            yield memoryview(header)[start:stop]
        begin, end = max(start - len(header), 0), stop - len(header)
        for run in self._runs[bisect_right(self._run_ends, begin) :]:
            first, run_end = run[0], run[-1].info.data_offsets[1]
            run_begin = first.info.data_offsets[0]
            if run_begin >= end:
                return
            from_, to = max(begin, run_begin) - run_begin, min(end, run_end) - run_begin
            if first.kind == "copy":
                ((reader, name),) = self._sources.read_for(first)
                for part in reader.stretch(name, from_, to - from_):
                    if isinstance(part, Extent):
                        yield from part.chunks(blender.inputs[0][:CHUNK_BYTES])
                    else:
                        yield part
            else:
                yield from self._sources.computed(first, from_, to, blender)

    @cached_property
    def _runs(self) -> list[list[PlannedTensor]]:
        """The tensors, with copies that also stand side by side in their source gathered into one run."""
        runs: list[list[PlannedTensor]] = []
        for tensor in self.shard.tensors:
            if runs and _adjacent(self._plan, runs[-1][-1], tensor):
                runs[-1].append(tensor)
            else:
                runs.append([tensor])
        return runs

    @cached_property
    def _run_ends(self) -> list[int]:
        return [run[-1].info.data_offsets[1] for run in self._runs]


def file_chunks(file: PlannedFile) -> Iterator[memoryview]:
    """The bytes of a side file; one that is on the Hub is fetched, into the Hub's cache.

    Raises SourceChangedError where it is not what it was when it was planned, CheckpointError where it cannot be read,
    HubError where it cannot be had.
    """
    if file.content is not None:
        yield memoryview(file.content)
        return
    assert file.source is not None
    path = file.source if isinstance(file.source, Path) else file.source.fetch()
    try:
        with open(path, "rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                yield memoryview(chunk)
            unchanged = file.identity in (None, Identity.of(os.fstat(source.fileno())))
    except FileNotFoundError:
        unchanged = False
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"cannot be read ({error.strerror})")) from error
    if not unchanged:
        raise SourceChangedError(Problem(str(path), "was changed while it was read", "run again"))


def _adjacent(plan: MergePlan, first: PlannedTensor, second: PlannedTensor) -> bool:
    if not first.kind == second.kind == "copy" or (first.pretrained is None) != (second.pretrained is None):
        return False
    side = plan.posttrained if first.pretrained is None else plan.pretrained
    one, two = (tensor.pretrained or tensor.posttrained or "" for tensor in (first, second))
    return side.weight_map[one] == side.weight_map[two] and side[one].data_offsets[1] == side[two].data_offsets[0]
