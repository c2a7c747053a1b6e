"""A planned file's bytes, in order, a chunk at a time: what a merge writes and what a verification compares with."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import prod

from slrmerge.blend import CHUNK_ELEMENTS, Blender
from slrmerge.checkpoint import DTYPE_BITS, CheckpointReader
from slrmerge.errors import Problem, SourceChangedError
from slrmerge.plan import MergePlan, PlannedFile, PlannedShard, PlannedTensor

CHUNK_BYTES = 1 << 20
"""Bytes per step of a copy: large enough to make calls rare, small enough to stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The two sides of a merge, open for reading."""

    pretrained: CheckpointReader
    posttrained: CheckpointReader

    def check_unchanged(self) -> None:
        """Raise SourceChangedError where a file that was read has changed since it was planned."""
        self.pretrained.check_unchanged()
        self.posttrained.check_unchanged()


def shard_chunks(plan: MergePlan, shard: PlannedShard, sources: Sources, *, lanes: int = 1) -> Iterator[memoryview]:
    """The bytes of `shard`: its header, then every tensor. Each chunk is valid until the next one is asked for.

    Blends and casts are worked out by `lanes` threads at a time; the bytes are the same for any number of them.
    """
    yield memoryview(shard.header)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    blenders = [Blender() for _ in range(lanes + 1 if lanes > 1 else 1)] if plan.needs_arithmetic else []
    with ThreadPoolExecutor(lanes) as pool:  # starts no thread before the first submit
        for run in _runs(plan, shard):
            if run[0].kind == "copy":
                yield from _copied(run, sources, buffer)
            elif lanes == 1:
                for job in _computations(plan, run[0], sources):
                    yield job(blenders[0])
            else:
                yield from _in_order(pool, _computations(plan, run[0], sources), blenders)


def file_chunks(file: PlannedFile) -> Iterator[memoryview]:
    """The bytes of a side file. Raises SourceChangedError where it is no longer as long as planned."""
    if file.content is not None:
        yield memoryview(file.content)
        return
    assert file.source is not None
    left = file.file_bytes
    with suppress(FileNotFoundError), open(file.source, "rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            left -= len(chunk)
            yield memoryview(chunk)
    if left:
        raise SourceChangedError(Problem(str(file.source), "was changed while it was read", "run again"))


def _runs(plan: MergePlan, shard: PlannedShard) -> Iterator[list[PlannedTensor]]:
    """The shard's tensors, with copies that also stand side by side in their source gathered into one run."""
    run: list[PlannedTensor] = []
    for tensor in shard.tensors:
        if run and not _adjacent(plan, run[-1], tensor):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def _adjacent(plan: MergePlan, first: PlannedTensor, second: PlannedTensor) -> bool:
    if not first.kind == second.kind == "copy" or (first.pretrained is None) != (second.pretrained is None):
        return False
    side = plan.posttrained if first.pretrained is None else plan.pretrained
    one, two = (tensor.pretrained or tensor.posttrained or "" for tensor in (first, second))
    return side.weight_map[one] == side.weight_map[two] and side[one].data_offsets[1] == side[two].data_offsets[0]


def _copied(run: list[PlannedTensor], sources: Sources, buffer: memoryview) -> Iterator[memoryview]:
    reader = sources.posttrained if run[0].pretrained is None else sources.pretrained
    name = run[0].pretrained or run[0].posttrained or ""
    total = run[-1].info.data_offsets[1] - run[0].info.data_offsets[0]
    for offset in range(0, total, CHUNK_BYTES):
        chunk = buffer[: min(CHUNK_BYTES, total - offset)]
        reader.read_into(name, offset, chunk)
        yield chunk


def _computations(
    plan: MergePlan, tensor: PlannedTensor, sources: Sources
) -> Iterator[Callable[[Blender], memoryview]]:
    """The chunks of a blend or a cast, each as a job for a Blender."""
    sides = ((sources.pretrained, tensor.pretrained), (sources.posttrained, tensor.posttrained))
    read = [(reader, name) for reader, name in sides if name is not None]
    dtypes = plan.source_dtypes(tensor)
    total = prod(tensor.info.shape)

    def compute(start: int, blender: Blender) -> memoryview:
        count = min(CHUNK_ELEMENTS, total - start)
        for (reader, name), dtype, buffer in zip(read, dtypes, blender.inputs, strict=False):
            width = DTYPE_BITS[dtype] // 8
            reader.read_into(name, start * width, buffer[: count * width])
        return blender.run(tensor.name, count, dtypes, tensor.info.dtype, tensor.alpha)

    for start in range(0, total, CHUNK_ELEMENTS):
        yield partial(compute, start)


def _in_order(
    pool: Executor, jobs: Iterable[Callable[[Blender], memoryview]], blenders: list[Blender]
) -> Iterator[memoryview]:
    """Results in the order of `jobs`, worked out ahead: a job starts when the last user of its Blender is consumed."""
    pending: deque[Future[memoryview]] = deque()
    for job, blender in zip(jobs, cycle(blenders), strict=False):
        if len(pending) == len(blenders):
            yield pending.popleft().result()
        pending.append(pool.submit(job, blender))
    while pending:
        yield pending.popleft().result()
