"""Write the shards of a plan, several pieces at a time, each recorded in the journal when it is finished."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from itertools import zip_longest
from threading import Event, Lock
from typing import TypeVar

from slrmerge.io.pieces import reserve, write_piece
from slrmerge.io.progress import Progress
from slrmerge.merging.blend import one_core_per_chunk
from slrmerge.merging.journal import Journal, Piece, pieces_of
from slrmerge.merging.plan.model import MergePlan, PlannedShard
from slrmerge.merging.stream import HybridReader, ShardStream

T = TypeVar("T")

_PIECES_PER_SYNC = 8
"""How much of a shard is flushed to the disk at a time, while more of it is written: 128 MiB."""


def write_shards(plan: MergePlan, reader: HybridReader, journal: Journal, threads: int, progress: Progress) -> None:
    """Write the pieces that the journal lacks, `threads` of them at a time."""
    missing = [(shard, [job for job in pieces_of(shard) if job[0] not in journal.finished]) for shard in plan.shards]
    missing = [(shard, jobs) for shard, jobs in missing if jobs]
    total = sum(stop - start for _, jobs in missing for _, start, stop in jobs)
    progress.start("downloading and merging" if plan.download_bytes else "merging", total)
    one_core = one_core_per_chunk() if plan.needs_arithmetic else nullcontext()
    with one_core, _ShardWriter(plan, reader, journal, threads, progress) as writer:
        writer.run(missing)


class _ShardWriter:
    """The threads that write the pieces of a merge."""

    def __init__(
        self, plan: MergePlan, reader: HybridReader, journal: Journal, threads: int, progress: Progress
    ) -> None:
        self._plan, self._reader, self._journal, self._progress = plan, reader, journal, progress
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._syncing = ThreadPoolExecutor(1)
        # Nothing starts before everything is queued: Ctrl-C in the middle of starting a thread would leave the pool
        # waiting for it.
        self._started, self._stopped = Event(), Event()

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with self._syncing:  # shut down even where an interrupt ends the wait for the pool
            self._pool.shutdown()

    def run(self, missing: "Sequence[tuple[PlannedShard, list[tuple[Piece, int, int]]]]") -> None:
        """Write the missing pieces of these shards. Raises what the first piece that fails raises."""
        pending: list[Future[None]] = []
        failed: list[Future[None]] = []
        try:
            # Threads that write to one file wait for its lock: neighbours in the queue belong to different files, and
            # as many files as threads are written at a time.
            groups = max(len(missing) // self._threads, 1)
            for group in (missing[first::groups] for first in range(groups)):
                opened = [
                    _OpenShard(self._plan, shard, self._reader, self._journal, len(jobs)) for shard, jobs in group
                ]
                queue = interleave(
                    [[(shard, *job) for job in jobs] for shard, (_, jobs) in zip(opened, group, strict=True)]
                )
                pending += [self._pool.submit(self._write, *job) for job in queue]
            self._started.set()
            done, _ = wait(pending, return_when=FIRST_EXCEPTION)
            failed = [future for future in pending if future in done and future.exception()]
        finally:
            if failed or not self._started.is_set() or not all(future.done() for future in pending):
                self._stopped.set()
                self._started.set()
                self._reader.pair.cancel()
                self._pool.shutdown(cancel_futures=True)
        for future in failed:  # the first one: others may only report that they were stopped
            future.result()

    def _write(self, shard: "_OpenShard", piece: Piece, start: int, stop: int) -> None:
        self._started.wait()
        if self._stopped.is_set():
            return
        chunks = self._until_stopped(chunk.data for chunk in shard.stream.chunks(start, stop))
        digest = write_piece(shard.path, start, chunks, on_bytes=self._progress.advance)
        if self._stopped.is_set():
            return
        self._journal.record(piece, digest)
        durable = self._journal.durable
        if durable and piece[1] % _PIECES_PER_SYNC == _PIECES_PER_SYNC - 1:
            shard.early_syncs.append(self._syncing.submit(self._journal.sync, shard.path.name))
        if shard.is_last():
            if durable:
                for sync in shard.early_syncs:
                    sync.result()  # the system reports a failed write only once, perhaps to this call
                self._journal.sync(shard.path.name)
            self._reader.pair.check_unchanged()

    def _until_stopped(self, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
        for chunk in chunks:
            if self._stopped.is_set():
                return
            yield chunk


class _OpenShard:
    """A shard of which `missing` pieces are being written."""

    def __init__(
        self, plan: MergePlan, shard: PlannedShard, reader: HybridReader, journal: Journal, missing: int
    ) -> None:
        self.stream = ShardStream(plan, shard, reader)
        self.path = journal.folder / shard.name
        self.early_syncs: list[Future[None]] = []
        self._lock = Lock()
        self._missing = missing
        reserve(self.path, shard.file_bytes)

    def is_last(self) -> bool:
        """Count a written piece; whether it was the last one missing."""
        with self._lock:
            self._missing -= 1
            return self._missing == 0


def interleave(queues: Sequence[Sequence[T]]) -> list[T]:
    """The first entries of all queues, then the second ones, and so on."""
    absent = object()
    return [entry for row in zip_longest(*queues, fillvalue=absent) for entry in row if entry is not absent]  # type: ignore[misc]
